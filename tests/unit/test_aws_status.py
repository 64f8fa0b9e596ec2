"""What `fleet status` makes of what AWS says, and what `fleet drain` has a node do, without AWS."""

from __future__ import annotations

import datetime as dt
import io
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from infra import aws_drain, aws_reads, aws_status, cli, drain, show_aws, weights
from infra.aws_status import Answers
from infra.findings import ConfigError, Finding
from infra.paths import ROOT
from infra.plan.model import FleetPlan, SchedulePlan
from infra.planning import plan_stack_file
from tests.unit.deployments import Deployment, deployment

NODE, OTHER = "i-0aaaaaaaaaaaaaaaa", "i-0bbbbbbbbbbbbbbbb"
AT = dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def prod() -> FleetPlan:
    return plan_stack_file("prod", weights.load())


def group(name: str, *states: str, wanted: int = 1, most: int = 1) -> dict[str, Any]:
    rows = [{"InstanceId": f"{name}-{index}", "LifecycleState": state} for index, state in enumerate(states)]
    return {"AutoScalingGroupName": name, "DesiredCapacity": wanted, "MaxSize": most, "Instances": rows}


def target(state: str, reason: str = "") -> dict[str, Any]:
    return {"Target": {"Id": "i-1"}, "TargetHealth": {"State": state, **({"Reason": reason} if reason else {})}}


def whole(plan: FleetPlan) -> Answers:
    """All as it should be."""
    pool = "fleet-prod-engine-h100-on-demand"
    groups = [
        group("fleet-prod-gateway-0", "InService", "InService", wanted=2, most=3),
        group(pool, "InService"),
        group("fleet-prod-engine-a100-on-demand", "InService"),
        group("fleet-prod-engine-a100-spot", wanted=0),
    ]
    groups[1]["Instances"][0]["InstanceId"] = NODE
    groups[2]["Instances"][0]["InstanceId"] = OTHER
    srv = {model: name for model, name, _ in plan.gateway.srv}
    return Answers(
        "123456789012",
        groups=groups,
        registered={
            srv["chat"]: [f"{NODE}-chat-{n}" for n in (1, 2, 3, 4)],
            srv["fast"]: [f"{OTHER}-fast-{n}" for n in (1, 2, 3, 4)],
        },
        targets=[target("healthy"), target("healthy")],
        monitors=[{"InstanceId": "i-3", "State": {"Name": "running"}}],
        pointers={kind: {"bundle": "b" * 64} for kind in aws_status.machine_kinds(plan)},
        cached={"a": True},
    )


def problems(plan: FleetPlan, said: Answers) -> tuple[str, ...]:
    assert plan.on_aws
    return aws_status.judge(plan, plan.on_aws, said).problems


def test_all_as_planned(prod: FleetPlan) -> None:
    assert problems(prod, whole(prod)) == ()


def test_a_pool_outside_its_hours_lacks_nothing(prod: FleetPlan) -> None:
    hours = SchedulePlan(days=(0, 1), start="08:00", end="18:00", time_zone="UTC")
    pools = tuple(it.model_copy(update={"schedule": hours}) if it.name == "h100" else it for it in prod.pools)
    plan, said = prod.model_copy(update={"pools": pools}), whole(prod)
    assert said.groups
    assert said.registered
    said.groups[1]["Instances"] = []
    said.registered["_chat._tcp.prod.internal"] = []
    assert problems(plan, said) == (
        "pool h100: 0 of 1 nodes serve",
        "model chat: 0 of 4 engines are registered",
    )
    said.groups[1]["DesiredCapacity"] = 0
    assert problems(plan, said) == ()


def lacks(state: str) -> Callable[[Answers], None]:
    def change(said: Answers) -> None:
        assert said.groups
        said.groups[1]["Instances"][0]["LifecycleState"] = state

    return change


def put(name: str, value: Any) -> Callable[[Answers], None]:
    return lambda said: setattr(said, name, value)


def later_rung(said: Answers) -> None:
    """The first rung has nothing, the next one stands in."""
    assert said.groups
    said.groups[2]["Instances"] = []
    said.groups[3] |= {
        "DesiredCapacity": 1,
        "Instances": [{"InstanceId": OTHER, "LifecycleState": "InService"}],
    }


def gone_machine(said: Answers) -> None:
    """Its node ended without a word, and nobody has struck it out yet."""
    assert said.registered
    said.registered["_chat._tcp.prod.internal"][0] = "i-0cccccccccccccccc-chat-1"


def larger(said: Answers) -> None:
    assert said.groups
    said.groups[1]["MaxSize"] = 4
    said.groups.append(group("fleet-prod-engine-old-spot", wanted=0))
    del said.groups[0]


FIX = "`pulumi up -s prod` makes it so"
SIZES = (
    "gateways: 0 of 2 machines serve",
    f"fleet-prod-gateway-0: is in the stack file and not on AWS; {FIX}",
    f"fleet-prod-engine-h100-on-demand: may have 4 machines, and 1 by the stack file; {FIX}",
    f"fleet-prod-engine-old-spot: is on AWS and not in the stack file; {FIX}",
)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lacks("Pending:Wait"), ("pool h100: 0 of 1 nodes serve, 1 pending",)),
        (lacks("Terminating:Wait"), ("pool h100: 0 of 1 nodes serve",)),
        (later_rung, ()),
        (gone_machine, ("model chat: 3 of 4 engines are registered",)),
        (put("targets", [target("healthy"), target("unhealthy", "Target.FailedHealthChecks")]), 1),
        (put("targets", []), ("gateways: 0 of 2 are healthy",)),
        (put("monitors", []), ("monitor: there is no such machine",)),
        (put("monitors", [{"InstanceId": "i-3", "State": {"Name": "stopped"}}]), ("monitor: stopped",)),
        (larger, SIZES),
        (put("unanswered", [Finding("aws", "the right ec2:X is missing", "give it")]), 1),
    ],
)
def test_what_is_not_as_planned_is_said(prod: FleetPlan, change: Callable[[Answers], None], found: Any) -> None:
    said = whole(prod)

    change(said)

    expected = {
        "targets": ("gateways: 1 of 2 are healthy; 1 unhealthy (FailedHealthChecks)",),
        "unanswered": ("aws: the right ec2:X is missing\n    give it",),
    }
    if found == 1:
        found = expected["unanswered" if said.unanswered else "targets"]
    assert set(problems(prod, said)) == set(found)


@pytest.mark.parametrize(
    ("message", "words", "runbook"),
    [
        (
            "We currently do not have sufficient p5.48xlarge capacity in the Availability Zone",
            "no capacity",
            "capacity",
        ),
        ("Could not launch Spot Instances. UnfulfillableCapacity - Unable to fulfill", "no capacity", "capacity"),
        (
            "You have requested more vCPU capacity than your current vCPU limit of 0 allows",
            "the quota is used up",
            "quota",
        ),
        (
            "Could not launch Spot Instances. MaxSpotInstanceCountExceeded - Max spot instance",
            "the quota is used up",
            "quota",
        ),
        ("ReservationCapacityExceeded: the requested reservation", "the reservation has no room", "capacity"),
        ("Your requested instance type (p5) is not supported in your requested Availability Zone", "zones", "capacity"),
        (
            "Could not launch Spot Instances. SpotMaxPriceTooLow - Your Spot request price of 1",
            "the bid is lower",
            "spot",
        ),
        ("Instance failed to complete user's Lifecycle Action: was abandoned: Heartbeat Timeout", "get ready", "image"),
        ("The image id '[ami-1]' does not exist. Launching EC2 instance failed.", "the image is not there", "image"),
        ("AuthFailure of something new", "AuthFailure of something new", None),
    ],
)
def test_failures_are_told_in_words_with_their_runbook(message: str, words: str, runbook: str | None) -> None:
    said, page = aws_status.in_words({"StatusMessage": message})

    assert words in said
    assert page == (f"runbooks/aws-{runbook}.md" if runbook else "")
    assert not page or Path(ROOT, page).is_file()


def test_the_last_failure_is_told_where_machines_are_missing(prod: FleetPlan) -> None:
    said = whole(prod)
    lacks("Terminating")(said)
    rows = ("Successful", ""), ("Failed", "do not have sufficient capacity"), ("Failed", "vCPU limit")
    said.activities = {
        "fleet-prod-engine-h100-on-demand": [
            {"StatusCode": code, "StatusMessage": text, "StartTime": AT} for code, text in rows
        ]
    }
    assert problems(prod, said) == ("pool h100: 0 of 1 nodes serve; on-demand: no capacity (runbooks/aws-capacity.md)",)


def test_it_is_shown_and_what_is_not_known_too(prod: FleetPlan) -> None:
    assert prod.on_aws
    for said in (whole(prod), Answers("123456789012", unanswered=[Finding("aws", "no right")])):
        found = aws_status.judge(prod, prod.on_aws, said)
        out = io.StringIO()
        Console(file=out, width=200, markup=False, highlight=False).print(show_aws.status(found))
        assert json.loads(json.dumps(found.as_json()))["ok"] is not bool(found.problems)
        assert "as planned" in out.getvalue()
        assert ("not as planned" in out.getvalue()) == bool(found.problems)


def test_a_stack_on_this_machine_is_looked_at_without_boto3() -> None:
    code = "import sys, infra.cli, infra.status, infra.drain, infra.show; assert 'boto3' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_boto3_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEET_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, "infra.aws_reads", raising=False)
    monkeypatch.setitem(sys.modules, "boto3", None)
    found = CliRunner().invoke(cli.app, ["status", "-s", "dev"])
    assert (found.exit_code, found.stdout) == (1, "")
    assert "boto3 is not installed" in found.stderr
    assert "requirements/aws.txt" in found.stderr


def test_without_credentials_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "FLEET_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for command in (["status"], ["drain", f"chat-1@{NODE}"]):
        found = CliRunner().invoke(cli.app, [*command, "-s", "dev"])
        assert (found.exit_code, found.stdout) == (1, "")
        assert "there are no credentials of AWS" in found.stderr
        assert "`aws sts get-caller-identity` must answer" in found.stderr


def test_logs_of_machines_on_aws_say_how_to_get_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEET_DIR", str(tmp_path))
    found = CliRunner().invoke(cli.app, ["logs", "agent", "-s", "dev"])
    assert found.exit_code == 1
    assert "aws ssm start-session --region us-east-1" in found.stderr


def test_what_takes_long_says_what_it_waits_for_and_nothing_hides_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws_reads, "SAY_S", 0.01)
    told, said, finding = threading.Event(), list[str](), Finding("aws", "no right")

    def say(text: str) -> None:
        said.append(text)
        told.set()

    def refused() -> None:
        raise ConfigError([finding])

    def slow() -> None:
        told.wait(60)

    questions = {"groups": slow, "monitor": refused, "engines": refused}
    assert list(aws_reads._at_once(questions, say)) == [finding]
    assert said[0].startswith("waiting for AWS: ")
    assert "groups" in said[0]


# Drain.


class Ssm:
    """AWS of which one node's agent is the one of a deployment, and which runs what is sent, here."""

    region = "us-east-1"

    def __init__(self, elsewhere: tuple[str, ...] = ()) -> None:
        self.elsewhere = elsewhere
        self.sent: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any] | None] = []

    def instances(self, *_roles: str) -> list[dict[str, Any]]:
        return [{"InstanceId": it, "State": {"Name": "running"}} for it in (NODE, OTHER)]

    def registered(self) -> dict[str, list[str]]:
        return {"_chat._tcp.test.internal": list(self.elsewhere)}

    def call(self, _service: str, method: str, **asked: Any) -> Any:
        if method == "send_command":
            self.sent.append(asked)
            done = subprocess.run(
                ["sh", "-c", "\n".join(asked["Parameters"]["commands"])], capture_output=True, text=True, check=False
            )
            state = "Failed" if done.returncode else "Success"
            self.answers = [
                None,  # it takes a moment
                {"Status": "InProgress"},
                {"Status": state, "StandardOutputContent": done.stdout, "StandardErrorContent": done.stderr},
            ]
            return {"Command": {"CommandId": "c"}}
        answer = self.answers.pop(0)
        if answer is None:
            raise ConfigError([Finding("aws", "ssm:GetCommandInvocation: InvocationDoesNotExist: ")])
        return answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves only when someone sleeps."""
    clock = SimpleNamespace(now=100.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    clock.sleep, clock.monotonic = sleep, lambda: clock.now
    monkeypatch.setattr(aws_drain, "time", clock)
    monkeypatch.setattr(drain, "time", clock)
    return clock


@pytest.fixture
def fleet(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Deployment]:
    assert clock
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        monkeypatch.setenv("FLEET_DIR", folder)
        with deployment(tmp_path, "agent") as deployed:
            gateway = deployed.plan.gateway.model_copy(update={"srv": (("chat", "_chat._tcp.test.internal", 6),)})
            deployed.plan = deployed.plan.model_copy(update={"gateway": gateway})
            yield deployed


def order(fleet: Deployment, ssm: Ssm, what: str, **how: bool) -> list[str]:
    said: list[str] = []
    options = {"undo": False, "wait": True, "force": False} | how
    aws_drain.order(ssm, fleet.plan, what, said.append, **options)  # type: ignore[arg-type]
    return said


def test_an_engine_of_a_node_is_drained_by_its_own_agent_and_put_back(fleet: Deployment) -> None:
    fleet.rows["chat-1"]["in_flight"] = 3
    fleet.finishing = 1
    ssm = Ssm()

    said = order(fleet, ssm, f"chat-1@{NODE}")

    assert fleet.orders == ["/drain?engine=chat-1"]
    assert fleet.rows["chat-1"]["in_flight"] == 0
    assert "drained in" in said[-1]
    assert f"`fleet drain chat-1@{NODE} --undo` puts it back" in said[-1]
    assert {(it["DocumentName"], *it["InstanceIds"]) for it in ssm.sent} == {("AWS-RunShellScript", NODE)}
    assert not [it for it in ssm.sent if "{{" in json.dumps(it["Parameters"])]

    assert order(fleet, ssm, f"chat-1@{NODE}", undo=True)[-1] == f"chat-1@{NODE}: ready"


def test_a_node_is_drained_whole_if_others_serve_its_models(fleet: Deployment) -> None:
    with pytest.raises(ConfigError, match="no other engine of the model `chat` is ready"):
        order(fleet, Ssm(), NODE)
    with pytest.raises(ConfigError, match="no other engine of the model `chat` is ready"):
        order(fleet, Ssm((f"{NODE}-chat-7", "i-0cccccccccccccccc-chat-1")), NODE)
    assert fleet.orders == []

    said = order(fleet, Ssm((f"{OTHER}-chat-1",)), NODE, wait=False)

    assert fleet.orders == ["/drain?engine=chat-1", "/drain?engine=chat-2"]
    assert "its group replaces a node" in said[-1]


def test_what_was_registered_once_does_not_stand_in(fleet: Deployment) -> None:
    fleet.rows["chat-2"]["state"] = "loading"
    for gone in (f"{NODE}-chat-7", "i-0cccccccccccccccc-chat-1"):
        with pytest.raises(ConfigError, match="no other engine of the model `chat` is ready"):
            order(fleet, Ssm((gone,)), f"chat-1@{NODE}")
    assert fleet.orders == []


def test_a_node_with_nothing_to_drain(fleet: Deployment) -> None:
    for row in fleet.rows.values():
        row["state"] = "loading"
    with pytest.raises(ConfigError, match="nothing on it gets requests"):
        order(fleet, Ssm(), NODE)


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("chat-1", "does not say on which node"),
        ("chat-1@i-0aaaaaaaaaaaaaaab", f"did you mean `{NODE}`"),
        (f"chat-9@{NODE}", "there is no such engine"),
    ],
)
def test_what_cannot_be_drained(fleet: Deployment, what: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        order(fleet, Ssm(), what)
    assert fleet.orders == []


def test_an_agent_that_does_not_answer(clock: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        monkeypatch.setenv("FLEET_DIR", folder)
        with deployment(tmp_path) as deployed, pytest.raises(ConfigError, match=r"Failed to connect|Couldn't connect"):
            order(deployed, Ssm(), f"chat-1@{NODE}")
