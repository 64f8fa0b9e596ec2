"""Engine nodes: for each pool a role, and for each rung of its ladder a launch template and a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.aws_names import engine_machine
from infra.findings import ConfigError, Finding
from infra.plan.model import GroupPlan, PoolPlan, SchedulePlan
from infra.render.machines import told
from infra.render.user_data import NodeSettings, user_data
from infra.targets.aws import machines
from infra.targets.aws.machines import Look
from infra.targets.aws.network import Place
from infra.targets.aws.site import Part, Site

USER_DATA_LIMIT = 16_384
"""Bytes, before they are encoded (EC2 guide, 2026-11)."""
LONGEST_BUCKET = 63
UNCHANGED = -1
"""Of a limit, in a scheduled action."""


def machine_name(pool: str) -> str:
    """What its parameter calls an engine node of a pool."""
    return engine_machine(pool)


def settings(site: Site, role: Any, machine: str, group: str | None, bucket: str, **more: Any) -> NodeSettings:
    """What a machine is told when it boots."""
    return told(site.plan, role, machine, group, bucket, **more)


def check_user_data(site: Site) -> None:
    """See that every pool's user data is small enough, whatever AWS will call its bucket and its services.

    Raises:
        ConfigError: It is not.
    """
    too_large = []
    for group in site.aws.groups:
        size = len(
            user_data(settings(site, "engine", machine_name(group.pool), group.name, "x" * LONGEST_BUCKET)).encode()
        )
        if size > USER_DATA_LIMIT:
            fix = "a shorter name of the stack or the pool"
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
        bucket: pulumi.Output[str],
        after: Sequence[pulumi.Resource],
    ) -> None:
        super().__init__("Pool", pool.name)
        self._site, self._place, self._look, self._pool = site, place, look, pool
        for group in site.aws.groups:
            if group.pool == pool.name:
                self._group(group, bucket, after)
        self.register_outputs({})

    def _group(
        self, group: GroupPlan, bucket: pulumi.Output[str], after: Sequence[pulumi.Resource]
    ) -> aws.autoscaling.Group:
        site, pool = self._site, self._pool
        machine, timings = machine_name(pool.name), site.timings
        name = group.name.removeprefix(f"fleet-{site.stack}-")
        launch = machines.template(
            name,
            site,
            self._look,
            bucket.apply(lambda it: settings(site, "engine", machine, group.name, it)),
            group.instances[0],
            self.within(),
            site.tags("engine", pool.name),
            **_market(group),
        )
        wanted = machines.hooks(timings.launch_hook_s, timings.drain_hook_s)
        scheduled = pool.schedule if group.rung == 0 else None
        made: aws.autoscaling.Group = aws.autoscaling.Group(
            name,
            name=group.name,
            min_size=group.minimum,
            max_size=group.maximum,
            # How many it wants follows from its limits, or from the hours: later rungs are moved by the ladder.
            desired_capacity=group.maximum if scheduled else None,
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
                ignore_changes=["initialLifecycleHooks", *(["desiredCapacity"] if scheduled else [])],
            ),
            **_launched(group, launch),
        )
        if scheduled:
            self._hours(name, scheduled, group, made)
        machines.keep_hooks(name, made, wanted, self)
        return made

    def _hours(self, name: str, hours: SchedulePlan, group: GroupPlan, made: aws.autoscaling.Group) -> None:
        """The group wants all its nodes from a time on, and none from another on; they drain as whenever they go."""
        for which, time, nodes in (("start", hours.start, group.maximum), ("end", hours.end, 0)):
            aws.autoscaling.Schedule(
                f"{name}-{which}",
                scheduled_action_name=which,
                autoscaling_group_name=made.name,
                recurrence=hours.cron(time),
                time_zone=hours.time_zone,
                desired_capacity=nodes,
                min_size=UNCHANGED,
                max_size=UNCHANGED,
                opts=self.within(),
            )


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
