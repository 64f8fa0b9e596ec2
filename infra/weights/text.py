"""The lock as text: read fast, as every command reads it; written entry by entry, so that the rest stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    Loader = yaml.SafeLoader
else:
    Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    """libyaml, ten times as fast, where the package was built with it."""

WIDTH = 96
"""Columns after which a line of facts is broken at the next key."""


class _StrictLoader(Loader):
    """A key that is there twice is an error, as YAML says."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Flow(dict[str, Any]):
    """A mapping that is written on one line, `{…}`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Flow, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=True)
)


def parse(text: str) -> Any:
    """What a YAML text says.

    Raises:
        YAMLError: it is none, or a key is in it twice.
    """
    return yaml.load(text, _StrictLoader)  # noqa: S506 - it is a SafeLoader


def with_entry(text: str, name: str, entry: Mapping[str, Any]) -> str:
    """The lock's text with an entry in the place of the one of that name, or behind the last one.

    Comments on lines of their own inside the entry stay and go to its top; every line outside it stays as it is.

    Args:
        text: A lock in block style: `models:` and below it the entries.
        name: Of the entry.
        entry: Its keys and values.

    Raises:
        ValueError: the entries are not written one below the other.
    """
    root: Any = yaml.compose(text, Loader)
    models = next(value for key, value in root.value if key.value == "models")
    if models.flow_style and models.value:
        raise ValueError("its entries are not written one below the other")
    lines = text.splitlines()
    keys = [key for key, _ in models.value]
    indent = keys[0].start_mark.column if keys else 2
    starts = [key.start_mark.line for key in keys]
    written = [f"{' ' * indent}{name}:", *_body(entry, 2 * indent)]
    found = next((at for at, key in enumerate(keys) if key.value == name), None)
    if found is None:
        if not keys:
            lines[models.start_mark.line] = "models:"
        return "\n".join([*lines, *([""] if keys else []), *written, ""])
    start, end = starts[found], [*starts, len(lines)][found + 1]
    while _outside(lines[end - 1], indent):
        end -= 1
    comments = [line for line in lines[start + 1 : end] if line.lstrip().startswith("#")]
    return "\n".join([*lines[:start], written[0], *comments, *written[1:], *lines[end:], ""])


def _outside(line: str, indent: int) -> bool:
    """An empty line, or a comment that belongs to what follows."""
    bare = line.lstrip()
    return not bare or (bare.startswith("#") and len(line) - len(bare) <= indent)


def _body(entry: Mapping[str, Any], indent: int) -> list[str]:
    """The lines of an entry; of mappings only that of the files has a line for each key."""
    value = {key: _Flow(part) if isinstance(part, Mapping) else part for key, part in entry.items()}
    if "files" in entry:
        value["files"] = {path: _Flow(fact) for path, fact in entry["files"].items()}
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
    return [" " * indent + line for line in text.splitlines()]
