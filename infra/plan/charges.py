"""What a fleet on AWS is charged for beside machines, all the time and by use. Pure.

Counts are of what infra/targets/aws declares; tests/program/test_aws_cost.py compares the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.plan.aws import INTERFACES
from infra.plan.cost import Charged
from infra.plan.money import HOURS_PER_MONTH, usd

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from infra.catalog.charges import Charge
    from infra.plan.model import AwsPlan, PoolPlan

GIB = 1 << 30
"""What AWS calls a GB where it charges for storage."""
HOURS = {"hour": 1, "month": HOURS_PER_MONTH, "GB-month": HOURS_PER_MONTH}
"""Of the units of what is there all the time."""
BALANCER, NETWORK, DISKS, CACHE, NAMES = (
    "load balancer",
    "NAT and endpoints",
    "all disks",
    "model cache",
    "names and keys",
)
"""Lines of the table of costs. No pool has such a name."""


@dataclass(frozen=True)
class Part:
    """Something that is charged all the time."""

    line: str
    """Of the table."""
    charge: str
    """Key of the catalog."""
    count: float
    """In the charge's unit."""
    one: str
    """What one is called."""
    many: str = ""
    """What several are called, where that is not `one` itself."""

    @property
    def words(self) -> str:
        """How many of what."""
        return f"{self.count:,.0f} {self.one if self.count == 1 or not self.many else self.many}"


def parts(aws: AwsPlan, pools: Sequence[PoolPlan], weights: Iterable[int]) -> tuple[Part, ...]:
    """Everything that is charged all the time.

    Args:
        aws: The fleet.
        pools: Its nodes.
        weights: Bytes of each entry that the model cache has.
    """
    return tuple(part for part in _parts(aws, pools, weights) if part.count)


def _parts(aws: AwsPlan, pools: Sequence[PoolPlan], weights: Iterable[int]) -> Iterator[Part]:
    network, engines = aws.network, sum(count for pool in pools for _, count in pool.engines)
    public, fronts = aws.balancer.public, len(aws.gateway.zones) if network.vpc is None else len(network.subnets)
    nats = int(network.vpc is None and network.internet == "nat")
    endpoints = len(INTERFACES) * fronts if network.interface_endpoints else 0
    yield Part(BALANCER, "network-load-balancer", 1, f"{'public' if public else 'internal'} balancer")
    yield Part(BALANCER, "public-ipv4", fronts if public else 0, "address", "addresses")
    yield Part(NETWORK, "nat-gateway", nats, "NAT gateway", "NAT gateways")
    yield Part(NETWORK, "public-ipv4", nats, "address", "addresses")
    yield Part(NETWORK, "interface-endpoint", endpoints, "interface endpoint", "interface endpoints")
    yield Part(DISKS, "gp3", sum(count * gib(size) for count, size in volumes(aws, pools)), "GB")
    yield Part(CACHE, "s3-standard", sum(weights) / GIB, "GB in S3")
    yield Part(NAMES, "hosted-zone", 1, "zone")
    yield Part(NAMES, "registered-engine", engines, "engine registered", "engines registered")
    yield Part(NAMES, "kms-key", 1, "key")
    yield Part(NAMES, "secret", 1, "secret")


def volumes(aws: AwsPlan, pools: Sequence[PoolPlan]) -> Iterator[tuple[int, int]]:
    """How many volumes of how many bytes: root volumes of all machines, and the monitor's metrics."""
    yield from ((pool.nodes, pool.volume_bytes) for pool in pools)
    for it in (aws.gateway, aws.monitor):
        yield it.hosts, it.volume_bytes
        yield it.hosts, it.data_bytes


def gib(size: int) -> int:
    """Bytes as whole GiB, rounded up: in which volumes are made."""
    return math.ceil(size / GIB)


def charged(
    found: Iterable[Part], region: str, catalog: Mapping[str, Charge]
) -> tuple[tuple[Charged, ...], tuple[str, ...]]:
    """What it costs, by line of the table; and what has no price in this region."""
    lines: dict[str, list[Part]] = {}
    unknown = []
    for part in found:
        if region in catalog[part.charge].usd:
            lines.setdefault(part.line, []).append(part)
        else:
            unknown.append(f"{part.words} ({part.line})")

    def an_hour(part: Part) -> float:
        row = catalog[part.charge]
        return part.count * row.usd[region] / HOURS[row.per]

    return tuple(
        Charged(
            name=line,
            what=", ".join(part.words for part in members),
            usd_per_hour=sum(an_hour(part) for part in members),
            price=f"{region}, {min(catalog[part.charge].date for part in members)}",
        )
        for line, members in lines.items()
    ), tuple(unknown)


def by_use(aws: AwsPlan, region: str, catalog: Mapping[str, Charge]) -> tuple[str, ...]:
    """What is charged by use: in words, with its price where there is one."""
    network = aws.network
    there = {
        "internet-out": aws.balancer.public,
        "between-zones": max(len(network.zones), len(network.subnets)) > 1,
        "nat-data": network.vpc is None and network.internet == "nat",
        "endpoint-data": network.interface_endpoints,
    }

    def price(row: Charge) -> str:
        return f"{usd(row.usd[region])}/{row.per}" if region in row.usd else "price not known here"

    return tuple(f"{row.what} ({price(row)})" for name, row in catalog.items() if row.what and there.get(name, True))
