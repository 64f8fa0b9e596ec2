"""The Pulumi program: reads the stack's config, makes the plan, hands it to the target."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

import pulumi

from infra import config, weights
from infra.findings import ConfigError, Finding
from infra.plan.delta import delta, kept
from infra.planning import plan_config
from infra.render.machines import fingerprint

if TYPE_CHECKING:
    from rich.console import RenderableType

    from infra.plan.model import FleetPlan
    from infra.weights.lock import WeightsLock

PLAN = "plan"
"""Stack output: what the next edit is compared with."""
OWN_CREDENTIALS = frozenset(
    f"aws:{key}"
    for key in (
        *("accessKey", "secretKey", "token", "profile", "assumeRole", "assumeRoles", "assumeRoleWithWebIdentity"),
        *("sharedCredentialsFiles", "sharedConfigFiles", "endpoints"),
    )
)
"""Keys of Pulumi's AWS provider that say who asks."""
WIDTH = 160
"""Columns of tables in Pulumi's output."""


def run(stack: str) -> None:
    """Declare every resource of a stack.

    Raises:
        ConfigError: the config, the lock or this machine cannot give what is asked; it holds every finding.
    """
    wanted = config.from_pulumi(json.loads(os.environ.get("PULUMI_CONFIG", "{}")))
    lock = weights.load()
    if wanted.target == "local":
        # A target's SDK is slow to import, and may not be installed: only the one that is used.
        from infra.targets.local import deploy, host  # noqa: PLC0415

        plan = plan_config(stack, wanted, lock, wanted.api_keys or host.default_api_keys(stack))
        _tell(plan, lock)
        weights.require_digests(lock, {model.name: model.weights for model in plan.models})
        deploy.deploy(plan, lock)
    elif wanted.target == "aws":
        plan = plan_config(stack, wanted, lock, wanted.api_keys)
        _tell(plan, lock)
        _on_aws(plan, lock)
    else:
        plan = plan_config(stack, wanted, lock, wanted.api_keys)
        _tell(plan, lock)
        fix = "`fleet plan` and `pulumi preview` say what it will be and cost; this version deploys to: local, aws"
        raise ConfigError([Finding("target", f"{plan.target}: not available yet", fix)])
    pulumi.export(PLAN, kept(plan, fingerprint(plan, lock)))


def _on_aws(plan: FleetPlan, lock: WeightsLock) -> None:
    """Deploy to AWS.

    Raises:
        ConfigError: The SDK is not installed, or what AWS would refuse.
    """
    try:
        from infra.targets.aws import deploy  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        if error.name != "pulumi_aws":
            raise
        fix = "`make up STACK=...` installs it; by hand: `uv pip sync requirements/aws.txt`"
        raise ConfigError([Finding("target", "aws: the package pulumi-aws is not installed", fix)]) from None
    if pulumi.runtime.is_dry_run():
        from infra import quotas  # noqa: PLC0415 - nobody else asks AWS for them

        _check_credentials(plan)
        for notice in quotas.check(plan):
            pulumi.log.warn(f"{notice.path}: {notice.message}")
    deploy.deploy(plan, lock)


def _check_credentials(plan: FleetPlan) -> None:
    """See that AWS knows who asks, before the provider finds that it does not and says so in the middle of a trace.

    Raises:
        ConfigError: There are no credentials, AWS does not take them, or it does not answer.
    """
    if OWN_CREDENTIALS & json.loads(os.environ.get("PULUMI_CONFIG", "{}")).keys():
        return  # of the provider alone: only it can tell
    from infra.aws_reads import Aws  # noqa: PLC0415 - as above

    try:
        Aws(plan.stack, plan.region or "").call("sts", "get_caller_identity")
    except ConfigError as error:
        asks = f"`pulumi preview` asks AWS what is there; `fleet plan -s {plan.stack}` needs no credentials"
        raise ConfigError([Finding(it.path, it.problem, f"{it.fix}; {asks}") for it in error.findings]) from None


def _tell(plan: FleetPlan, lock: WeightsLock) -> None:
    """What `fleet plan` shows, and what is another way than it was deployed last."""
    if not pulumi.runtime.is_dry_run():
        _warn(plan)
        return
    from infra import show_cost, show_plan  # noqa: PLC0415 - rich is not needed where nothing is shown

    pulumi.log.info(text(show_plan.plan(plan, explain=False, notices=False)))
    _warn(plan)

    def compare(old: Any) -> None:
        if old is not None:
            pulumi.log.info(text(show_cost.changes(delta(old, plan, fingerprint(plan, lock)))))

    name = f"{pulumi.get_organization()}/{pulumi.get_project()}/{pulumi.get_stack()}"
    pulumi.StackReference(name).get_output(PLAN).apply(compare)


def _warn(plan: FleetPlan) -> None:
    for notice in plan.notices:
        pulumi.log.warn(f"{notice.path}: {notice.message}")


def text(view: RenderableType) -> str:
    """A view as Pulumi shows it."""
    from rich.console import Console  # noqa: PLC0415 - as above

    out = io.StringIO()
    Console(file=out, width=WIDTH, markup=False, highlight=False).print(view)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip()
