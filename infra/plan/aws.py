"""What a fleet on AWS is made of beside its pools: network, groups of machines, load balancer. Pure."""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from infra.plan.model import AwsPlan, BalancerPlan, GroupPlan, HostsPlan, NetworkPlan, ZonePlan
from infra.plan.timings import min_healthy_percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infra.catalog import Instance
    from infra.catalog.services import Service
    from infra.config import StackConfig
    from infra.config.pools import RungKind
    from infra.plan.ledger import Ledger
    from infra.plan.model import GatewayPlan, PoolPlan, RungPlan

PARTS = 16
"""Of the VPC's network. Part 0 has the public subnets; a zone has the part of its own number."""
FIRST_ENGINE_PORT = 8000
"""The engine in slot n of a node listens on this one and n."""
EXPORTER_PORTS = (9100, 9400)
"""Of a node's own metrics and of its GPUs': where their exporters listen by default."""
INTERFACES = (
    *("ssm", "ssmmessages", "ec2messages", "secretsmanager", "kms"),
    *("autoscaling", "servicediscovery", "elasticloadbalancing", "ec2", "logs"),
)
"""Services that machines ask, and that have an interface endpoint in each zone where one is wanted."""
TLS_PORT, PLAIN_PORT = 443, 80
HEALTH_PATH = "/lb-health"
"""What HAProxy answers to a load balancer (nodeconfig/gateway): 200 while some engine is ready."""
GB = 10**9
FRONT_ZONES = 2
HOST_VOLUME_BYTES = 20 * GB
"""Of a gateway's or the monitor's root volume: the system takes 2 GB, logs are rotated."""
METRICS_VOLUME_BYTES = 50 * GB
"""A week of samples of some hundred machines: 5,000 series each, every 5 s, 1.5 bytes a sample are 0.9 GB a machine for
the largest, and most have a tenth."""


def plan_aws(  # noqa: PLR0913 - everything that it depends on
    stack: str,
    config: StackConfig,
    pools: Sequence[PoolPlan],
    gateway: GatewayPlan,
    *,
    region: str,
    hosts: int,
    instances: Mapping[str, Instance],
    services: Mapping[str, Service],
    ledger: Ledger,
) -> AwsPlan:
    """Everything that AWS needs to be told.

    Args:
        stack: Name of the stack.
        config: What the user wants.
        pools: The pools as they were placed; none if they cannot be.
        gateway: The gateway.
        region: Of AWS.
        hosts: Gateways.
        instances: The catalog.
        services: The catalog of machines without GPUs.
        ledger: Gets what is refused or remarkable.
    """
    front = front_zones(services, instances, region)
    zones = sorted({*front, *(zone for pool in pools for zone in pool.zones)})
    network = plan_network(config, zones)
    for zone in network.zones:
        ledger.because(f"aws.network.{zone.zone}", zone.private, "the part of its number: no other zone moves it")
    for pool in pools:
        _check_rungs(pool, ledger)
    return AwsPlan(
        network=network,
        groups=tuple(group for pool in pools for group in pool_groups(stack, pool)),
        gateway=_gateways(stack, hosts, front, services),
        monitor=HostsPlan(
            group=None,
            instance=_host("monitor", services),
            hosts=1,
            most=1,
            zones=front[:1],
            min_healthy_percent=0,
            max_healthy_percent=100,
            volume_bytes=HOST_VOLUME_BYTES,
            data_bytes=METRICS_VOLUME_BYTES,
        ),
        balancer=_balancer(config, gateway),
        engine_ports=(FIRST_ENGINE_PORT, FIRST_ENGINE_PORT + max((len(pool.slots) for pool in pools), default=1) - 1),
        engine_image=config.aws.images.engine,
        gateway_image=config.aws.images.gateway,
        monitor_image=config.aws.images.monitor,
        bake=config.aws.images.bake,
        rollout=config.aws.rollout,
        permissions_boundary=config.aws.permissions_boundary,
        hub_token_arn=config.aws.hub_token_arn,
        tags=tuple(sorted(config.aws.tags.items())),
        protect=config.aws.protect,
    )


# Network


def front_zones(services: Mapping[str, Service], instances: Mapping[str, Instance], region: str) -> tuple[str, ...]:
    """Where the gateways, the load balancer and the monitor are, by id: the same whatever pools there are.

    A load balancer that leaves a zone is replaced, and clients know it by its name.
    """
    named = next((row.zones[region] for row in services.values() if row.use == "gateway" and region in row.zones), ())
    every = sorted({zone for row in instances.values() for zone in row.zones.get(region, ())})
    return named or tuple(every[:FRONT_ZONES])


def plan_network(config: StackConfig, zones: Sequence[str]) -> NetworkPlan:
    """The network that is made, or the one that is there already."""
    wanted = config.aws.network
    if wanted.vpc is not None:
        return NetworkPlan(
            vpc=wanted.vpc,
            subnets=tuple(wanted.subnets or ()),
            cidr=None,
            zones=(),
            internet="none",
            interface_endpoints=wanted.interface_endpoints,
            flow_logs=False,
        )
    return NetworkPlan(
        vpc=None,
        subnets=(),
        cidr=wanted.cidr,
        zones=tuple(zone_plan(wanted.cidr, zone) for zone in zones),
        internet=wanted.internet,
        interface_endpoints=wanted.interface_endpoints,
        flow_logs=wanted.flow_logs,
    )


def zone_plan(cidr: str, zone: str) -> ZonePlan:
    """The subnets of one zone: they depend on the network and on the zone's own number, and on nothing else.

    The private one is the sixteenth of the network with the zone's number; the public one is the sixteenth with that
    number of the first sixteenth, which no zone has, as their numbers begin with 1.

    Args:
        cidr: Of the VPC.
        zone: Its id, such as `use1-az4`.

    Raises:
        ValueError: It is no id of an availability zone.
    """
    found = re.fullmatch(r"[a-z0-9]+-az(\d+)", zone)
    number = int(found[1]) if found else 0
    if not 0 < number < PARTS:
        raise ValueError(f"{zone} is not the id of an availability zone, such as use1-az1")
    parts = list(ipaddress.IPv4Network(cidr).subnets(prefixlen_diff=int(math.log2(PARTS))))
    publics = list(parts[0].subnets(prefixlen_diff=int(math.log2(PARTS))))
    return ZonePlan(zone=zone, private=str(parts[number]), public=str(publics[number]))


# Machines


def pool_groups(stack: str, pool: PoolPlan) -> list[GroupPlan]:
    """One group of machines for each rung of a pool's ladder.

    The first wants all nodes; AWS goes on trying where it lacks capacity. The others may have as many, and want none:
    what the ones before them cannot get, a program on the gateways (fleet_agent/ladder.py) asks of them, and gives it
    back when the first ones have it.
    """
    kinds = Counter(rung.kind for rung in pool.rungs)
    return [
        GroupPlan(
            name=f"fleet-{stack}-engine-{pool.name}-{_rung_name(rung, index, kinds)}",
            pool=pool.name,
            rung=index,
            kind=rung.kind,
            reservation=rung.id,
            instances=rung.instances,
            zones=rung.zones,
            minimum=pool.nodes if index == 0 and pool.schedule is None else 0,
            maximum=pool.nodes,
            min_healthy_percent=min_healthy_percent(pool.nodes),
            max_usd_per_hour=round(rung.usd_per_hour, 4) if rung.kind == "spot" else None,
        )
        for index, rung in enumerate(pool.rungs)
    ]


def _rung_name(rung: RungPlan, index: int, kinds: Counter[RungKind]) -> str:
    return rung.kind if kinds[rung.kind] == 1 else f"{rung.kind}-{index}"


def _check_rungs(pool: PoolPlan, ledger: Ledger) -> None:
    for index, rung in enumerate(pool.rungs):
        if rung.kind == "capacity-block" and rung.id is None:
            fix = "`{capacity-block: cr-…}` with the id that `aws ec2 describe-capacity-reservations` shows"
            ledger.note(f"pools.{pool.name}.capacity.{index}", f"cannot be deployed without the id of the block: {fix}")


def _gateways(stack: str, hosts: int, zones: Sequence[str], services: Mapping[str, Service]) -> HostsPlan:
    """Gateways are cheap: a new one serves before an old one goes."""
    return HostsPlan(
        group=f"fleet-{stack}-gateway-0",
        instance=_host("gateway", services),
        hosts=hosts,
        most=hosts + 1,
        zones=tuple(zones),
        min_healthy_percent=100,
        max_healthy_percent=100 + math.ceil(100 / hosts),
        volume_bytes=HOST_VOLUME_BYTES,
        data_bytes=0,
    )


def _host(use: str, services: Mapping[str, Service]) -> str:
    return next(name for name, row in services.items() if row.use == use)


def _balancer(config: StackConfig, gateway: GatewayPlan) -> BalancerPlan:
    aws, hostname = config.aws, config.gateway.hostname
    passed_on = gateway.tls is not None
    issued = aws.certificate is None and not passed_on and aws.hosted_zone is not None and hostname is not None
    encrypted = passed_on or issued or aws.certificate is not None
    return BalancerPlan(
        public=aws.endpoint == "public",
        clients=tuple(aws.clients or ()),
        port=TLS_PORT if encrypted else PLAIN_PORT,
        tls="gateway" if passed_on else "balancer" if encrypted else None,
        certificate=aws.certificate,
        hostname=hostname,
        hosted_zone=aws.hosted_zone,
        health_path=HEALTH_PATH,
    )
