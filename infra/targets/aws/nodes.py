"""Engine nodes: for each pool a role, and for each rung of its ladder a launch template and a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.findings import ConfigError, Finding
from infra.plan.model import GroupPlan, PoolPlan
from infra.render.user_data import NodeSettings, user_data
from infra.targets.aws import machines
from infra.targets.aws.discovery import Discovery
from infra.targets.aws.machines import Look
from infra.targets.aws.network import Place
from infra.targets.aws.site import Part, Site

USER_DATA_LIMIT = 16_384
"""Bytes, before they are encoded (EC2 guide, 2026-11)."""
LONGEST_BUCKET = 63
HEARTBEAT_S = 120
"""What machines take the hooks' time-outs for: they say that they live in time for the shortest there is."""
LIMITS_S = (600, 1800, 3600, 7200)
SERVICE_ID = 20
"""Characters of the id of a service of Cloud Map (`srv-` and 16 or 17), rounded up."""


def machine_name(pool: str) -> str:
    """What its parameter calls an engine node of a pool."""
    return f"engine-{pool}"


def coarse(seconds: int) -> int:
    """The next longer of few limits.

    What a machine is told when it boots cannot be changed without another machine, and what it is derived from changes
    with every model. It is for machines that hang: the others are done sooner.
    """
    return next((limit for limit in LIMITS_S if limit >= seconds), LIMITS_S[-1])


def settings(  # noqa: PLR0913, PLR0917 - what it is made of
    site: Site, role: Any, machine: str, group: str | None, bucket: str, services: dict[str, str], **more: Any
) -> NodeSettings:
    """What a machine is told when it boots."""
    timings, engine = site.timings, role == "engine"
    return NodeSettings(
        stack=site.stack,
        role=role,
        machine=machine,
        region=site.region,
        bucket=bucket,
        group=group,
        launch_hook=machines.LAUNCH if group else None,
        terminate_hook=machines.TERMINATE if group else None,
        launch_heartbeat_s=HEARTBEAT_S,
        terminate_heartbeat_s=HEARTBEAT_S,
        boot_limit_s=coarse(timings.launch_hook_s),
        metadata_poll_s=timings.metadata_poll_s,
        spot_drain_s=timings.spot_drain_s,
        drain_s=coarse(site.plan.timings.drain_s if engine else site.plan.timings.gateway_stop_s),
        services=services,
        baked=getattr(site.aws, f"{role}_image") is not None,
        **more,
    )


def check_user_data(site: Site) -> None:
    """See that every pool's user data is small enough, whatever AWS will call its bucket and its services.

    Raises:
        ConfigError: It is not.
    """
    too_large = []
    for group in site.aws.groups:
        models = {slot.model: "x" * SERVICE_ID for slot in pool_of(site, group.pool).slots}
        told = settings(site, "engine", machine_name(group.pool), group.name, "x" * LONGEST_BUCKET, models)
        size = len(user_data(told).encode())
        if size > USER_DATA_LIMIT:
            fix = "fewer models in this pool: each has a line in it"
            problem = f"the user data of its nodes has {size} bytes, and EC2 takes {USER_DATA_LIMIT}"
            too_large.append(Finding(f"pools.{group.pool}", problem, fix))
    if too_large:
        raise ConfigError(too_large)


def check_blocks(site: Site) -> None:
    """See that every capacity block is named.

    Raises:
        ConfigError: One is not.
    """
    unnamed = [group for group in site.aws.groups if group.kind == "capacity-block" and group.reservation is None]
    if unnamed:
        fix = "`{capacity-block: cr-…}` with the id that `aws ec2 describe-capacity-reservations` shows"
        raise ConfigError(
            [Finding(f"pools.{it.pool}.capacity.{it.rung}", "does not say which block", fix) for it in unnamed]
        )


def pool_of(site: Site, name: str) -> PoolPlan:
    """The pool with this name."""
    return next(pool for pool in site.plan.pools if pool.name == name)


class Pool(Part):
    """One pool's groups."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it is made of
        self,
        pool: PoolPlan,
        site: Site,
        place: Place,
        look: Look,
        discovery: Discovery,
        bucket: pulumi.Output[str],
        after: Sequence[pulumi.Resource],
    ) -> None:
        super().__init__("Pool", pool.name)
        self._site, self._place, self._look, self._pool = site, place, look, pool
        models = sorted({slot.model for slot in pool.slots})
        services = discovery.ids(models)
        self.groups = [
            self._group(group, pulumi.Output.all(bucket=bucket, services=services), after)
            for group in site.aws.groups
            if group.pool == pool.name
        ]
        self.register_outputs({})

    def _group(
        self, group: GroupPlan, given: pulumi.Output[Any], after: Sequence[pulumi.Resource]
    ) -> aws.autoscaling.Group:
        site, pool = self._site, self._pool
        machine, timings = machine_name(pool.name), site.timings
        name = group.name.removeprefix(f"fleet-{site.stack}-")
        launch = machines.template(
            name,
            site,
            self._look,
            given.apply(lambda it: settings(site, "engine", machine, group.name, it["bucket"], it["services"])),
            group.instances[0],
            self.within(),
            site.tags("engine", pool.name),
            **_market(group),
        )
        wanted = machines.hooks(timings.launch_hook_s, timings.drain_hook_s)
        made: aws.autoscaling.Group = aws.autoscaling.Group(
            name,
            name=group.name,
            min_size=group.minimum,
            max_size=group.maximum,
            # How many it wants follows from its limits: the rungs after the first are moved by the ladder.
            vpc_zone_identifiers=self._place.subnets(group.zones),
            health_check_type="EC2",
            health_check_grace_period=timings.health_grace_s,
            default_instance_warmup=timings.instance_warmup_s,
            # A machine that finds no capacity is reported by the group, and goes on being asked for.
            wait_for_capacity_timeout="0",
            # Who destroys a group does not wait for drains: what runs has the time that EC2 gives a machine to stop.
            force_delete=True,
            initial_lifecycle_hooks=wanted,
            instance_maintenance_policy=machines.healthy(group.min_healthy_percent, 100),
            instance_refresh=machines.refresh(group.min_healthy_percent, 100, timings.instance_warmup_s),
            tags=machines.group_tags(site.named("engine", pool.name, machine=machine)),
            opts=self.within(
                depends_on=list(after),
                ignore_changes=["initialLifecycleHooks"],
            ),
            **_launched(group, launch),
        )
        machines.keep_hooks(name, made, wanted, self)
        return made


def _market(group: GroupPlan) -> dict[str, Any]:
    """Where a template's instances come from. Spot is the group's affair: it may choose among types and zones."""
    if group.kind not in {"reservation", "capacity-block"}:
        return {}
    market: dict[str, Any] = {
        "capacity_reservation_specification": {
            "capacity_reservation_target": {"capacity_reservation_id": group.reservation}
        }
    }
    if group.kind == "capacity-block":
        market["instance_market_options"] = {"market_type": "capacity-block"}
    return market


def _launched(group: GroupPlan, launch: aws.ec2.LaunchTemplate) -> dict[str, Any]:
    """How a group starts instances: with the version that the template has now, so that it can go back to the last."""
    version = launch.latest_version.apply(str)
    if group.kind != "spot":
        return {"launch_template": {"id": launch.id, "version": version}}
    distribution: dict[str, Any] = {
        "on_demand_base_capacity": 0,
        "on_demand_percentage_above_base_capacity": 0,
        "spot_allocation_strategy": "price-capacity-optimized",
    }
    if group.max_usd_per_hour is not None:
        distribution["spot_max_price"] = f"{group.max_usd_per_hour:g}"
    return {
        "capacity_rebalance": True,
        "mixed_instances_policy": {
            "instances_distribution": distribution,
            "launch_template": {
                "launch_template_specification": {"launch_template_id": launch.id, "version": version},
                "overrides": [{"instance_type": name} for name in group.instances],
            },
        },
    }
