"""What the rows of the catalog have to agree on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import get_args

from infra.catalog.gpus import Gpu
from infra.catalog.hosted import HostedPrice
from infra.catalog.instances import Instance
from infra.findings import Finding, did_you_mean, show
from infra.weights.lock import Format


def gpus(rows: Mapping[str, Gpu]) -> Iterator[Finding]:
    """Formats that models have, and kernels that the hardware has."""
    formats: tuple[str, ...] = get_args(Format)
    for name, gpu in rows.items():
        for format_, kernel in gpu.formats.items():
            where = f"gpus.yaml: {name}.formats.{format_}"
            if format_ not in formats:
                yield Finding(where, "is no format of models.lock.yaml", did_you_mean(format_, formats))
            elif format_ == "fp8" and (kernel == "native") != ("fp8" in gpu.flops):
                has = "has" if "fp8" in gpu.flops else "has no"
                yield Finding(where, f"is {kernel}, but the GPU {has} `flops: fp8`", "make the two agree")


def instances(rows: Mapping[str, Instance], known: Collection[str]) -> Iterator[Finding]:
    """GPUs of gpus.yaml (`known`; empty if it cannot be read), whole domains, prices and zones of the same regions."""
    for name, row in rows.items():
        where = f"aws-instances.yaml: {name}"
        if known and row.gpu not in known:
            yield Finding(f"{where}.gpu", f"{show(row.gpu)} is not in gpus.yaml", did_you_mean(row.gpu, known))
        if row.gpus % row.gpus_per_domain:
            problem = f"{row.gpus} GPUs are no multiple of {row.gpus_per_domain}"
            yield Finding(f"{where}.gpus_per_domain", problem, "how many share a CPU socket or NVSwitch?")
        for region in sorted(row.usd_per_hour.keys() - row.zones.keys()):
            fix = "its zones: `aws ec2 describe-instance-type-offerings --location-type availability-zone-id`"
            yield Finding(f"{where}.zones", f"has no {region}, where the type has a price", fix)
        for region in sorted(row.zones.keys() - row.usd_per_hour.keys() if "on-demand" in row.offers else ()):
            fix = f"`fleet prices refresh --region {region}`"
            yield Finding(f"{where}.usd_per_hour", f"has no {region}, where the type is offered on demand", fix)


def hosted(rows: Mapping[str, HostedPrice]) -> Iterator[Finding]:
    """Keys that say what the row says."""
    for name, row in rows.items():
        if name != f"{row.provider}/{row.model}":
            problem = f"is not the provider and model of its row, {row.provider}/{row.model}"
            yield Finding(f"hosted-prices.yaml: {name}", problem, "make the two agree")
