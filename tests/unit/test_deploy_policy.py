"""The policy of who deploys: how it is made from recorded calls, and that the one in docs/ is usable."""

from __future__ import annotations

import json

import pytest

from infra.paths import ROOT
from tests.aws import deploy_policy
from tests.aws.deploy_policy import FILE, LIMIT, action, policy, size

CALLS = [
    ["ec2", "CreateVpc", 200],
    ["ec2", "CreateLaunchTemplate", 200],
    ["s3", "PUT /fleet-prod-1", 200],
    ["elbv2", "CreateLoadBalancer", 200],
    ["iam", "CreateRole", 200],
    ["iam", "DeleteUser", 403],
    ["autoscaling", "DescribeAutoScalingGroups", 200],
    ["autoscaling", "CreateAutoScalingGroup", 200],
    ["ec2", "TerminateInstances", 200],
    ["kms", "ScheduleKeyDeletion", 200],
]


@pytest.mark.parametrize(
    ("service", "operation", "named"),
    [
        ("elbv2", "CreateListener", "elasticloadbalancing:CreateListener"),
        ("s3", "PUT /bucket", "s3:PutEncryptionConfiguration"),
        ("ec2", "CreateVpc", "ec2:CreateVpc"),
    ],
)
def test_actions_are_called_as_iam_calls_them(service: str, operation: str, named: str) -> None:
    assert named in action(service, operation)


def test_what_was_used_is_allowed_and_what_was_refused_is_not() -> None:
    allowed = next(it["Action"] for it in policy(CALLS)["Statement"] if it["Sid"] == "WhatAStackTakes")

    assert {"ec2:CreateVpc", "s3:PutLifecycleConfiguration", "iam:CreateRole"} <= set(allowed)
    assert "iam:DeleteUser" not in allowed
    assert len(allowed) == len(set(allowed))


def test_what_has_other_names_or_lacks_the_fleets_tag_is_denied() -> None:
    denied = {it["Sid"]: it for it in policy(CALLS)["Statement"] if it["Effect"] == "Deny"}
    by_name, by_tag = denied["OnlyWhatHasTheFleetsNames"], denied["EndsOnlyWhatHasTheFleetsTag"]

    assert {"iam:CreateRole", "s3:PutLifecycleConfiguration", "s3:GetObject"} <= set(by_name["Action"])
    assert {"arn:*:s3:::fleet-*", "arn:*:iam::*:role/vllm-fleet/*"} <= set(by_name["NotResource"])
    assert "autoscaling:CreateAutoScalingGroup" in by_name["Action"]
    assert "autoscaling:DescribeAutoScalingGroups" not in by_name["Action"]
    assert "ec2:TerminateInstances" not in by_name["Action"]
    assert set(by_tag["Action"]) >= {"ec2:TerminateInstances", "kms:ScheduleKeyDeletion"}


def test_roles_are_passed_to_services_of_aws_alone_and_only_the_fleets_own() -> None:
    passing = [it for it in policy(CALLS)["Statement"] if it["Action"] == "iam:PassRole"]

    assert len(passing) == 1
    assert passing[0]["Resource"] == "arn:*:iam::*:role/vllm-fleet/*"
    assert "ec2.amazonaws.com" in passing[0]["Condition"]["StringEquals"]["iam:PassedToService"]
    others = [it["Action"] for it in policy(CALLS)["Statement"] if it["Action"] != "iam:PassRole"]
    assert all("iam:PassRole" not in actions for actions in others)


def test_the_policy_in_docs_is_one_that_iam_takes() -> None:
    written = json.loads(FILE.read_text(encoding="utf-8"))

    assert {"ec2:CreateVpc", "autoscaling:CreateAutoScalingGroup"} <= {
        it for statement in written["Statement"] for it in statement["Action"]
    }
    wide = [it for statement in written["Statement"] for it in statement["Action"] if "*" in it and len(it) > 1]
    assert all(it.endswith((":Describe*", ":Get*", ":List*")) for it in wide)
    assert not any(it.startswith(("s3", "ssm", "secretsmanager", "kms")) for it in wide)
    assert size(written) <= LIMIT


def test_the_policy_in_docs_is_made_of_the_recorded_life_of_prod() -> None:
    calls = json.loads((ROOT / "tests/aws/recorded-calls.json").read_text(encoding="utf-8"))

    assert FILE.read_text(encoding="utf-8") == deploy_policy.text(calls)
