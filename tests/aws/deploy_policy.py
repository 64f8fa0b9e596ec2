"""The policy of who deploys: from the calls that the stand-in recorded while a stack was made, edited and destroyed.

    python -m tests.aws.deploy_policy CALLS.json           # prints the policy; CALLS.json is what GET /_ctl/calls said
    python -m tests.aws.deploy_policy CALLS.json --write   # puts it into docs/aws-deploy-policy.json

The stand-in names actions as the API does. Where IAM calls them otherwise, or wants more than the API's own action, the
tables below say so. One statement allows what was asked for; others deny what of that is not the fleet's: by name where
all that the fleet makes has one by which it is known, by tag where something ends. A denial holds whatever else the
role that deploys is allowed.
"""
# ruff: noqa: T201 - its output is the policy

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from infra.paths import ROOT

FILE = ROOT / "docs" / "aws-deploy-policy.json"
DENIED = 403
LIMIT = 10_240
"""Characters of all inline policies of a role, white space aside (IAM user guide, quotas, 2026-11)."""
PREFIXES = {
    "elbv2": "elasticloadbalancing",
    "elb": "elasticloadbalancing",
    "events": "events",
    "monitoring": "cloudwatch",
    "resourcegroupstaggingapi": "tag",
}
"""Service of the API to the prefix of its actions, where they differ."""
S3 = [
    *("CreateBucket", "DeleteBucket", "DeleteBucketPolicy", "DeleteObject", "DeleteObjectVersion"),
    *("GetAccelerateConfiguration", "GetBucketAcl", "GetBucketCORS", "GetBucketLocation", "GetBucketLogging"),
    *("GetBucketNotification", "GetBucketObjectLockConfiguration", "GetBucketOwnershipControls", "GetBucketPolicy"),
    *("GetBucketPublicAccessBlock", "GetBucketRequestPayment", "GetBucketTagging", "GetBucketVersioning"),
    *("GetBucketWebsite", "GetEncryptionConfiguration", "GetLifecycleConfiguration", "GetObject", "GetObjectTagging"),
    *(
        "GetReplicationConfiguration",
        "ListBucket",
        "ListBucketVersions",
        "ListTagsForResource",
        "PutBucketNotification",
    ),
    *("PutBucketOwnershipControls", "PutBucketPolicy", "PutBucketPublicAccessBlock", "PutBucketTagging"),
    *(
        "PutBucketVersioning",
        "PutEncryptionConfiguration",
        "PutLifecycleConfiguration",
        "PutObject",
        "PutObjectTagging",
    ),
    *("TagResource", "UntagResource"),
    *("HeadBucket", "HeadObject"),  # of the stand-in alone: IAM asks for ListBucket and GetObject
]
"""What a bucket with its settings and objects takes. The record has methods and paths of S3, not what was asked for."""
BESIDE = {
    # What AWS asks for besides, on behalf of whoever asks: nothing on the wire shows it.
    "ec2:RunInstances": ["iam:PassRole", "ec2:CreateTags"],
    "ec2:CreateLaunchTemplate": ["ec2:CreateTags", "ec2:RunInstances", "iam:PassRole"],
    "autoscaling:CreateAutoScalingGroup": ["iam:CreateServiceLinkedRole", "ec2:RunInstances", "ec2:CreateTags"],
    "elasticloadbalancing:CreateLoadBalancer": ["iam:CreateServiceLinkedRole", "elasticloadbalancing:AddTags"],
    "codebuild:CreateProject": ["iam:PassRole"],
    "events:PutTargets": ["iam:PassRole"],
    "ec2:CreateFlowLogs": ["iam:PassRole"],
    "secretsmanager:CreateSecret": ["kms:GenerateDataKey", "kms:Decrypt"],
    "s3:PutObject": ["kms:GenerateDataKey", "kms:Decrypt"],
    "servicediscovery:CreatePrivateDnsNamespace": [
        *("route53:CreateHostedZone", "route53:GetHostedZone", "route53:ListHostedZonesByName"),
        *("ec2:DescribeVpcs", "ec2:DescribeRegions", "route53:AssociateVPCWithHostedZone"),
    ],
    "servicediscovery:DeleteNamespace": ["route53:DeleteHostedZone"],
}
NOT_RECORDED = {
    # Parts that the recorded stack does not have: the stand-in refuses them, or cannot give what they need. By the API
    # references of their services, 2026-11.
    "acm": [
        "AddTagsToCertificate",
        "DeleteCertificate",
        "DescribeCertificate",
        "ListTagsForCertificate",
        "RequestCertificate",
    ],
    "imagebuilder": [
        f"{verb}{what}"
        for what in (
            "Component",
            "ImageRecipe",
            "InfrastructureConfiguration",
            "DistributionConfiguration",
            "ImagePipeline",
        )
        for verb in ("Create", "Delete", "Get")
    ]
    + ["ListTagsForResource", "TagResource", "UntagResource", "UpdateDistributionConfiguration"]
    + ["UpdateImagePipeline", "UpdateInfrastructureConfiguration"],
    "route53": [
        "ChangeResourceRecordSets",
        "GetChange",
        "GetHostedZone",
        "ListResourceRecordSets",
        "ListTagsForResource",
    ],
    "ssm": ["CreateAssociation", "DeleteAssociation", "DescribeAssociation", "UpdateAssociation", "UpdateDocument"],
    # Edits that the recorded one did not have.
    "ec2": ["CreateLaunchTemplateVersion", "DeleteTags", "ModifyLaunchTemplate", "ModifyVpcEndpoint"],
    "elasticloadbalancing": ["DescribeListenerAttributes", "ModifyListener", "ModifyListenerAttributes", "RemoveTags"],
    "autoscaling": [
        *("CancelInstanceRefresh", "CreateOrUpdateTags", "DeleteTags", "DescribeInstanceRefreshes"),
        *("DescribeScalingActivities", "StartInstanceRefresh"),
    ],
    "iam": ["UpdateAssumeRolePolicy", "UntagRole", "UntagInstanceProfile"],
    "kms": ["UntagResource"],
    "secretsmanager": ["UntagResource", "UpdateSecret"],
    "servicediscovery": ["UntagResource", "UpdateService"],
}
ALWAYS = ["servicequotas:GetServiceQuota", "servicequotas:GetAWSDefaultServiceQuota", "sts:GetCallerIdentity"]
"""What the program itself asks in a preview."""
NAMED = {
    "iam": ["arn:*:iam::*:role/vllm-fleet/*", "arn:*:iam::*:instance-profile/vllm-fleet/*"],
    "s3": ["arn:*:s3:::fleet-*"],
    "secretsmanager": ["arn:*:secretsmanager:*:*:secret:vllm-fleet/*"],
    "ssm": ["arn:*:ssm:*:*:parameter/vllm-fleet/*", "arn:*:ssm:*:*:document/apply-*", "arn:*:ssm:*:*:association/*"],
    "autoscaling": ["arn:*:autoscaling:*:*:autoScalingGroup:*:autoScalingGroupName/fleet-*"],
    "logs": ["arn:*:logs:*:*:log-group:/vllm-fleet/*"],
}
"""Services in which all that the fleet makes has a name by which it is known."""
TAGGED = ("ec2", "elasticloadbalancing", "kms")
"""Services in which what the fleet makes is known by its tag."""
ENDS = ("Delete", "Terminate", "Stop", "Release", "Schedule")
READS = ("Describe", "Get", "List", "Head")
SECRET = {"s3:GetObject", "secretsmanager:GetSecretValue", "secretsmanager:GetResourcePolicy"}
"""Reads that show what others keep."""
WHOLE = ("ec2", "elasticloadbalancing", "autoscaling", "imagebuilder", "route53", "servicediscovery", "events", "iam")
"""Services of which one verb of reading is allowed whole, where several of its actions were asked for: they show
settings, and IAM counts characters."""
ANYWHERE = {"iam:CreateServiceLinkedRole", "s3:ListAllMyBuckets"}


def action(service: str, operation: str) -> list[str]:
    """What IAM calls an operation; several where the record does not tell them apart."""
    if service == "s3":
        return [f"s3:{it}" for it in S3]
    return [f"{PREFIXES.get(service, service)}:{operation}"]


def actions(calls: Iterable[Sequence[Any]]) -> list[str]:
    """Every action that was asked for and not denied, and what comes with it."""
    used = {
        it for service, operation, status, *_ in calls if int(status) != DENIED for it in action(service, operation)
    }
    beside = {it for name in used for it in BESIDE.get(name, ())}
    unseen = {f"{service}:{it}" for service, names in NOT_RECORDED.items() for it in names}
    return sorted(used | beside | unseen | set(ALWAYS))


def shorter(names: Iterable[str]) -> list[str]:
    """The same with one verb of reading for several actions."""
    by_verb: dict[str, list[str]] = defaultdict(list)
    for name in names:
        service, _, operation = name.partition(":")
        verb = next((it for it in READS if operation.startswith(it)), None)
        by_verb[f"{service}:{verb}*" if verb and service in WHOLE else name].append(name)
    return sorted(short if len(them) > 1 else them[0] for short, them in by_verb.items())


def policy(calls: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """The policy document."""
    names = [it for it in actions(calls) if it != "iam:PassRole"]
    by_name, by_tag = [], []
    for name in names:
        service, _, operation = name.partition(":")
        if service in NAMED and name not in ANYWHERE and (not operation.startswith(READS) or name in SECRET):
            by_name.append(name)
        if service in TAGGED and operation.startswith(ENDS) and operation != "DeleteTags":
            by_tag.append(name)
    services = ["ec2", "autoscaling", "codebuild", "events", "vpc-flow-logs"]
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "WhatAStackTakes", "Effect": "Allow", "Action": shorter(names), "Resource": "*"},
            {
                "Sid": "OnlyWhatHasTheFleetsNames",
                "Effect": "Deny",
                "Action": by_name,
                "NotResource": sorted(it for arns in NAMED.values() for it in arns),
            },
            {
                "Sid": "EndsOnlyWhatHasTheFleetsTag",
                "Effect": "Deny",
                "Action": by_tag,
                "Resource": "*",
                "Condition": {"Null": {"aws:ResourceTag/vllm-fleet:stack": "true"}},
            },
            {
                "Sid": "PassesOnlyTheFleetsRoles",
                "Effect": "Allow",
                "Action": "iam:PassRole",
                "Resource": NAMED["iam"][0],
                "Condition": {"StringEquals": {"iam:PassedToService": [f"{it}.amazonaws.com" for it in services]}},
            },
        ],
    }


def size(document: dict[str, Any]) -> int:
    """Characters as IAM counts them."""
    return len(json.dumps(document, separators=(",", ":")))


def text(calls: Iterable[Sequence[Any]]) -> str:
    """The file."""
    return json.dumps(policy(calls), indent=1) + "\n"


def main() -> None:
    """The command line."""
    made = text(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if "--write" in sys.argv[2:]:
        FILE.write_text(made, encoding="utf-8")
    else:
        print(made, end="")


if __name__ == "__main__":
    main()
