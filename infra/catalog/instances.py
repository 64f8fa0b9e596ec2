"""Instance types of AWS that carry GPUs."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from infra.catalog.strict import FOLDER, Month, Source, Strict, rows

INSTANCES = FOLDER / "aws-instances.yaml"
Offer = Literal["reservation", "capacity-block", "on-demand", "spot"]


class Instance(Strict):
    """One instance type."""

    gpu: str
    gpus: PositiveInt
    vcpus: PositiveInt
    memory_bytes: PositiveInt
    nvme_bytes: Annotated[int, Field(ge=0)]
    """Local disks together."""
    network_gbit_s: PositiveFloat
    """What it has always: bursts are not counted."""
    efa: bool
    gpus_per_domain: PositiveInt
    """GPUs that reach each other without crossing between CPU sockets: a tensor-parallel group never leaves one."""
    offers: Annotated[tuple[Offer, ...], Field(min_length=1)]
    """Ways to get one, where it is offered at all."""
    usd_per_hour: dict[str, PositiveFloat]
    """By region: on demand, Linux, shared tenancy. A region that is missing does not sell the type so."""
    zones: dict[str, tuple[str, ...]]
    """Where it is offered, by region. Ids (`use1-az6`), not names: `us-east-1a` is another zone in every account."""
    source: Source
    """Of the specification, and after `prices: ` of the prices, which `fleet prices refresh` renews."""
    date: Month
    """Of the prices."""


@cache
def instances() -> dict[str, Instance]:
    """Every instance type by name."""
    return rows(Instance, INSTANCES, "instances")
