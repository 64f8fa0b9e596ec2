"""Quotas of AWS that a fleet can meet."""

from __future__ import annotations

import re
from functools import cache

from pydantic import NonNegativeInt

from infra.catalog.strict import FOLDER, Month, Source, Strict, rows

QUOTAS = FOLDER / "aws-quotas.yaml"
_FAMILY = re.compile(r"([a-z]+)(\d+)")


class Quota(Strict):
    """One quota of an account in a region."""

    service: str
    """Its code in Service Quotas."""
    code: str
    name: str
    unit: str
    families: tuple[str, ...]
    """What instance types begin with that count against it; empty: it counts no machines."""
    default: NonNegativeInt
    """Of a new account."""
    source: Source
    date: Month

    def counts(self, instance: str) -> bool:
        """Whether machines of a type count against it."""
        found = _FAMILY.match(instance)
        return found is not None and any(it in self.families for it in (found[1], found[0]))


@cache
def quotas() -> dict[str, Quota]:
    """Every quota by the name that the plan counts by."""
    return rows(Quota, QUOTAS, "quotas")
