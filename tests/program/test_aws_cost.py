"""What the plan counts is what the program declares: machines, disks, addresses, endpoints, and whatever else costs."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from infra import config, weights
from infra.plan.charges import BALANCER, DISKS, NETWORK, Part, parts
from infra.plan.model import FleetPlan
from infra.planning import plan_config
from infra.weights.lock import WeightsLock
from tests.program.aws_graph import Graph, config_of, graph_of

CERTIFICATE = "arn:aws:acm:us-east-1:123456789012:certificate/0a1b"
IMAGES = dict.fromkeys(("engine", "gateway", "monitor"), "ami-0123456789abcdef0")
PUBLIC = {"endpoint": "public", "clients": ["203.0.113.0/24"], "certificate": CERTIFICATE}
SEVERAL = {
    "h100": {"gpu": "h100-80gb", "instance": "p5.48xlarge", "zones": 3, "nodes": 3, "disk": "333GB"},
    "a100": {"gpu": "a100-40gb", "zones": 2, "capacity": [{"spot": 0.7}, "on-demand"]},
}
STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dev": ("dev", {}),
    "prod": ("prod", {}),
    "public, interface endpoints, several zones": (
        "prod",
        {"aws": {**PUBLIC, "network": {"interface-endpoints": True, "flow-logs": True}}, "pools": SEVERAL},
    ),
    "no way out": (
        "prod",
        {"aws": {"network": {"internet": "none", "interface-endpoints": True}, "images": {**IMAGES, "bake": False}}},
    ),
    "a network that is there": (
        "prod",
        {"aws": {"network": {"vpc": "vpc-0123456789abcdef0", "subnets": ["subnet-01234567", "subnet-89abcdef"]}}},
    ),
}
FREE = frozenset(
    {
        *("Vpc", "Subnet", "RouteTable", "Route", "RouteTableAssociation", "InternetGateway", "FlowLog"),
        *("DefaultSecurityGroup", "SecurityGroup", "SecurityGroupIngressRule", "SecurityGroupEgressRule"),
        *("Role", "RolePolicy", "InstanceProfile", "LaunchTemplate", "Group", "LifecycleHook", "VolumeAttachment"),
        *("TargetGroup", "Listener", "Certificate", "CertificateValidation", "Record", "Service", "Bucket"),
        *("BucketVersioning", "BucketServerSideEncryptionConfiguration", "BucketPublicAccessBlock", "BucketPolicy"),
        *("BucketOwnershipControls", "BucketLifecycleConfiguration", "SecretVersion", "Parameter", "Document"),
        *("Association", "EventRule", "EventTarget", "Permission"),
    }
)
"""Kinds of resources that cost nothing by themselves (AWS's pricing pages, 2026-11): a group's machines are counted."""
BY_USE = frozenset({"LogGroup", "Project", "Function", "BucketObjectv2"})
"""Kinds that cost by use alone; files beside the weights have kilobytes."""
COUNTED = frozenset(
    {
        *("NatGateway", "Eip", "VpcEndpoint", "LoadBalancer", "Instance", "Volume", "Key", "Secret"),
        "PrivateDnsNamespace",
    }
)


@pytest.fixture(scope="module", params=STACKS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FleetPlan, Graph]:
    """A stack's plan, and what its program declares."""
    name, changes = STACKS[request.param]
    written = config_of(name, budget={"usd_per_hour": 1_000_000}, **changes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        graph = graph_of(monkeypatch, tmp_path_factory.mktemp("fleet"), name, written)
    return plan_of(name, written), graph


def plan_of(name: str, written: dict[str, Any]) -> FleetPlan:
    """The plan of a config as Pulumi hands it over."""
    texts = {key: it if isinstance(it, str) else json.dumps(it) for key, it in written.items()}
    wanted = config.from_pulumi(texts)
    return plan_config(name, wanted, weights.load(), wanted.api_keys)


def counted(plan: FleetPlan) -> tuple[Part, ...]:
    assert plan.on_aws
    lock: WeightsLock = weights.load()
    return parts(plan.on_aws, plan.pools, [lock.models[entry].size for entry in {it.weights for it in plan.models}])


def count(found: tuple[Part, ...], charge: str, line: str = "") -> float:
    return sum(it.count for it in found if it.charge == charge and line in {"", it.line})


def machines(graph: Graph) -> Counter[str]:
    """Machines that groups want all the time, by type, and the monitor."""
    types = {made.name: made.inputs["instanceType"] for made in graph.of("LaunchTemplate")}
    found = Counter({made.inputs["instanceType"]: 1 for made in graph.of("Instance")})
    for group in graph.of("Group"):
        found[types[group.name]] += int(group.inputs["minSize"])
    return +found


def disks(graph: Graph) -> int:
    """GiB of every volume."""
    sizes = {
        made.name: int(made.inputs["blockDeviceMappings"][0]["ebs"]["volumeSize"])
        for made in graph.of("LaunchTemplate")
    }
    roots = sum(int(group.inputs["minSize"]) * sizes[group.name] for group in graph.of("Group"))
    monitors = sum(int(made.inputs["rootBlockDevice"]["volumeSize"]) for made in graph.of("Instance"))
    return roots + monitors + sum(int(made.inputs["size"]) for made in graph.of("Volume"))


def test_the_plan_counts_what_the_program_declares(made: tuple[FleetPlan, Graph]) -> None:
    plan, graph = made
    found = counted(plan)
    interfaces = [it for it in graph.of("VpcEndpoint") if it.inputs["vpcEndpointType"] == "Interface"]
    (balancer,) = graph.of("LoadBalancer")
    addresses = 0 if balancer.inputs["internal"] else len(balancer.inputs["subnets"])
    assert plan.cost

    assert count(found, "network-load-balancer") == 1
    assert count(found, "public-ipv4", BALANCER) == addresses
    assert count(found, "public-ipv4", NETWORK) == len(graph.of("Eip"))
    assert count(found, "nat-gateway") == len(graph.of("NatGateway"))
    assert count(found, "interface-endpoint") == sum(len(it.inputs["subnetIds"]) for it in interfaces)
    assert count(found, "gp3", DISKS) == disks(graph)
    assert count(found, "kms-key") == len(graph.of("Key"))
    assert count(found, "secret") == len(graph.of("Secret"))
    assert count(found, "hosted-zone") == len(graph.of("PrivateDnsNamespace"))
    assert count(found, "registered-engine") == sum(it.engines for it in plan.engine_sets)
    rented: Counter[str] = Counter()
    for line in plan.cost.lines:
        rented[line.instance] += line.count
    assert +rented == machines(graph)


def test_the_cache_is_counted_with_the_weights_that_it_is_filled_with(made: tuple[FleetPlan, Graph]) -> None:
    plan, graph = made
    entries = json.loads(graph.one("BucketObjectv2", "fill-request").inputs["content"])["entries"]
    sizes = sum(weights.load().models[entry].size for entry in entries)
    assert count(counted(plan), "s3-standard") == pytest.approx(sizes / 2**30)


def test_nothing_is_declared_of_which_nobody_knows_what_it_costs(made: tuple[FleetPlan, Graph]) -> None:
    _, graph = made
    kinds = {it.type for it in graph.resources if it.kind.startswith("aws:")}
    assert kinds <= FREE | BY_USE | COUNTED
