"""The lock as text: what is not the entry stays as it is, to the character."""

from __future__ import annotations

import pytest
import yaml

from infra.weights.text import parse, with_entry

ENTRY = {
    "source": "s3://models/tiny",
    "facts": {"layers": 2, "experts": {"count": 8, "active": 2}},
    "files": {"a.json": {"size": 1, "sha256": "0" * 64}, "b.json": {"size": 2, "sha256": "1e5"}},
}
WRITTEN = """\
    source: s3://models/tiny
    facts: {layers: 2, experts: {count: 8, active: 2}}
    files:
      a.json: {size: 1, sha256: '0000000000000000000000000000000000000000000000000000000000000000'}
      b.json: {size: 2, sha256: 1e5}
"""
LOCK = """\
# Top.
models:
  first:
    a: 1   # of a

  # Of the second.

  second:
    # Inside.
    b:
      c: 2
      # Deep.
      d: [3,
          4]
  # Of the third.
  third: {e: 5}
# Bottom.
"""


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("first", "# Top.\nmodels:\n  first:\n", "\n  # Of the second.\n\n  second:\n    # Inside."),
        ("second", "\n  second:\n    # Inside.\n      # Deep.\n", "  # Of the third.\n  third: {e: 5}\n# Bottom.\n"),
        ("third", "          4]\n  # Of the third.\n  third:\n", "# Bottom.\n"),
        ("fourth", "  third: {e: 5}\n# Bottom.\n\n  fourth:\n", ""),
    ],
)
def test_one_entry_is_written_and_the_rest_stays(name: str, before: str, after: str) -> None:
    text = with_entry(LOCK, name, ENTRY)
    assert before + WRITTEN + after in text
    assert parse(text)["models"] == parse(LOCK)["models"] | {name: ENTRY}
    assert with_entry(text, name, ENTRY) == text


def test_other_indentation() -> None:
    text = with_entry("models:\n    first:\n        a: 1\n", "second", {"b": 2})
    assert text == "models:\n    first:\n        a: 1\n\n    second:\n        b: 2\n"


def test_a_lock_in_flow_style_is_not_touched() -> None:
    with pytest.raises(ValueError, match="one below the other"):
        with_entry("models: {first: {a: 1}}", "second", ENTRY)


def test_a_key_that_is_there_twice() -> None:
    with pytest.raises(yaml.YAMLError, match="'a' is there twice"):
        parse("models:\n  a: {}\n  a: {}\n")
