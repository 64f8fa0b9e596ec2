"""Properties that every resource of a stack on AWS has, whatever the stack."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.program.aws_graph import KEY_HASH, Graph, config_of, graph_of

ANYWHERE = "0.0.0.0/0"
NO_TAGS = {
    *("BucketVersioning", "BucketServerSideEncryptionConfiguration", "BucketPublicAccessBlock"),
    *("BucketOwnershipControls", "BucketPolicy", "BucketLifecycleConfiguration", "RolePolicy", "SecretVersion"),
    *("Route", "RouteTableAssociation", "Record", "LifecycleHook", "VolumeAttachment", "EventTarget"),
    *("CertificateValidation", "Permission"),
}
"""Types that AWS has no tags for."""
PUBLIC: dict[str, Any] = {
    "aws": {
        "endpoint": "public",
        "clients": ["203.0.113.0/24", ANYWHERE],
        "hosted-zone": "Z0123456789ABC",
        "tags": {"team": "ml"},
        "network": {"interface-endpoints": True, "flow-logs": True},
        "permissions-boundary": "arn:aws:iam::123456789012:policy/boundary",
        "hub-token-arn": "arn:aws:secretsmanager:us-east-1:123456789012:secret:hub-AbCdEf",
    },
    "gateway": {"hosts": 2, "hostname": "llm.example.com"},
}
FOUND: dict[str, Any] = {"aws": {"network": {"vpc": "vpc-0123456789abcdef0", "subnets": ["subnet-0123456789abcdef0"]}}}
STACKS: dict[str, dict[str, Any]] = {
    "dev": config_of("dev"),
    "prod": config_of("prod"),
    "prod, public": config_of("prod", **PUBLIC),
    "prod in a network that is there": config_of("prod", **FOUND),
}


@pytest.fixture(scope="module", params=STACKS)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        return graph_of(patch, tmp_path_factory.mktemp("aws"), name.partition(",")[0].partition(" ")[0], STACKS[name])


def test_everything_has_the_tags_of_the_fleet(graph: Graph) -> None:
    for made in graph.resources:
        if not made.kind.startswith("aws:") or made.type in NO_TAGS:
            continue
        tags = made.inputs.get("tags", {})
        found = {tag["key"] for tag in tags} if isinstance(tags, list) else set(tags)
        assert {"vllm-fleet:stack", "vllm-fleet:role"} <= found, f"{made.kind} {made.name}"


def test_nothing_is_open_to_the_world_but_the_endpoint_to_its_clients(graph: Graph) -> None:
    for made in graph.of("SecurityGroupIngressRule"):
        if ANYWHERE in made.text:
            assert made.name == f"clients-{ANYWHERE}"
            assert made.inputs["fromPort"] == made.inputs["toPort"] == 443
        else:
            assert "referencedSecurityGroupId" in made.inputs or made.name.startswith("clients-")
    for made in graph.of("SecurityGroup"):
        assert "ingress" not in made.inputs
        assert "egress" not in made.inputs
    for made in graph.of("SecurityGroupEgressRule"):
        assert made.inputs["ipProtocol"] == "tcp"
        if ANYWHERE in made.text:
            assert made.inputs["fromPort"] in {80, 443}
    for made in graph.of("Subnet"):
        assert made.inputs["mapPublicIpOnLaunch"] is False


def test_machines_show_their_role_to_nobody_else_and_have_no_address_in_the_internet(graph: Graph) -> None:
    for made in [*graph.of("LaunchTemplate"), *graph.of("Instance")]:
        options = made.inputs["metadataOptions"]
        assert (options["httpTokens"], options["httpPutResponseHopLimit"]) == ("required", 1)
        assert options["instanceMetadataTags"] == "enabled"
        assert "keyName" not in made.inputs
    for made in graph.of("LaunchTemplate"):
        assert [it["associatePublicIpAddress"] for it in made.inputs["networkInterfaces"]] == ["false"]


def test_every_disk_and_every_object_is_encrypted(graph: Graph) -> None:
    for made in graph.of("LaunchTemplate"):
        assert all(it["ebs"]["encrypted"] == "true" for it in made.inputs["blockDeviceMappings"])
    for made in graph.of("Instance"):
        assert made.inputs["rootBlockDevice"]["encrypted"] is True
    assert all(made.inputs["encrypted"] is True for made in graph.of("Volume"))
    (rules,) = graph.of("BucketServerSideEncryptionConfiguration")
    assert rules.inputs["rules"][0]["applyServerSideEncryptionByDefault"]["sseAlgorithm"] == "aws:kms"
    assert len(graph.of("Bucket")) == len(graph.of("BucketPublicAccessBlock")) == 1
    assert json.loads(graph.of("BucketPolicy")[0].inputs["policy"])["Statement"][0]["Effect"] == "Deny"
    assert all(made.inputs["enableKeyRotation"] for made in graph.of("Key"))
    assert all("kmsKeyId" in made.inputs for made in graph.of("Secret"))


def test_hashes_of_keys_are_in_one_secret_and_nowhere_else(graph: Graph) -> None:
    holders = [made for made in graph.resources if KEY_HASH in made.text]

    assert [f"{made.type} {made.name}" for made in holders] == ["SecretVersion gateway"]
    assert all(KEY_HASH not in text for _, text in graph.user_data())
    assert KEY_HASH not in json.dumps({key: str(value) for key, value in graph.exports.items()})


def test_user_data_is_small_and_holds_no_secret(graph: Graph) -> None:
    for name, text in graph.user_data():
        assert text.startswith("#cloud-config"), name
        assert len(text.encode()) <= 16384, name
        for word in ("sha256:", "password", "AKIA", "PRIVATE KEY"):
            assert word not in text, name


def test_what_holds_data_outlives_the_stack_unless_it_says_otherwise(graph: Graph) -> None:
    (bucket,), (key,) = graph.of("Bucket"), graph.of("Key")
    kept = bucket.inputs["forceDestroy"] is False
    assert key.inputs["deletionWindowInDays"] == (30 if kept else 7)


def test_roles_act_on_named_things(graph: Graph) -> None:
    """`*` stands alone only where AWS knows no narrower resource."""
    anything = {
        *("servicediscovery:GetOperation", "route53:ListHostedZonesByName"),
        *(f"servicediscovery:{it}" for it in ("DiscoverInstances", "ListNamespaces", "ListServices", "ListInstances")),
        *("ec2:DescribeInstances", "ec2:DescribeAvailabilityZones"),
        *("autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeScalingActivities"),
    }
    for made in graph.of("RolePolicy"):
        for statement in json.loads(made.inputs["policy"])["Statement"]:
            actions = statement["Action"]
            assert not any(action.endswith("*") for action in actions), made.name
            if statement["Resource"] == "*":
                free = [it for it in actions if it.split(":")[0] not in {"ssmmessages", "ec2messages", "ssm"}]
                assert set(free) <= anything, made.name
                assert not {"ssm:GetParameter", "ssm:GetParameters", "ssm:SendCommand"} & set(actions), made.name
    assert not graph.of("RolePolicyAttachment")


def test_groups_pin_their_template_and_never_want_a_spare_gpu(graph: Graph) -> None:
    for made in graph.of("Group"):
        spec = made.inputs.get("launchTemplate") or made.inputs["mixedInstancesPolicy"]["launchTemplate"]
        version = spec.get("version") or spec["launchTemplateSpecification"]["version"]
        assert version == "1", made.name
        preferences = made.inputs["instanceRefresh"]["preferences"]
        assert preferences["autoRollback"] is True
        assert made.inputs["waitForCapacityTimeout"] == "0"
        if made.name != "gateway":
            assert made.inputs["instanceMaintenancePolicy"]["maxHealthyPercentage"] == 100
            assert preferences["maxHealthyPercentage"] == 100
            assert "desiredCapacity" not in made.inputs


def test_a_boundary_is_on_every_role(graph: Graph) -> None:
    wanted = {made.inputs.get("permissionsBoundary") for made in graph.of("Role")}
    assert len(wanted) == 1
