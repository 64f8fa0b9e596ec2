"""The stack config: what a user writes in `stacks/Pulumi.<stack>.yaml` under `vllm-fleet:`, read strictly.

Nothing is guessed and nothing is ignored: an unknown key, a wrong unit or an impossible value is a finding with its
path and a fix, and all findings come at once. To that end `parse` returns a config even if something in it is wrong:
the faulty values are left out and the findings stay attached, so that the plan can look for more. `make_plan` refuses
such a config with the findings of both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from infra.findings import ConfigError, Finding, did_you_mean, in_order, kind, show

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NAMESPACE = "vllm-fleet"
AVAILABLE = ("local",)
"""Targets that this version can deploy to."""
LATER = ("aws", "kubernetes")
MAX_NAME = 40
MAX_DEPTH = 16
MAX_VALUES = 20_000
"""No stack config is this large: YAML's aliases have multiplied."""
ENCRYPTED = "(encrypted)"
"""Stands for the hash of a key that only Pulumi can decrypt: `{secure: …}` in the stack file."""

Location = tuple[int | str, ...]


# Units

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?) ?(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d{1,9}) ?(B|kB|KiB|MB|MiB|GB|GiB)")
_BYTES = {"B": 1, "kB": 1000, "KiB": 1 << 10, "MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": 1 << 30}
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
NAME_FIX = f"small letters, digits and . _ -, first a letter or digit, at most {MAX_NAME}; in quotes if all digits"
_KEY_HASH = re.compile(r"sha256:([0-9a-f]{64})")


def duration(value: Any) -> float:
    """Seconds in a text like `30s`, `500ms`, `2m`, `1h`."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _refusal(f"{show(value)} is not a duration", f"a number and one of {', '.join(_SECONDS)}: 500ms, 30s, 2m")
    return float(match[1]) * _SECONDS[match[2]]


def size(value: Any) -> int:
    """Bytes in a text like `128MiB`, `4GB`."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _refusal(f"{show(value)} is not a size", f"a whole number and one of {', '.join(_BYTES)}: 512KiB, 4MB")
    return int(match[1]) * _BYTES[match[2]]


def key_hash(value: Any) -> str:
    """SHA-256 in hex of an API key, from `sha256:<64 hex digits>`. What was given may be a key: it is not repeated."""
    if isinstance(value, Mapping) and set(value) == {"secure"}:
        return ENCRYPTED
    match = _KEY_HASH.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _refusal(
            "is not the hash of an API key; it may be a key in plain text, so it is not shown",
            "`fleet keys add NAME` makes a key and writes its hash; a key that was in a file is not secret any more",
        )
    return match[1]


def _refusal(problem: str, fix: str) -> PydanticCustomError:
    return PydanticCustomError("finding", "{problem}", {"problem": problem, "fix": fix})


Duration = Annotated[
    float, BeforeValidator(duration), WithJsonSchema({"type": "string", "pattern": f"^{_DURATION.pattern}$"})
]
Size = Annotated[int, BeforeValidator(size), WithJsonSchema({"type": "string", "pattern": f"^{_SIZE.pattern}$"})]
KeyHash = Annotated[
    str,
    BeforeValidator(key_hash),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{_KEY_HASH.pattern}$"},
                {"type": "object", "properties": {"secure": {}}, "required": ["secure"], "additionalProperties": False},
            ]
        }
    ),
]
Name = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$", max_length=MAX_NAME)]
"""Names of models and keys end up in file names, in HAProxy's configuration and in metric labels."""
Port = Annotated[int, Field(ge=1024, le=32767)]
"""Above is the range that Linux gives to outgoing connections: one of them could hold a port that a server needs."""


# The config


class Strict(BaseModel):
    """Base of the config's parts: immutable, no unknown keys, no conversions; keys-are-written-with-hyphens."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        use_attribute_docstrings=True,
    )


class ModelConfig(Strict):
    """A model that clients can ask for."""

    weights: str | None = None
    """Entry of models.lock.yaml. Default: the entry with the model's own name."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """How many bits weights have; the plan picks the format that the machine runs best."""
    context: Annotated[int, Field(ge=128, le=10_000_000)] | None = None
    """Tokens of prompt and answer together. Default on local: 2048, or the model's maximum if that is lower."""
    max_answer: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Tokens of the longest answer; longer ones are cut. Default: the context. An update waits for running answers."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Requests that one engine answers at once. Default on local: 8."""
    typical_tokens: Annotated[int, Field(ge=16, le=10_000_000)] | None = None
    """Tokens of a usual request, prompt and answer: an engine has memory for `concurrency` of them, and for fewer that
    are longer. Default on local: half the context."""
    engines: Annotated[int, Field(ge=1, le=64)] | None = None
    """vLLM servers. Default on local: 2, so that one serves while the other is updated."""
    tool_calls: str | None = None
    """vLLM's parser for this model's tool calls: `hermes`, `llama3_json`, `mistral` … Default: tools are refused."""


class GatewayConfig(Strict):
    """The load balancer."""

    proxy: Literal["haproxy"] = "haproxy"
    routing: Literal["least-loaded", "round-robin"] = "least-loaded"
    max_body: Annotated[Size, Field(ge=1 << 10, le=64 << 20)] | None = None
    """Largest request. Default: what a full context can take as JSON, at least 1MiB."""


class SloConfig(Strict):
    """What users of the fleet may expect: alerts compare with it, and the gateway's patience is derived from it."""

    ttft_p95: Annotated[Duration, Field(ge=0.05, le=600)] | None = Field(default=None, alias="ttft_p95")
    """Time to the first token, 95th percentile. Default on local: 10s."""


class PortsConfig(Strict):
    """Ports of single servers, where the derived ones do not suit."""

    gateway: Port | None = None
    gateway_stats: Port | None = None
    agent: Port | None = None
    prometheus: Port | None = None
    alertmanager: Port | None = None
    grafana: Port | None = None


class LocalConfig(Strict):
    """The target `local`."""

    base_port: Annotated[int, Field(ge=1024, le=32668)] | None = None
    """The stack's ports are this one and the 99 above. Default: 18000 for the stack `local`, else from its name."""
    ports: PortsConfig = PortsConfig()


class StackConfig(Strict):
    """Everything under `vllm-fleet:` in one stack file."""

    target: Literal["local", "aws", "kubernetes"]
    models: Annotated[dict[Name, ModelConfig], Field(min_length=1)]
    """By the name that clients put in `model`."""
    gateway: GatewayConfig = GatewayConfig()
    api_keys: dict[Name, KeyHash] = {}
    """SHA-256 of each API key, by the name of its owner. `fleet keys add NAME` writes them."""
    slo: SloConfig = SloConfig()
    local: LocalConfig = LocalConfig()

    _findings: tuple[Finding, ...] = PrivateAttr(default=())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with the text that this was read from. If there is any, the config is good for checks only."""
        return self._findings

    def with_findings(self, findings: Sequence[Finding]) -> StackConfig:
        """The same config with these findings attached."""
        other = self.model_copy()
        other._findings = in_order(findings)  # noqa: SLF001 - of the same class
        return other


# Reading


def from_pulumi(config: Mapping[str, str]) -> StackConfig:
    """The config as Pulumi hands it to a program: `namespace:key` to a text, or to JSON in a text.

    Raises:
        ConfigError: As `parse`.
    """
    prefix = f"{NAMESPACE}:"
    return parse({key.removeprefix(prefix): _decoded(text) for key, text in config.items() if key.startswith(prefix)})


def _decoded(text: str) -> Any:
    try:
        return json.loads(text) if text.startswith(("{", "[")) else text
    except (ValueError, RecursionError):
        return text


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
    for target in LATER:
        if raw.get("target") == target:  # this one finding: all others would speak of another target
            fix = f"this version deploys to: {', '.join(AVAILABLE)}"
            raise ConfigError([Finding("target", f"{target}: not available yet", fix)])
    cleaner = _Cleaner(list(findings))
    values = cleaner.copy(raw, ())
    found = cleaner.findings
    while True:
        try:
            return StackConfig.model_validate(values).with_findings(found)
        except ValidationError as error:
            problems = error.errors()
            # No model is left when each one was taken out: that has been said.
            said = any(finding.path.startswith("models.") for finding in found)
            found += [_finding(problem) for problem in problems if not (said and problem["type"] == "too_short")]
            mended = [_mend(values, problem) for problem in problems]
        if not any(mended):
            raise ConfigError(in_order(found))


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
            raise ConfigError([*self.findings, Finding("config", "is nested too deeply or too large")])
        if value is None and location[:-1] == ("models",):  # `chat:` alone is a model with defaults only
            return {}
        if isinstance(value, Mapping):
            kept = {key: item for key, item in value.items() if not self._refused(item, (*location, key))}
            return {key: self.copy(item, (*location, key)) for key, item in kept.items()}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return [self.copy(item, (*location, index)) for index, item in enumerate(value)]
        return value

    def _refused(self, value: Any, location: Location) -> bool:
        *parents, _ = location
        if value is None and parents != ["models"]:
            fix = "give it one, or remove the line to get the default"
            self.findings.append(Finding(_text(location), "has no value", fix))
            return True
        if isinstance(value, Mapping) and set(value) == {"secure"} and parents != ["api-keys"]:
            fix = "write it in plain text; only the hashes under `api-keys` may be encrypted, each by itself"
            self.findings.append(Finding(_text(location), "is encrypted", fix))
            return True
        return False


def _mend(values: dict[str, Any], problem: ErrorDetails) -> bool:
    """Take the faulty value out, so that its default stands in.

    Returns:
        False if there is nothing to take out, or no default.
    """
    location = [part for part in problem["loc"] if part != "[key]"]
    if location == ["target"]:  # whatever was meant, the rest can be checked for the one target there is
        values["target"] = AVAILABLE[0]
        return True
    if problem["type"] in {"missing", "too_short"}:
        return False
    holder: Any = values
    for part in location[:-1]:
        holder = holder.get(part, {})
    # Pydantic names a key that is no text by its text.
    faulty = [key for key in holder if str(key) == str(location[-1])]
    for key in faulty:
        del holder[key]
    return bool(faulty)


# Words


def _text(location: Location) -> str:
    """A path as it is shown. A name under `api-keys` could be a key that was written on the wrong side of the colon."""
    parts = [show(part).strip("`") or '""' for part in location if part != "[key]"]
    if parts[0] == "api-keys" and len(parts) > 1 and (parts[1].startswith("sk-") or len(parts[1]) > MAX_NAME // 2):
        parts[1] = f"{parts[1][:4]}…"
    return ".".join(parts)


def _finding(problem: ErrorDetails) -> Finding:
    """One of pydantic's errors in the words of the stack file."""
    path = _text(problem["loc"])
    if problem["type"] == "finding":
        return Finding(path, problem["ctx"]["problem"], problem["ctx"]["fix"])
    if problem["loc"][-1] == "[key]":
        return Finding(path, "cannot be a name", NAME_FIX)
    return Finding(path, *_words(problem))


def _words(problem: ErrorDetails) -> tuple[str, str]:
    """Problem and fix of an error that pydantic's own types find."""
    location, value, context = problem["loc"], problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "missing" | "too_short":
            words = "is missing", _MISSING[str(location[0])]
        case "extra_forbidden" | "invalid_key":
            words = "unknown key", did_you_mean(str(location[-1]), _keys(_type_at(location[:-1])))
        case "literal_error":
            choices = get_args(_type_at(location))
            words = f"cannot be {show(value)}", did_you_mean(value if isinstance(value, str) else "", choices)
        case "greater_than_equal":
            words = "is too small", f"at least {_amount(location, context['ge'])}"
        case "less_than_equal":
            words = "is too large", f"at most {_amount(location, context['le'])}"
        case "int_type":
            words = f"must be a whole number, not {show(value)}", _whole_number(value)
        case "string_type":
            words = f"must be text, not {show(value)}", ""
        case _:
            keys = _keys(_type_at(location))
            fix = f"keys: {', '.join(keys)}" if keys else "write `NAME: …` lines under it"
            words = f"must be a mapping, not {kind(value)}", fix
    return words


_MISSING = {
    "target": f"add `{NAMESPACE}:target: local`",
    "models": f"add `{NAMESPACE}:models: {{chat: {{weights: ENTRY}}}}` with an ENTRY of stacks/models.lock.yaml",
}


def _whole_number(value: Any) -> str:
    """The number that was probably meant by `16k` or `"8"`."""
    match = re.fullmatch(r"(\d{1,6}) ?([kK]?)", value) if isinstance(value, str) else None
    return f"write {int(match[1]) << (10 if match[2] else 0)}" if match else "digits alone, without quotes or unit"


def _amount(location: Location, value: float) -> str:
    """A limit in the unit that the key is written in."""
    if location[-1] == "max-body":
        return f"{int(value) >> 10}KiB" if value < 1 << 20 else f"{int(value) >> 20}MiB"
    return f"{value:g}s" if location[-1] == "ttft_p95" else str(value)


def _type_at(location: Location) -> Any:
    """The type that the config has at a path."""
    here: Any = StackConfig
    for part in location:
        fields = here.model_fields.values() if isinstance(here, type) and issubclass(here, BaseModel) else ()
        here = (
            next((field.annotation for field in fields if field.alias == part), None) if fields else get_args(here)[1]
        )
    return here


def _keys(type_: Any) -> list[str]:
    """The keys that a part of the config can have; none if the user chooses them."""
    if get_origin(type_) is dict:
        return []
    return [str(field.alias) for field in type_.model_fields.values()]


def schema() -> dict[str, Any]:
    """JSON Schema of a whole stack file, for editors."""
    config = StackConfig.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vllm-fleet stack",
        "type": "object",
        "required": ["config"],
        "properties": {
            "config": {
                "type": "object",
                "required": [f"{NAMESPACE}:{key}" for key in config["required"]],
                "properties": {f"{NAMESPACE}:{key}": value for key, value in config["properties"].items()},
                "patternProperties": {f"^(?!{NAMESPACE}:)[^:]+:.+$": True},
                "additionalProperties": False,
            }
        },
        "$defs": config["$defs"],
    }
