"""How a stack on AWS is, judged from what AWS says of it: groups, Cloud Map, load balancer, pointers, cache. Pure.

No port of a machine is open to the user's own: how an engine feels is in the dashboards, and here is what AWS knows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from infra.aws_names import engine_machine

if TYPE_CHECKING:
    from infra.findings import Finding
    from infra.plan.model import AwsPlan, FleetPlan, PoolPlan

HERE = "InService"
COMING = ("Pending", "Warmed:Pending")
LEAVING = ("Terminating", "Detach")
RUNNING = "running"
HEALTHY = "healthy"
SHOWN = 12
"""Characters of a digest."""
REGISTERED = re.compile(r"(i-[0-9a-f]+)-(.+)")
"""Id in Cloud Map: instance and engine, as nodeconfig/agent/fleet_agent/cloud.py registers them."""
CAPACITY, QUOTA, SPOT, IMAGE = (f"runbooks/aws-{name}.md" for name in ("capacity", "quota", "spot", "image"))
FAILURES = (
    (r"do not have sufficient|InsufficientInstanceCapacity|capacity-not-available|Unfulfill", "no capacity", CAPACITY),
    (r"VcpuLimitExceeded|vCPU limit|MaxSpotInstanceCount|SpotMaxPrice.*quota", "the quota is used up", QUOTA),
    (r"ReservationCapacityExceeded|[Cc]apacity [Rr]eservation", "the reservation has no room", CAPACITY),
    (r"not supported in your requested Availability Zone", "the zones do not have this type", CAPACITY),
    (r"SpotMaxPriceTooLow|price-too-low|lower than the minimum", "the bid is lower than the price of spot", SPOT),
    (r"Lifecycle Action|ABANDON", "a node did not get ready in its time", IMAGE),
    (r"InvalidAMIID|image id .* does not exist|AMI .* (pending|does not exist)", "the image is not there", IMAGE),
)
"""What the message of a failed scaling activity has in it, what that is in words, and the runbook. The first counts."""
LONGEST = 160
"""Characters of a message of which nothing is known."""


@dataclass
class Answers:
    """What AWS said, as boto3 gives it. None: it did not say, and `unanswered` tells why."""

    account: str
    groups: list[dict[str, Any]] | None = None
    activities: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of groups that lack machines, newest first."""
    registered: dict[str, list[str]] | None = None
    """SRV name to ids of engines."""
    targets: list[dict[str, Any]] | None = None
    """Health of the gateways in the load balancer's target group."""
    monitors: list[dict[str, Any]] | None = None
    pointers: dict[str, dict[str, Any]] | None = None
    """Kind of machine to its pointer; those that are there."""
    cached: dict[str, bool] | None = None
    """Entry to whether the cache has all of it."""
    unanswered: list[Finding] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        """There is no such stack."""
        return self.groups == [] and not self.monitors and not self.pointers


@dataclass(frozen=True)
class GroupStatus:
    """The machines of one group."""

    group: str
    rung: str
    """What the machines are: on-demand, spot …"""
    wanted: int
    serving: int
    pending: int
    terminating: int
    failure: str
    """Why the last machine could not be had, in words; "" where it has all that it wants."""
    failed_at: str
    """In ISO 8601."""
    message: str
    """The same in AWS's words."""
    runbook: str

    @property
    def why(self) -> str:
        """The failure and where to read on, or ""."""
        return f"{self.rung}: {self.failure}" + (f" ({self.runbook})" if self.runbook else "") if self.failure else ""


@dataclass(frozen=True)
class PoolStatus:
    """One pool of engine nodes."""

    pool: str
    wanted: int
    """Now: outside its hours a pool wants none."""
    groups: tuple[GroupStatus, ...]

    @property
    def serving(self) -> int:
        """Nodes that serve, of whatever rung."""
        return sum(group.serving for group in self.groups)

    @property
    def problem(self) -> str:
        """Why it is not as planned, or ""."""
        return _lacks(f"pool {self.pool}", "nodes", self.wanted, self.groups)


@dataclass(frozen=True)
class ModelStatus:
    """The engines of one model that gateways can find."""

    model: str
    wanted: int
    engines: tuple[str, ...]
    """`engine@node`; an engine registers itself while it is ready."""

    @property
    def problem(self) -> str:
        """Why it is not as planned, or ""."""
        found = len(self.engines)
        return "" if found >= self.wanted else f"model {self.model}: {found} of {self.wanted} engines are registered"


@dataclass(frozen=True)
class GatewayStatus:
    """The gateways, and what the load balancer thinks of them."""

    wanted: int
    group: GroupStatus | None
    targets: tuple[tuple[str, str], ...]
    """(instance, its health in words)."""

    @property
    def healthy(self) -> int:
        """Gateways that the load balancer sends clients to."""
        return sum(health == HEALTHY for _, health in self.targets)

    @property
    def problem(self) -> str:
        """Why they are not as planned, or ""."""
        if lacks := _lacks("gateways", "machines", self.wanted, [self.group] if self.group else []):
            return lacks
        if self.healthy >= self.wanted:
            return ""
        found = Counter(health for _, health in self.targets if health != HEALTHY)
        said = "".join(f"; {number} {health}" for health, number in found.items())
        return f"gateways: {self.healthy} of {self.wanted} are healthy{said}"


@dataclass(frozen=True)
class MonitorStatus:
    """The monitor's machine."""

    instance: str
    state: str
    """As EC2 names it; "" where there is no machine."""

    @property
    def problem(self) -> str:
        """Why it does not watch, or ""."""
        return "" if self.state == RUNNING else f"monitor: {self.state or 'there is no such machine'}"


@dataclass(frozen=True)
class BundleStatus:
    """What one kind of machine is meant to run."""

    machine: str
    bundle: str
    """Digest; "" where nothing says."""

    @property
    def problem(self) -> str:
        """Why it runs nothing, or ""."""
        return "" if self.bundle else f"{self.machine}: nothing says what it runs"


@dataclass(frozen=True)
class WeightsStatus:
    """One entry of the lock in the stack's cache."""

    entry: str
    cached: bool

    @property
    def problem(self) -> str:
        """Why no engine can load it, or ""."""
        fill = "`pulumi stack output fill` starts the job that brings it"
        return "" if self.cached else f"weights {self.entry}: not whole in the cache; {fill}"


@dataclass(frozen=True)
class AwsStatus:
    """A whole stack on AWS. What AWS did not say is None."""

    stack: str
    region: str
    account: str
    pools: tuple[PoolStatus, ...] | None
    models: tuple[ModelStatus, ...] | None
    gateways: GatewayStatus | None
    monitor: MonitorStatus | None
    bundles: tuple[BundleStatus, ...] | None
    weights: tuple[WeightsStatus, ...] | None
    edited: tuple[str, ...]
    """Where what is deployed is not what the stack file says."""
    unanswered: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is not as planned; empty: all is."""
        single = [it for it in (self.gateways, self.monitor) if it is not None]
        many = [*(self.pools or ()), *(self.models or ()), *single, *(self.bundles or ()), *(self.weights or ())]
        return (*filter(None, (it.problem for it in many)), *self.edited, *map(str, self.unanswered))

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"ok": not self.problems, "problems": list(self.problems), **asdict(self)}


def machine_kinds(plan: FleetPlan) -> list[str]:
    """Kinds of machines, as their pointers name them."""
    return ["gateway", "monitor", *(engine_machine(pool.name) for pool in plan.pools)]


def judge(plan: FleetPlan, aws: AwsPlan, said: Answers) -> AwsStatus:
    """What AWS's answers mean.

    Args:
        plan: Of the stack file, as it is now.
        aws: Its part for AWS.
        said: The answers.
    """
    groups = None if said.groups is None else {it["AutoScalingGroupName"]: it for it in said.groups}
    pools = None if groups is None else tuple(_pool(pool, aws, groups, said) for pool in plan.pools)
    resting = {it.pool for it in pools or () if not it.wanted}
    return AwsStatus(
        stack=plan.stack,
        region=plan.region or "",
        account=said.account,
        pools=pools,
        models=None if said.registered is None else tuple(_models(plan, said.registered, _machines(groups), resting)),
        gateways=None if groups is None or said.targets is None else _gateways(aws, groups, said),
        monitor=None if said.monitors is None else _monitor(said.monitors),
        bundles=None
        if said.pointers is None
        else tuple(BundleStatus(it, said.pointers.get(it, {}).get("bundle", "")) for it in machine_kinds(plan)),
        weights=None if said.cached is None else tuple(WeightsStatus(*it) for it in sorted(said.cached.items())),
        edited=tuple(_edited(plan, aws, groups or {})) if groups is not None else (),
        unanswered=tuple(said.unanswered),
    )


def _pool(pool: PoolPlan, aws: AwsPlan, groups: Mapping[str, Any], said: Answers) -> PoolStatus:
    own = [it for it in aws.groups if it.pool == pool.name]
    rows = [_group(groups[it.name], it.kind, said) for it in own if it.name in groups]
    # The first rung has the pool's hours: it wants all nodes, or none.
    wanted = min(pool.nodes, rows[0].wanted) if pool.schedule and rows else pool.nodes
    return PoolStatus(pool.name, wanted, tuple(rows))


def _group(group: Mapping[str, Any], rung: str, said: Answers) -> GroupStatus:
    name, states = group["AutoScalingGroupName"], [it["LifecycleState"] for it in group["Instances"]]
    failed = next((it for it in said.activities.get(name, ()) if it["StatusCode"] in {"Failed", "Cancelled"}), None)
    words, runbook = in_words(failed) if failed else ("", "")
    return GroupStatus(
        group=name,
        rung=rung,
        wanted=group["DesiredCapacity"],
        serving=states.count(HERE),
        pending=sum(state.startswith(COMING) for state in states),
        terminating=sum(state.startswith(LEAVING) for state in states),
        failure=words,
        failed_at=failed["StartTime"].isoformat(timespec="seconds") if failed else "",
        message=str(failed.get("StatusMessage") or failed.get("Description", "")) if failed else "",
        runbook=runbook,
    )


def short(group: Mapping[str, Any]) -> bool:
    """Whether a group, as boto3 gives it, has fewer machines that serve than it wants."""
    serving = [it for it in group["Instances"] if it["LifecycleState"] == HERE]
    return len(serving) < int(group["DesiredCapacity"])


def in_words(activity: Mapping[str, Any]) -> tuple[str, str]:
    """What a failed scaling activity means, and its runbook; AWS's own words where nothing is known of them."""
    message = str(activity.get("StatusMessage") or activity.get("Description") or "it does not say why")
    for pattern, words, runbook in FAILURES:
        if re.search(pattern, message):
            return words, runbook
    return (f"{message[:LONGEST]}…" if len(message) > LONGEST else message), ""


def _machines(groups: Mapping[str, Any] | None) -> set[str] | None:
    """Ids of the machines of all groups; None: nobody knows."""
    return None if groups is None else {it["InstanceId"] for group in groups.values() for it in group["Instances"]}


def engines(registered: Mapping[str, Sequence[str]], srv: str, alive: set[str] | None) -> list[str]:
    """`engine@node` of those that are registered at a service, on machines that there are."""
    found = [it for name in registered.get(srv, ()) if (it := REGISTERED.fullmatch(name))]
    return sorted(f"{it[2]}@{it[1]}" for it in found if alive is None or it[1] in alive)


def _models(
    plan: FleetPlan, registered: Mapping[str, Sequence[str]], alive: set[str] | None, resting: set[str]
) -> Iterator[ModelStatus]:
    wanted = Counter[str]()
    for kind in plan.engine_sets:
        wanted[kind.model] += 0 if kind.pool in resting else kind.engines
    for model, srv, _ in plan.gateway.srv:
        yield ModelStatus(model, wanted[model], tuple(engines(registered, srv, alive)))


def _gateways(aws: AwsPlan, groups: Mapping[str, Any], said: Answers) -> GatewayStatus:
    own = groups.get(str(aws.gateway.group))
    targets = tuple((it["Target"]["Id"], _health(it["TargetHealth"])) for it in said.targets or ())
    return GatewayStatus(aws.gateway.hosts, _group(own, "gateway", said) if own else None, targets)


def _health(target: Mapping[str, Any]) -> str:
    """State and reason: `unhealthy (FailedHealthChecks)`."""
    reason = str(target.get("Reason", "")).rpartition(".")[2]
    return f"{target['State']} ({reason})" if reason else str(target["State"])


def _monitor(instances: Sequence[Mapping[str, Any]]) -> MonitorStatus:
    """The one that runs; while it is replaced there may be another that ends."""
    rows = sorted(instances, key=lambda it: it["State"]["Name"] != RUNNING)
    return MonitorStatus(rows[0]["InstanceId"], rows[0]["State"]["Name"]) if rows else MonitorStatus("", "")


def _lacks(what: str, unit: str, wanted: int, groups: Sequence[GroupStatus]) -> str:
    """What a pool or the gateways lack, and why, or ""."""
    serving, pending = sum(it.serving for it in groups), sum(it.pending for it in groups)
    if serving >= wanted:
        return ""
    coming = f", {pending} pending" if pending else ""
    why = "".join(f"; {it.why}" for it in groups if it.why)
    return f"{what}: {serving} of {wanted} {unit} serve{coming}{why}"


def _edited(plan: FleetPlan, aws: AwsPlan, groups: Mapping[str, Any]) -> Iterator[str]:
    """Groups whose size was edited since the last `pulumi up`, that came, or that went."""
    fix = f"`pulumi up -s {plan.stack}` makes it so"
    wanted = {it.name: it.maximum for it in aws.groups} | {str(aws.gateway.group): aws.gateway.most}
    for name, most in wanted.items():
        if name not in groups:
            yield f"{name}: is in the stack file and not on AWS; {fix}"
        elif groups[name]["MaxSize"] != most:
            yield f"{name}: may have {groups[name]['MaxSize']} machines, and {most} by the stack file; {fix}"
    yield from (f"{name}: is on AWS and not in the stack file; {fix}" for name in groups if name not in wanted)
