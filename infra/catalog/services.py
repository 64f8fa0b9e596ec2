"""What a fleet on AWS rents beside its GPUs."""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import Field, PositiveFloat

from infra.catalog.strict import FOLDER, Month, Source, Strict, read

SERVICES = FOLDER / "aws-services.yaml"


class Service(Strict):
    """One instance type without GPUs."""

    use: Literal["gateway", "monitor"]
    usd_per_hour: dict[str, PositiveFloat]
    """By region: on demand, Linux, shared tenancy."""
    zones: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By region: of gateways, those in which they are, by id."""
    source: Source
    date: Month


@cache
def services() -> dict[str, Service]:
    """Every such instance type by name."""
    return {name: Service.model_validate(row, strict=False) for name, row in read(SERVICES)["services"].items()}
