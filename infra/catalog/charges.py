"""What AWS charges beside machines."""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import PositiveFloat

from infra.catalog.strict import FOLDER, Month, Source, Strict, rows

CHARGES = FOLDER / "aws-charges.yaml"


class Charge(Strict):
    """One thing that is charged."""

    per: Literal["hour", "month", "GB-month", "GB", "NLCU-hour", "1,000 requests", "minute"]
    usd: dict[str, PositiveFloat]
    """By region."""
    what: str | None = None
    """In words; only of what is charged by use, which no plan counts."""
    source: Source
    date: Month


@cache
def charges() -> dict[str, Charge]:
    """Every charge by name."""
    return rows(Charge, CHARGES, "charges")
