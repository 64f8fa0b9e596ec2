"""What a stack on AWS needs of the account's quotas, and what is missing: said in the preview, before anything is made.

It is said and not refused. Quotas are raised while a stack is up, and count what the account runs beside it, of which
nothing is known here: only AWS can say no for sure, and its groups go on trying.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from infra.catalog.instances import instances
from infra.catalog.quotas import Quota, quotas
from infra.plan.model import AwsPlan, FleetPlan, GroupPlan, Notice

VCPUS = {"large": 2, "xlarge": 4}
"""Of a machine without GPUs, by its size: so in every family that gateways and monitors are of."""
PATIENCE_S = 3
"""Before AWS counts as out of reach: a preview without a network must not wait for it."""


def needed(plan: FleetPlan) -> dict[str, dict[str, int]]:
    """How much of each quota a stack takes at most, by the part of its config that takes it.

    A pool counts in each of its ways to get nodes: any of them may have to serve all nodes. Of several types it counts
    the preferred one.
    """
    aws = plan.on_aws
    if aws is None:
        return {}
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for group in aws.groups:
        if name := quota_of(group):
            part, amount = f"pools.{group.pool}", group.maximum * vcpus(group.instances[0])
            found[name][part] = max(found[name].get(part, 0), amount)
    found["on-demand-standard"] = {
        "gateway": aws.gateway.most * vcpus(aws.gateway.instance),
        "monitor": aws.monitor.most * vcpus(aws.monitor.instance),
    }
    found.update(_network(aws))
    return {name: found[name] for name in quotas() if name in found}


def _network(aws: AwsPlan) -> dict[str, dict[str, int]]:
    """What there is around the machines."""
    found = {"network-balancers": {"aws.endpoint": 1}}
    if aws.network.vpc is None:
        found["vpcs"] = {"aws.network": 1}
        if aws.network.internet == "nat":
            found["elastic-ips"] = found["nat-gateways"] = {"aws.network.internet": 1}
    return found


def vcpus(instance: str) -> int:
    """Of one machine of a type."""
    known = instances().get(instance)
    if known is not None:
        return known.vcpus
    size = instance.partition(".")[2]
    return VCPUS[size] if size in VCPUS else VCPUS["xlarge"] * int(size.removesuffix("xlarge"))


def quota_of(group: GroupPlan) -> str | None:
    """The quota that a group's machines count against. A capacity block counts against none: it is bought ahead."""
    if group.kind == "capacity-block":
        return None
    prefix = "spot-" if group.kind == "spot" else "on-demand-"
    instance = group.instances[0]
    return next((name for name, it in quotas().items() if name.startswith(prefix) and it.counts(instance)), None)


def findings(plan: FleetPlan, limits: Mapping[str, float]) -> list[Notice]:
    """What this stack needs and the account does not give, in words, and how to ask for it.

    Args:
        plan: The stack.
        limits: What the account has, by name of the quota; one that is missing is not compared.
    """
    wanted = needed(plan)
    short = {name for name, parts in wanted.items() if limits.get(name, sum(parts.values())) < sum(parts.values())}
    return [
        Notice(path=", ".join(wanted[name]), message=_words(plan, quotas()[name], limits[name], name, short))
        for name in wanted
        if name in short
    ]


def _words(plan: FleetPlan, quota: Quota, has: float, name: str, short: Collection[str]) -> str:
    amount = sum(needed(plan)[name].values())
    return (
        f'quota "{quota.name}" ({quota.code}) in {plan.region} is {has:g} {quota.unit}; this stack needs {amount}. '
        f"{_until_then(plan, name, short)}Ask for it with: aws service-quotas request-service-quota-increase "
        f"--region {plan.region} --service-code {quota.service} --quota-code {quota.code} --desired-value {amount}"
    )


def _until_then(plan: FleetPlan, name: str, short: Collection[str]) -> str:
    """What becomes of the pools that take a quota which is short."""
    groups = plan.on_aws.groups if plan.on_aws else ()
    said = []
    for pool in dict.fromkeys(group.pool for group in groups if quota_of(group) == name):
        others = [it.kind for it in groups if it.pool == pool and quota_of(it) not in short]
        nodes = f"{others[0]} nodes serve" if others else "nodes are missing"
        said.append(f"Until it is raised, {nodes} in the pool {pool}. ")
    return "".join(said)


def limits(region: str, names: Collection[str]) -> dict[str, float]:
    """What the account has of these quotas; nothing where there are no credentials, no network or no right to ask."""
    try:
        # The target's own packages: a stack that is only planned may be without them.
        import boto3  # noqa: PLC0415
        from botocore.config import Config  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
    except ModuleNotFoundError:
        return {}
    found: dict[str, float] = {}
    with contextlib.suppress(BotoCoreError):
        session = boto3.Session(region_name=region)
        if session.get_credentials() is None:
            return {}
        patience = Config(connect_timeout=PATIENCE_S, read_timeout=PATIENCE_S, retries={"total_max_attempts": 2})
        client = session.client("service-quotas", config=patience)
        for name in names:
            with contextlib.suppress(ClientError):  # this one is not known here, or not to be seen
                found[name] = _limit(client, quotas()[name])
    return found


def _limit(client: Any, quota: Quota) -> float:
    """The account's own value, or what every account has.

    Raises:
        ClientError: AWS gives neither.
    """
    asked = {"ServiceCode": quota.service, "QuotaCode": quota.code}
    try:
        return float(client.get_service_quota(**asked)["Quota"]["Value"])
    except client.exceptions.NoSuchResourceException:  # the account never had another value than the default
        return float(client.get_aws_default_service_quota(**asked)["Quota"]["Value"])


def check(plan: FleetPlan) -> list[Notice]:
    """What the preview says of quotas: what is missing, or that AWS could not be asked."""
    wanted = needed(plan)
    if not wanted or plan.region is None:
        return []
    if has := limits(plan.region, wanted):
        return findings(plan, has)
    gpus = [
        f"{quotas()[name].name} ({quotas()[name].code}): {sum(parts.values())} vCPU"
        for name, parts in wanted.items()
        if any(part.startswith("pools.") for part in parts)
    ]
    return [Notice(path="aws", message=f"quotas were not compared, as AWS cannot be asked. Needed: {', '.join(gpus)}")]
