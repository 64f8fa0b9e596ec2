"""What every part of the catalog is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from infra.findings import ConfigError, Finding

FOLDER = Path(__file__).parent
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""With libyaml the whole catalog is read in 15 ms, without it in 300."""

Month = Annotated[str, StringConstraints(pattern=r"^20\d\d-(0[1-9]|1[0-2])$")]
"""When a fact was looked up or measured, `2026-11`."""
Source = Annotated[str, StringConstraints(min_length=1)]
"""Where a fact is from, so that the next one who doubts it can look there."""


class Strict(BaseModel):
    """Base of the catalog's parts: immutable, no unknown keys, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Row = TypeVar("Row", bound=BaseModel)


def read(file: Path) -> Any:
    """A catalog file as plain values."""
    return yaml.load(file.read_text(encoding="utf-8"), Loader=LOADER)  # noqa: S506 - a safe loader


def parse(model: type[Row], value: Any) -> Row:
    """One row. By way of JSON, where a list is as good as a tuple, but text is no number.

    Raises:
        ValidationError: It is none.
    """
    return model.model_validate_json(json.dumps(value, default=str))


def rows(model: type[Row], file: Path, key: str) -> dict[str, Row]:
    """Every row of a file, under one key.

    Raises:
        ConfigError: It cannot be used. `fleet catalog check` finds everything that is wrong with it, this only says so.
    """
    try:
        return {name: parse(model, row) for name, row in read(file)[key].items()}
    except (OSError, yaml.YAMLError, ValidationError, LookupError, TypeError, AttributeError):
        raise ConfigError([Finding(file.name, "cannot be used", "`fleet catalog check` says what is wrong")]) from None
