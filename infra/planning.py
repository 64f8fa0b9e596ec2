"""Everything that a plan is made from, read where it is: the pure planner gets it handed in."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from infra import benchmarks
from infra.catalog import gpus, vllm_cpu
from infra.keys import for_plan
from infra.plan import make_plan
from infra.plan.delta import delta
from infra.stack_file import load_stack_file, stack_file

if TYPE_CHECKING:
    from infra.config import ApiKeys, StackConfig
    from infra.plan.model import Change, FleetPlan
    from infra.weights.lock import WeightsLock


def plan_stack_file(stack: str, lock: WeightsLock) -> FleetPlan:
    """The plan of a stack file, without Pulumi.

    Raises:
        ConfigError: There is no such file, or it cannot be; it holds every finding.
    """
    config = load_stack_file(stack_file(stack))
    keys = for_plan(stack, config) if config.target == "local" else config.api_keys
    return plan_config(stack, config, lock, keys)


def plan_config(stack: str, config: StackConfig, lock: WeightsLock, api_keys: ApiKeys) -> FleetPlan:
    """The plan of a config, with what this machine and its files say.

    Raises:
        ConfigError: As `plan_stack_file`.
    """
    if config.target == "local":
        from infra.targets.local.host import read_host  # noqa: PLC0415 - only local needs the machine

        return _with_certificate(make_plan(stack, config, lock, read_host(), api_keys))
    measured = benchmarks.load(lock, gpus(), vllm_cpu().version)
    return make_plan(stack, config, lock, None, api_keys, measured)


def changes(old: Mapping[str, Any], plan: FleetPlan, lock: WeightsLock) -> tuple[Change, ...]:
    """What an edit changes against what is deployed.

    Args:
        old: The stack output `plan`, or all that `fleet plan --json` prints.
        plan: What will be.
        lock: The weights lock.
    """
    from infra.plan.model import FleetPlan  # noqa: PLC0415 - only this needs them
    from infra.render.machines import fingerprint  # noqa: PLC0415

    if "machines" not in old:
        with contextlib.suppress(ValidationError):  # that of a plan of this version, whole
            old = {**old, "machines": fingerprint(FleetPlan.model_validate(old), lock)}
    return delta(old, plan, fingerprint(plan, lock))


def _with_certificate(plan: FleetPlan) -> FleetPlan:
    """The plan, and which certificate its gateway has now."""
    if plan.gateway.tls is None:
        return plan
    try:
        digest = hashlib.sha256(Path(plan.gateway.tls).read_bytes()).hexdigest()
    except OSError:  # the proxy says what is wrong with it, when it reads it
        return plan
    return plan.model_copy(update={"gateway": plan.gateway.model_copy(update={"tls_sha256": digest})})
