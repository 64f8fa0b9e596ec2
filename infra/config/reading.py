"""Reading a config: from what YAML or Pulumi gives to types, with a finding for everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from infra.config import words
from infra.config.checks import checks
from infra.config.plaintext import Credential, credential, secret
from infra.config.shape import meant, type_at
from infra.config.stack import NAMESPACE, StackConfig
from infra.config.strict import NAME_FIX, likely_name
from infra.config.words import Location
from infra.findings import ConfigError, Finding, in_order, nearest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_DEPTH = 16
MAX_VALUES = 20_000
"""No stack config is this large: YAML's aliases have multiplied."""
TARGETS = get_args(StackConfig.model_fields["target"].annotation)
LACKS = {"missing", "too_short"}
"""Pydantic's names for something that is not there."""
NAMED = {"models", "pools", "api-keys"}
"""What has names for keys."""


def from_pulumi(config: Mapping[str, str]) -> StackConfig:
    """The config as Pulumi hands it to a program: `namespace:key` to a text, or to JSON in a text.

    Raises:
        ConfigError: As `parse`.
    """
    prefix = f"{NAMESPACE}:"
    ours = {key.removeprefix(prefix): decoded(text) for key, text in config.items() if key.startswith(prefix)}
    return parse(ours).in_region(region_of(config))


def region_of(config: Mapping[Any, Any]) -> str | None:
    """The region that Pulumi's AWS provider works in."""
    region = config.get("aws:region")
    return region if isinstance(region, str) else None


def decoded(value: Any) -> Any:
    """A value, of which `pulumi config set` may have made a text: it writes JSON that way."""
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith(("{", "[")) else value
    except (ValueError, RecursionError):
        return value


def parse(raw: Mapping[str, Any], findings: Sequence[Finding] = ()) -> StackConfig:
    """Check the config and give it types.

    Args:
        raw: What the stack file has under `config`, keys without `vllm-fleet:`.
        findings: What was wrong with the writing.

    Returns:
        The config. If something is wrong, the faulty values are at their defaults and `findings` says why.

    Raises:
        ConfigError: So much is wrong, or missing, that there is nothing to plan.
    """
    cleaner = _Cleaner(list(findings))
    values = cleaner.copy(raw, ())
    found, renamed = cleaner.findings, dict[Location, str]()
    while True:
        try:
            config = StackConfig.model_validate(values)
            break
        except ValidationError as error:
            problems = error.errors()
            # What was taken out, or each model of which was, lacks for a reason that has been said.
            said = {part for finding in found for part in (finding.path, finding.path.partition(".")[0])}
            for problem in problems:
                written = _written(problem["loc"], renamed)
                if problem["type"] not in LACKS or words.path(written) not in said:
                    found.append(words.finding(problem, written))
            mended = [_mend(values, problem, renamed) for problem in problems]
        if not any(mended):
            raise ConfigError(in_order(found))
    return config.with_findings([*found, *checks(config, raw)])


@dataclass
class _Cleaner:
    """Copies the config, so that it may be mended, without what can be no value of it."""

    findings: list[Finding]
    copied: int = 0

    def copy(self, value: Any, location: Location) -> Any:
        """A copy of what is at a path.

        Raises:
            ConfigError: It is too large or too deep to be a stack config.
        """
        self.copied += 1
        if len(location) > MAX_DEPTH or self.copied > MAX_VALUES:
            fix = f"at most {MAX_DEPTH} levels and {MAX_VALUES} values"
            raise ConfigError([*self.findings, Finding("config", "is nested too deeply or too large", fix)])
        if value is None and _is_name(location):  # `chat:` alone is a model with defaults only
            return {}
        if isinstance(value, Mapping):
            kept = {key: item for key, item in value.items() if not self._refused(item, (*location, key))}
            return {key: self.copy(item, (*location, key)) for key, item in kept.items()}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return [self.copy(item, (*location, index)) for index, item in enumerate(value)]
        return value

    def _refused(self, value: Any, location: Location) -> bool:
        *parents, key = location
        if not isinstance(key, str) or key == words.KEY:
            is_name = len(parents) == 1 and parents[0] in NAMED
            said = ("cannot be a name", NAME_FIX) if is_name else ("unknown key", "keys are words")
            self.findings.append(Finding(words.path(location), *said))
            return True
        if value is None and not _is_name(location):
            fix = "give it one, or remove the line to get the default"
            self.findings.append(Finding(words.path(location), "has no value", fix))
            return True
        secure = isinstance(value, Mapping) and set(value) == {"secure"}
        if secure and not _may_be_secure(location) and type_at(location):
            fix = "write it in plain text; only the hashes under `api-keys` may be encrypted, each by itself"
            self.findings.append(Finding(words.path(location), "is encrypted", fix))
            return True
        return self._told(credential(key), location) or (parents != ["api-keys"] and self._secret(value, location))

    def _secret(self, value: Any, location: Location) -> bool:
        """Whether it is a credential, or a list with one in it: then no other finding shows it."""
        if isinstance(value, list):
            found = [self._secret(item, (*location, index)) for index, item in enumerate(value)]
            return any(found)  # every one is told
        return self._told(secret(location[-1], value), location)

    def _told(self, known: Credential | None, location: Location) -> bool:
        if known is None:
            return False
        self.findings.append(Finding(words.path(location), known.problem, known.fix))
        return True


def _may_be_secure(location: Location) -> bool:
    """Whether a path is that of the hash of a key: `api-keys.NAME`, or `api-keys.NAME.hash` beside limits."""
    match location:
        case ("api-keys", _) | ("api-keys", _, "hash"):
            return True
        case _:
            return False


def _is_name(location: Location) -> bool:
    """Whether a path is that of a model or a pool."""
    return len(location) == 2 and location[0] in {"models", "pools"}  # noqa: PLR2004 - the key and the name


def _mend(values: dict[str, Any], problem: ErrorDetails, renamed: dict[Location, str]) -> bool:
    """Take the faulty value out, so that its default stands in; or let it be what was meant, if that is beyond doubt.

    Args:
        values: The config.
        problem: What is wrong in it.
        renamed: Gets the path of a key that has another name now, and its name as it was written.

    Returns:
        False if there is nothing to take out, or no default.
    """
    location = [part for part in problem["loc"] if part != words.KEY]
    if location == ["target"]:
        values["target"] = _likely_target(values)
        return True
    if _rename(values, problem, renamed):
        return True
    if problem["type"] in LACKS:  # what lacks something of its own goes with it
        location.pop()
    holder: Any = values
    for index, part in enumerate(location):
        if not isinstance(holder, dict) or part not in holder:
            return False  # it went with another one
        if index == len(location) - 1 or isinstance(holder[part], list):  # without one item a list means another thing
            del holder[part]
            return True
        holder = holder[part]
    return False


def _rename(values: dict[str, Any], problem: ErrorDetails, renamed: dict[Location, str]) -> bool:
    """Give a key that is misspelt the name that was meant, where that is free: what is under it can then be checked."""
    *parents, old = [part for part in problem["loc"] if part != words.KEY]
    new: str | None = None
    if problem["type"] == "extra_forbidden":
        new = meant(str(old), type_at(parents))
    elif problem["loc"][-1] == words.KEY and parents in (["models"], ["pools"]):
        new = likely_name(str(old))
    holder: Any = values
    for part in parents:
        holder = holder.get(part) if isinstance(holder, dict) else None
    if new is None or not isinstance(holder, dict) or new in holder or old not in holder:
        return False
    holder[new] = holder.pop(old)
    renamed[*parents, new] = str(old)
    if parents == ["pools"]:
        models = values.get("models")
        for model in models.values() if isinstance(models, dict) else ():
            if isinstance(model, dict) and model.get("pool") == old:
                model["pool"] = new
    return True


def _written(location: Location, renamed: Mapping[Location, str]) -> Location:
    """A path with the names that the user has written."""
    return tuple(renamed.get(location[: index + 1], part) for index, part in enumerate(location))


def _likely_target(values: Mapping[str, Any]) -> str:
    """What stands in for a target that is none, so that the rest can be checked."""
    wanted = values.get("target")
    near = words.other_target(wanted) or (nearest(wanted, TARGETS) if isinstance(wanted, str) else None)
    return near or ("aws" if "pools" in values else "local")
