"""`fleet status` and `fleet drain` of a stack on AWS, from the outside: what the stack prod would have, by hand."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from infra import aws_drain, cli, weights
from infra.aws_names import engine_machine, parameter
from infra.plan.model import FleetPlan
from infra.planning import plan_stack_file
from infra.render.user_data import NodeSettings, user_data
from tests.aws.standin import CREDENTIALS, REGION, StandIn, stand_in

ZONE = f"{REGION}a"
BUNDLE = "b" * 64
BUCKET = "fleet-prod-0123"
IMAGE_OWNER = "898082745236"


class ByHand:
    """What `pulumi up` makes of the stack prod, as far as its status looks at it."""

    def __init__(self, aws: StandIn, plan: FleetPlan) -> None:
        assert plan.on_aws
        self.aws, self.plan, self.cloud = aws, plan, plan.on_aws
        self.ec2 = aws.client("ec2")
        self.image = self.ec2.describe_images(Owners=[IMAGE_OWNER])["Images"][0]["ImageId"]
        self.groups()
        self.monitor = self.ec2.run_instances(
            ImageId=self.image,
            InstanceType="m7i.large",
            MinCount=1,
            MaxCount=1,
            TagSpecifications=[{"ResourceType": "instance", "Tags": self.tags("monitor")}],
        )["Instances"][0]["InstanceId"]
        self.pointers()
        self.cache()
        self.engines()

    def tags(self, role: str) -> list[dict[str, Any]]:
        return [
            {"Key": f"vllm-fleet:{key}", "Value": value} for key, value in (("stack", self.plan.stack), ("role", role))
        ]

    def groups(self) -> None:
        vpc = self.ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        targets = self.aws.client("elbv2").create_target_group(Name="gateways", Protocol="TCP", Port=8080, VpcId=vpc)
        arn = targets["TargetGroups"][0]["TargetGroupArn"]
        gateway = self.cloud.gateway
        self.group(str(gateway.group), gateway.instance, gateway.hosts, gateway.most, "gateway", TargetGroupARNs=[arn])
        for group in self.cloud.groups:
            self.group(group.name, group.instances[0], group.minimum, group.maximum, "engine")

    def group(self, name: str, instance: str, least: int, most: int, role: str, **more: Any) -> None:
        told = user_data(NodeSettings(self.plan.stack, "gateway", "gateway", REGION, BUCKET, name))
        data = {
            "ImageId": self.image,
            "InstanceType": instance,
            "UserData": base64.b64encode(told.encode()).decode(),
        }
        self.ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=data)
        self.aws.client("autoscaling").create_auto_scaling_group(
            AutoScalingGroupName=name,
            LaunchTemplate={"LaunchTemplateName": name, "Version": "1"},
            AvailabilityZones=[ZONE],
            MinSize=least,
            MaxSize=most,
            Tags=[{**tag, "PropagateAtLaunch": True} for tag in self.tags(role)],
            **more,
        )

    def nodes(self, pool: str) -> list[str]:
        names = [it.name for it in self.cloud.groups if it.pool == pool]
        found = self.aws.client("autoscaling").describe_auto_scaling_groups(AutoScalingGroupNames=names)
        return [it["InstanceId"] for group in found["AutoScalingGroups"] for it in group["Instances"]]

    def pointers(self) -> None:
        for kind in ("gateway", "monitor", *(engine_machine(pool.name) for pool in self.plan.pools)):
            self.aws.client("ssm").put_parameter(
                Name=parameter(self.plan.stack, kind), Type="String", Value=json.dumps({"bundle": BUNDLE})
            )

    def cache(self) -> None:
        s3, lock = self.aws.client("s3"), weights.load()
        s3.create_bucket(Bucket=BUCKET)
        self.complete = [f"weights/{it.weights}/{lock.digest(it.weights)}/.complete" for it in self.plan.models]
        for key in self.complete:
            s3.put_object(Bucket=BUCKET, Key=key, Body=b"{}")

    def engines(self) -> None:
        client = self.aws.client("servicediscovery")
        client.create_private_dns_namespace(
            Name=f"{self.plan.stack}.internal", Vpc=self.ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        )
        (namespace,) = client.list_namespaces()["Namespaces"]
        self.services = {}
        for model, srv, _ in self.plan.gateway.srv:
            self.services[model] = client.create_service(
                Name=srv.removesuffix(f".{self.plan.stack}.internal"),
                NamespaceId=namespace["Id"],
                DnsConfig={"DnsRecords": [{"Type": "SRV", "TTL": 10}]},
            )["Service"]["Id"]
        for pool in self.plan.pools:
            for node in self.nodes(pool.name):
                for index, slot in enumerate(pool.slots):
                    self.register(slot.model, node, index)

    def register(self, model: str, node: str, index: int) -> None:
        self.aws.client("servicediscovery").register_instance(
            ServiceId=self.services[model],
            InstanceId=f"{node}-{model}-{index + 1}",
            Attributes={"AWS_INSTANCE_IPV4": "10.0.0.1", "AWS_INSTANCE_PORT": str(8000 + index)},
        )


@pytest.fixture(scope="module")
def plan() -> FleetPlan:
    return plan_stack_file("prod", weights.load())


@pytest.fixture(scope="module")
def prod(plan: FleetPlan) -> Iterator[ByHand]:
    with stand_in() as running:
        yield ByHand(running, plan)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FLEET_DIR", str(tmp_path))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def fleet(aws: StandIn, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """A command with the credentials of the stand-in: exit code, standard output, standard error."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": aws.url}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_all_as_planned(prod: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, _ = fleet(prod.aws, monkeypatch, "status", "-s", "prod", "--json")

    found = json.loads(output)
    assert (code, found["problems"], found["ok"]) == (0, [], True)
    assert {
        it["pool"]: [(group["rung"], group["wanted"], group["serving"]) for group in it["groups"]]
        for it in found["pools"]
    } == {
        "h100": [("on-demand", 1, 1)],
        "a100": [("on-demand", 1, 1), ("spot", 0, 0)],
    }
    (node,) = prod.nodes("h100")
    assert found["models"][0]["engines"] == [f"chat-{index}@{node}" for index in (1, 2, 3, 4)]
    assert [health for _, health in found["gateways"]["targets"]] == ["healthy", "healthy"]
    assert found["monitor"] == {"instance": prod.monitor, "state": "running"}
    assert {it["machine"] for it in found["bundles"]} == {"gateway", "monitor", "engine-h100", "engine-a100"}
    assert all(it["cached"] for it in found["weights"])

    code, output, _ = fleet(prod.aws, monkeypatch, "status", "-s", "prod")
    assert code == 0
    assert "stack prod in us-east-1, account 123456789012: as planned" in output
    row = next(line for line in output.splitlines() if line.startswith("pool h100")).split()
    assert row == ["pool", "h100", "on-demand", "1", "1", "0", "0"]


@pytest.mark.parametrize(
    ("service", "action", "code", "right", "unknown"),
    [
        ("ssm", "GetParameter", "AccessDeniedException", "ssm:GetParameter", "bundles"),
        ("s3", f"GET /{BUCKET}", "AccessDenied", "s3:ListBucket", "weights"),
        ("servicediscovery", "ListInstances", "AccessDeniedException", "servicediscovery:ListInstances", "models"),
        (
            "elasticloadbalancing",
            "DescribeTargetHealth",
            "AccessDenied",
            "elasticloadbalancing:DescribeTargetHealth",
            "gateways",
        ),
        ("ec2", "DescribeInstances", "UnauthorizedOperation", "ec2:DescribeInstances", "monitor"),
    ],
)
def test_a_right_that_is_missing_is_named_and_hides_nothing_else(  # noqa: PLR0913, PLR0917 - the case
    prod: ByHand, monkeypatch: pytest.MonkeyPatch, service: str, action: str, code: str, right: str, unknown: str
) -> None:
    prod.aws.control("faults", [{"service": service, "action": action, "code": code, "status": 403, "count": 9}])
    exit_code, output, _ = fleet(prod.aws, monkeypatch, "status", "-s", "prod", "--json")
    prod.aws.control("faults", [])

    found = json.loads(output)
    assert exit_code == 1
    assert [it for it in found["problems"] if f"the right {right} is missing" in it]
    assert found[unknown] is None
    assert all(found[it] for it in ("pools", "models", "gateways", "monitor", "bundles", "weights") if it != unknown)


def test_what_is_missing_is_named(prod: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one that has the stack whole: it breaks it."""
    (node,) = prod.nodes("h100")
    prod.aws.control("capacity", {"p5.48xlarge": {ZONE: 0}})
    prod.aws.client("autoscaling").terminate_instance_in_auto_scaling_group(
        InstanceId=node, ShouldDecrementDesiredCapacity=False
    )
    prod.ec2.stop_instances(InstanceIds=[prod.monitor])
    prod.aws.client("s3").delete_object(Bucket=BUCKET, Key=prod.complete[0])
    prod.aws.client("ssm").delete_parameter(Name=parameter("prod", "engine-a100"))
    prod.aws.client("autoscaling").update_auto_scaling_group(
        AutoScalingGroupName="fleet-prod-engine-a100-spot", MaxSize=3
    )

    code, output, _ = fleet(prod.aws, monkeypatch, "status", "-s", "prod", "--json")

    fill = "`pulumi stack output fill` starts the job that brings it"
    assert code == 1
    assert json.loads(output)["problems"] == [
        "pool h100: 0 of 1 nodes serve; on-demand: no capacity (runbooks/aws-capacity.md)",
        "model chat: 0 of 4 engines are registered",
        "monitor: stopped",
        "engine-a100: nothing says what it runs",
        f"weights {prod.plan.models[0].weights}: not whole in the cache; {fill}",
        "fleet-prod-engine-a100-spot: may have 3 machines, and 1 by the stack file; `pulumi up -s prod` makes it so",
    ]
    code, output, _ = fleet(prod.aws, monkeypatch, "status", "-s", "prod")
    assert code == 1
    assert "not as planned" in output
    assert "no capacity runbooks/aws-capacity.md" in output


def test_a_stack_that_is_not_there_says_where_was_looked(prod: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, error = fleet(prod.aws, monkeypatch, "status", "-s", "dev")

    assert (code, output) == (2, "")
    assert "stack dev: is not deployed in the account 123456789012 in us-east-1\n" in error
    assert "`pulumi up -s dev` deploys it" in error
    assert "AWS_PROFILE (not set)" in error


def test_a_node_that_is_not_there_is_not_drained(prod: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = fleet(prod.aws, monkeypatch, "drain", "-s", "prod", "chat-1@i-0123456789abcdef0")

    assert code == 1
    assert "i-0123456789abcdef0: no engine node of this stack runs under this id" in error


def test_an_order_goes_to_that_node_by_run_command(prod: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes it and runs nothing: its answer is none of an agent's, which is said."""
    (node,) = prod.nodes("a100")

    code, _, error = fleet(prod.aws, monkeypatch, "drain", "-s", "prod", f"fast-1@{node}")

    (sent,) = prod.aws.client("ssm").list_commands()["Commands"]
    assert sent["DocumentName"] == "AWS-RunShellScript"
    assert node in sent["InstanceIds"]  # the stand-in adds others
    assert sent["Parameters"]["commands"] == [aws_drain.command(prod.plan.agent.port, "/engines")]
    assert code == 1
    assert f"{node}: its agent answers nonsense" in error
