"""Stack files: reading one without Pulumi, and changing the keys in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode

from infra.config import (
    MAX_DEPTH,
    MAX_NAME,
    MAX_VALUES,
    NAME,
    NAME_FIX,
    NAMESPACE,
    Location,
    StackConfig,
    parse,
    region_of,
)
from infra.config.plaintext import REVOKED, hidden, secret
from infra.config.reading import decoded
from infra.config.words import path as shown
from infra.findings import ConfigError, Finding, did_you_mean, kind, nearest, show
from infra.paths import stacks_dir

if TYPE_CHECKING:
    from pathlib import Path

KEYS = f"{NAMESPACE}:api-keys"
REGION = "aws:region"


def stack_file(stack: str) -> Path:
    """Where a stack's config is."""
    return stacks_dir() / f"Pulumi.{stack}.yaml"


def load_stack_file(path: Path) -> StackConfig:
    """Read a stack file.

    Returns:
        The config, its findings attached: see `parse`.

    Raises:
        ConfigError: There is nothing to plan: no file, no YAML, not a mapping, or too much is missing.
    """
    document, findings = _load(path, _read(path))
    if not isinstance(document, Mapping):
        what = f"is {kind(document)}, not a mapping"
    elif not isinstance(document.get("config"), Mapping):
        near = next((str(key) for key in document if key != "config" and nearest(str(key), ["config"])), None)
        what = f"has no mapping `config`, but {show(near)}" if near else "has no mapping `config`"
    else:
        values, misspelt = _ours(document["config"])
        return parse(values, (*findings, *misspelt)).in_region(region_of(document["config"]))
    raise ConfigError([Finding(path.name, what, f"start with `config:` and put `{NAMESPACE}:target: local` under it")])


def add_key(path: Path, name: str, digest: str, limits: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write the hash of an API key into a stack file; the rest of it stays as it is, comments too.

    Args:
        path: The stack file.
        name: The key's owner.
        digest: SHA-256 in hex of the key.
        limits: What else is under the key's name in the config; nothing: the hash stands alone.

    Raises:
        ConfigError: The name is taken or cannot be one, or the file has no place for it.
    """
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise ConfigError([Finding(f"api-keys.{name}", "cannot be a name", NAME_FIX)])
    with _edited(path) as config:
        if config.get(KEYS) is None:
            config[KEYS] = {}
        keys: Any = config[KEYS]
        if not isinstance(keys, MutableMapping) or set(keys) == {"secure"}:
            raise ConfigError([Finding("api-keys", "is no mapping of names to hashes", "mend the stack file first")])
        if name in keys:
            fix = f"`fleet keys revoke {name}` first, or choose another name"
            raise ConfigError([Finding(f"api-keys.{name}", "is there already", fix)])
        text = f"sha256:{digest}"
        keys[name] = {"hash": text, **{key: _on_one_line(value) for key, value in limits.items()}} if limits else text


def _on_one_line(value: Any) -> Any:
    """A list in brackets; anything else as it is."""
    if not isinstance(value, tuple | list):
        return value
    line = CommentedSeq(value)
    line.fa.set_flow_style()
    return line


def remove_key(path: Path, name: str) -> None:
    """Take a key out of a stack file.

    Raises:
        ConfigError: There is no such key.
    """
    with _edited(path) as config:
        keys = config.get(KEYS)
        if not isinstance(keys, Mapping) or name not in keys:
            names = list(keys) if isinstance(keys, Mapping) else []
            fix = did_you_mean(name, names) if names else "`fleet keys list` shows what there is"
            raise ConfigError([Finding(f"api-keys.{name}", "is not there", fix)])
        del config[KEYS][name]
        if not config[KEYS]:
            del config[KEYS]


@contextmanager
def _edited(path: Path) -> Iterator[Any]:
    """The mapping `config` of a stack file; what is changed in it is written back, all or nothing."""
    load_stack_file(path)  # an edit of a file that cannot be read would make it worse
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # lines are broken as they were, and nowhere else
    yaml.allow_duplicate_keys = True
    document = yaml.load(path.read_text(encoding="utf-8"))
    yield document["config"]
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            yaml.dump(document, stream)
        fresh.chmod(path.stat().st_mode & 0o777)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ConfigError([Finding(path.name, f"cannot be written: {error.strerror}")]) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        stacks = sorted(
            file.name.removeprefix("Pulumi.").removesuffix(".yaml") for file in path.parent.glob("Pulumi.*.yaml")
        )
        fix = f"stacks that have one: {', '.join(stacks)}" if stacks else ""
        raise ConfigError([Finding(path.name, "there is no such stack file", fix)]) from None
    except OSError as error:
        raise ConfigError([Finding(path.name, f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError:
        raise ConfigError([Finding(path.name, "is not text in UTF-8", "save it in that encoding")]) from None


def _load(path: Path, text: str) -> tuple[Any, list[Finding]]:
    """The document, and a finding for each key that is there twice (YAML's readers take one of them, or stop)."""
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True
    try:
        findings = list(_duplicates(yaml.compose(text), (), [0]))
        return yaml.load(text), findings
    except MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        tab = "'\\t'" in str(error.problem)
        fix = (
            "indent with spaces: YAML has no tabs" if tab else "brackets, colons and indentation, there or just before"
        )
        raise ConfigError([Finding(path.name, f"is not YAML: {hidden(str(error.problem))}{line}", fix)]) from None
    except (YAMLError, ValueError, TypeError) as error:
        fix = "mend it, or restore it from version control"
        problem = hidden(str(error).partition("\n")[0])
        raise ConfigError([Finding(path.name, f"is not YAML: {problem}", fix)]) from None
    except RecursionError:
        fix = "no alias (`*name`) inside of what it stands for, and few of them: write out what they stand for"
        raise ConfigError([Finding(path.name, "is nested too deeply", fix)]) from None


def _duplicates(node: Any, location: Location, seen: list[int]) -> Iterator[Finding]:
    seen[0] += 1
    if len(location) > MAX_DEPTH or seen[0] > MAX_VALUES:  # an alias that refers to itself, or aliases of aliases
        raise RecursionError
    if isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if name in lines:
                what = f"is there twice, in lines {lines[name]} and {line}"
                yield Finding(_where((*location, name)), what, "keep one of them")
            lines[name] = line
            yield from _duplicates(value, (*location, name), seen)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            yield from _duplicates(value, (*location, index), seen)


def _where(location: Location) -> str:
    """A path in the file as a path of the config."""
    first, *others = location[1:] if len(location) > 1 and location[0] == "config" else location
    return shown((str(first).removeprefix(f"{NAMESPACE}:"), *others))


def _ours(config: Mapping[Any, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """The keys of our namespace without it; findings for keys that were meant to be ours, or that anybody can read."""
    values: dict[str, Any] = {}
    findings: list[Finding] = []
    for key, value in config.items():
        namespace, colon, name = str(key).partition(":")
        if namespace == NAMESPACE and name:
            values[name] = decoded(value)
            continue
        namespace, name = shown((namespace,)), shown((name,))
        if not colon:
            findings.append(Finding(f"config.{namespace}", "has no namespace", f"write `{NAMESPACE}:{namespace}`"))
        elif nearest(namespace, [NAMESPACE]):
            findings.append(
                Finding(
                    f"config.{namespace}:{name}",
                    "is in no namespace that is known",
                    f"did you mean `{NAMESPACE}:{name}`?",
                )
            )
        elif key == REGION and not isinstance(value, str):
            findings.append(Finding(REGION, f"must be text, not {kind(value)}", f"a region: `{REGION}: us-east-1`"))
        else:
            findings += _readable(f"{namespace}:{name}", value)
    return values, findings


def _readable(key: str, value: Any) -> Iterator[Finding]:
    """A finding for each credential in a setting of another namespace that is not encrypted."""
    if known := secret(key, value):
        path = f"--path '{key}'" if "." in key else key
        yield Finding(key, known.problem, f"{REVOKED}; the new one: `pulumi config set --secret {path}`")
    elif isinstance(value, Mapping) and set(value) != {"secure"}:
        for name, item in value.items():
            yield from _readable(f"{key}.{shown((str(name),))}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _readable(f"{key}.{index}", item)
