"""What machines of AWS boot from and run: whole for who makes them, as digests for who compares plans."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal

from infra.aws_names import engine_machine
from infra.plan.charges import gib
from infra.render import node
from infra.render.user_data import NodeSettings, user_data

if TYPE_CHECKING:
    from infra.plan.model import AwsPlan, AwsTimings, FleetPlan, GroupPlan
    from infra.render.bundle import Bundle
    from infra.weights.lock import WeightsLock

Role = Literal["engine", "gateway", "monitor"]
LAUNCH, TERMINATE = "ready", "drain"
"""Names of the hooks."""
DIGITS = 12
"""Of a digest: enough to see that two differ."""


def told(plan: FleetPlan, role: Role, machine: str, group: str | None, bucket: str, **more: Any) -> NodeSettings:
    """What a machine is told when it boots.

    Args:
        plan: Of a stack on AWS.
        role: Of the machine.
        machine: What its parameter calls it.
        group: Name of its Auto Scaling group.
        bucket: The cache.
        more: Other settings.
    """
    aws, _ = _of_aws(plan)
    return NodeSettings(
        stack=plan.stack,
        role=role,
        machine=machine,
        region=plan.region or "",
        bucket=bucket,
        group=group,
        launch_hook=LAUNCH if group else None,
        terminate_hook=TERMINATE if group else None,
        baked=getattr(aws, f"{role}_image") is not None,
        **more,
    )


def fingerprint(plan: FleetPlan, lock: WeightsLock) -> dict[str, Any]:
    """What decides which machines an edit moves; empty for another target.

    Returns:
        `runs`: by machine the digest of its bundle, and of each engine in it; `boots`: by group, and for the monitor,
        the digest of what it is made from. The ids that AWS gives are not among it: they change with nothing of ours.
    """
    if plan.on_aws is None:
        return {}
    bundles = {"gateway": node.gateway_bundle(plan), "monitor": node.monitor_bundle(plan)}
    for pool in plan.pools:
        bundles[engine_machine(pool.name)] = node.engine_bundle(plan, pool, lock, node.CloudLayout())
    aws = plan.on_aws
    gateway = (aws.gateway.instance, gib(aws.gateway.volume_bytes))
    boots = {
        "gateway": _boots(plan, "gateway", "gateway", aws.gateway.group, gateway),
        "monitor": _boots(plan, "monitor", "monitor", None, ()),
    }
    runs = {name: {"bundle": it.digest[:DIGITS], "engines": _engines(it)} for name, it in bundles.items()}
    return {
        "runs": runs,
        "boots": boots | {group.name: _group(plan, group) for group in aws.groups},
    }


def _engines(bundle: Bundle) -> dict[str, str]:
    """What each engine runs: one whose files are as they were goes on while the rest of its bundle changes."""
    files = bundle.files
    return {
        program.name: _digest({path: files[path] for path in files if path.startswith(f"programs/{program.name}/")})
        for program in bundle.programs
        if program.engine
    }


def _group(plan: FleetPlan, group: GroupPlan) -> str:
    pool = next(pool for pool in plan.pools if pool.name == group.pool)
    market = (group.kind, group.reservation)
    made = (group.instances[0], gib(pool.volume_bytes), market)
    return _boots(plan, "engine", engine_machine(pool.name), group.name, made)


def _boots(
    plan: FleetPlan,
    role: Role,
    machine: str,
    group: str | None,
    made: tuple[Any, ...],
) -> str:
    """Of the launch template; of the monitor what replaces it: another size changes it where it is."""
    aws, _ = _of_aws(plan)
    text = user_data(told(plan, role, machine, group, ""))
    return _digest((text, getattr(aws, f"{role}_image"), *made))


def _of_aws(plan: FleetPlan) -> tuple[AwsPlan, AwsTimings]:
    if plan.on_aws is None or plan.aws is None:
        raise ValueError(f"the plan is for {plan.target}, not for aws")
    return plan.on_aws, plan.aws


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]
