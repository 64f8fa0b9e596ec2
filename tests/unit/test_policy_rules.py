"""The rules of the policy pack, on single resources; tests/aws/test_policies.py runs the pack in the real engine."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from infra.paths import ROOT

OWN = {"vllm-fleet:stack": "prod", "vllm-fleet:role": "gateway"}
BALANCER = {**OWN, "vllm-fleet:role": "balancer"}
KMS = {"applyServerSideEncryptionByDefault": {"sseAlgorithm": "aws:kms"}}
CLOSED = dict.fromkeys(("blockPublicAcls", "blockPublicPolicy", "ignorePublicAcls", "restrictPublicBuckets"), True)


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("policy_rules", ROOT / "policy/rules.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ingress(
    cidr: str, first: int = 443, last: int = 443, tags: Any = BALANCER, key: str = "cidrIpv4"
) -> dict[str, Any]:
    return {key: cidr, "fromPort": first, "toPort": last, "tags": tags}


INGRESS = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule"


@pytest.mark.parametrize(
    ("kind", "props", "wrong"),
    [
        (INGRESS, ingress("0.0.0.0/0"), False),
        (INGRESS, ingress("0.0.0.0/0", 80, 80), False),
        (INGRESS, ingress("203.0.113.0/24", 22, 22, OWN), False),
        (INGRESS, {"referencedSecurityGroupId": "sg-1", "fromPort": 8000, "toPort": 8007, "tags": OWN}, False),
        (INGRESS, ingress("0.0.0.0/0", tags=OWN), True),
        (INGRESS, ingress("::/0", tags=OWN, key="cidrIpv6"), True),
        (INGRESS, ingress("0.0.0.0/0", 22, 22), True),
        (INGRESS, ingress("0.0.0.0/0", 0, 65535), True),
        ("aws:ec2/securityGroup:SecurityGroup", {"ingress": [{"cidrBlocks": ["0.0.0.0/0"]}]}, True),
        ("aws:ec2/securityGroup:SecurityGroup", {"egress": [{"cidrBlocks": ["0.0.0.0/0"]}]}, False),
        ("aws:ec2/securityGroupRule:SecurityGroupRule", {"type": "ingress", "ipv6CidrBlocks": ["::/0"]}, True),
        ("aws:ec2/securityGroupRule:SecurityGroupRule", {"type": "egress", "cidrBlocks": ["0.0.0.0/0"]}, False),
        ("aws:ec2/subnet:Subnet", {"mapPublicIpOnLaunch": True}, True),
        ("aws:ec2/subnet:Subnet", {"mapPublicIpOnLaunch": False}, False),
        ("aws:ec2/instance:Instance", {"associatePublicIpAddress": True}, True),
        ("aws:ec2/launchTemplate:LaunchTemplate", {"networkInterfaces": [{"associatePublicIpAddress": "true"}]}, True),
        (
            "aws:ec2/launchTemplate:LaunchTemplate",
            {"networkInterfaces": [{"associatePublicIpAddress": "false"}]},
            False,
        ),
        ("aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock", CLOSED, False),
        ("aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock", {**CLOSED, "ignorePublicAcls": False}, True),
    ],
)
def test_nothing_but_the_endpoint_is_open(rules: ModuleType, kind: str, props: dict[str, Any], *, wrong: bool) -> None:
    assert bool(list(rules.open_ports(kind, "it", props))) is wrong


@pytest.mark.parametrize(
    ("kind", "props", "wrong"),
    [
        ("aws:ebs/volume:Volume", {"encrypted": True}, False),
        ("aws:ebs/volume:Volume", {}, True),
        ("aws:ec2/instance:Instance", {"rootBlockDevice": {"encrypted": True}}, False),
        ("aws:ec2/instance:Instance", {}, True),
        ("aws:ec2/instance:Instance", {"rootBlockDevice": {"encrypted": True}, "ebsBlockDevices": [{}]}, True),
        ("aws:ec2/launchTemplate:LaunchTemplate", {"blockDeviceMappings": [{"ebs": {"encrypted": "true"}}]}, False),
        ("aws:ec2/launchTemplate:LaunchTemplate", {"blockDeviceMappings": [{"ebs": {"encrypted": "false"}}]}, True),
        ("aws:ec2/launchTemplate:LaunchTemplate", {}, True),
        ("aws:imagebuilder/imageRecipe:ImageRecipe", {"blockDeviceMappings": [{"ebs": {}}]}, True),
        ("aws:s3/bucketServerSideEncryptionConfiguration:B", {"rules": [KMS]}, False),
        ("aws:s3/bucketServerSideEncryptionConfiguration:B", {"rules": [{}]}, True),
        ("aws:secretsmanager/secret:Secret", {"kmsKeyId": "arn"}, False),
        ("aws:secretsmanager/secret:Secret", {}, True),
        ("aws:kms/key:Key", {"enableKeyRotation": True}, False),
        ("aws:kms/key:Key", {}, True),
        ("aws:ec2/vpc:Vpc", {}, False),
    ],
)
def test_what_is_written_is_encrypted(rules: ModuleType, kind: str, props: dict[str, Any], *, wrong: bool) -> None:
    assert bool(list(rules.encryption(kind, "it", props))) is wrong


def test_everything_that_can_have_tags_has_them(rules: ModuleType) -> None:
    def missing(kind: str, tags: Any, required: tuple[str, ...] = ()) -> list[str]:
        return list(rules.tagging(kind, "it", {"tags": tags}, required))

    group = [{"key": key, "value": value} for key, value in OWN.items()]
    assert missing("aws:ec2/vpc:Vpc", OWN) == []
    assert missing("aws:autoscaling/group:Group", group) == []
    assert missing("aws:ec2/vpc:Vpc", {"vllm-fleet:stack": "a"}) == ["it has no tag vllm-fleet:role"]
    assert missing("aws:ec2/vpc:Vpc", None) == ["it has no tag vllm-fleet:role, vllm-fleet:stack"]
    assert missing("aws:ec2/vpc:Vpc", OWN, ("team",)) == ["it has no tag team"]
    assert missing("aws:s3/bucketObjectv2:BucketObjectv2", OWN, ("team",)) == []
    assert missing("aws:ec2/route:Route", None) == []
    assert missing("vllm-fleet:aws:Cache", None) == []


def test_each_bucket_has_its_parts(rules: ModuleType) -> None:
    bucket: tuple[str, str, dict[str, Any]] = ("aws:s3/bucket:Bucket", "b", {})
    parts: list[tuple[str, str, dict[str, Any]]] = [
        ("aws:s3/bucketServerSideEncryptionConfiguration:B", "b", {}),
        ("aws:s3/bucketPublicAccessBlock:B", "b", {}),
    ]
    assert list(rules.buckets([bucket, *parts])) == []
    assert len(list(rules.buckets([bucket]))) == 2
    assert len(list(rules.buckets([bucket, bucket, *parts]))) == 2


@pytest.mark.parametrize(
    ("cost", "limit", "wrong"),
    [
        (1.0, 2.0, False),
        (2.0, 2.0, False),
        (2.01, 2.0, True),
        (None, 2.0, True),
        (9.0, None, False),
        (None, None, False),
    ],
)
def test_the_fleet_costs_no_more_than_it_may(
    rules: ModuleType, cost: float | None, limit: float | None, *, wrong: bool
) -> None:
    assert bool(list(rules.budget(cost, limit))) is wrong
