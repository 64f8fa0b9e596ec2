"""Findings: what is wrong with something a user wrote, where, and what to do. Always all of them at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST_SHOWN = 40
MOST_LISTED = 16


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    path: str
    """Where: `stacks/models.lock.yaml: models.chat.files` or a key of the stack config."""
    problem: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" + (f"\n    {self.fix}" if self.fix else "")


class ConfigError(Exception):
    """Everything that is wrong, in one exception."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(str(finding) for finding in self.findings))


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Each finding once, sorted by path."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda finding: (finding.path, finding.problem)))


def kind(value: Any) -> str:
    """What a YAML value is, in words."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "a list"
    names = {str: "text", int: "a number", float: "a number", type(None): "nothing"}
    return "a mapping" if isinstance(value, Mapping) else names.get(type(value), f"a {type(value).__name__}")


def show(value: Any) -> str:
    """A value as the user wrote it, on one line and short."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = value if value.isprintable() else value.encode("unicode_escape").decode()
        return f"`{text[:LONGEST_SHOWN]}…`" if len(text) > LONGEST_SHOWN else f"`{text}`"
    short_number = isinstance(value, int | float) and abs(value) < 10**15
    return str(value) if short_number else kind(value)


def nearest(word: str, words: Iterable[str], *, least: float = 0.6) -> str | None:
    """The one of the words that was probably meant, if any. Hyphens, underscores and capitals make no difference.

    Args:
        word: What was written.
        words: What could have been.
        least: How like they must be, from 0 to 1 (difflib's ratio).
    """
    like = {other.lower().replace("_", "-"): other for other in words}
    near = difflib.get_close_matches(word.lower().replace("_", "-"), like, n=1, cutoff=least)
    return like[near[0]] if near else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The fix for a word that is not one of those."""
    words = list(words)
    if near := nearest(word, words):
        return f"did you mean `{near}`?"
    more = f" … {len(words) - MOST_LISTED} more" if len(words) > MOST_LISTED else ""
    return f"one of: {', '.join(words[:MOST_LISTED])}{more}"
