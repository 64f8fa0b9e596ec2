"""The Pulumi program: reads the stack's config, makes the plan, hands it to the target."""

from __future__ import annotations

import json
import os

import pulumi

from infra import config, weights
from infra.plan import make_plan


def run(stack: str) -> None:
    """Declare every resource of a stack.

    Raises:
        ConfigError: the config, the lock or this machine cannot give what is asked; it holds every finding.
    """
    wanted = config.from_pulumi(json.loads(os.environ.get("PULUMI_CONFIG", "{}")))
    # A target's SDK is slow to import, and may not be installed: only the one that is used.
    from infra.targets.local import deploy, host  # noqa: PLC0415

    lock = weights.load()
    plan = make_plan(stack, wanted, lock, host.read_host(), wanted.api_keys or host.default_api_keys(stack))
    for notice in plan.notices:
        pulumi.log.warn(f"{notice.path}: {notice.message}")
    deploy.deploy(plan, lock)
