"""The policy of who deploys: from the calls that the stand-in recorded while a stack was made, edited and destroyed.

    python -m tests.aws.deploy_policy CALLS.json           # prints the policy; CALLS.json is what GET /_ctl/calls said
    python -m tests.aws.deploy_policy CALLS.json --write   # puts it into docs/aws-deploy-policy.json

The stand-in names actions as the API does. Where IAM calls them otherwise, or wants more than the API's own action, the
tables below say so. Resources are narrowed where the fleet's names allow it; elsewhere `*` stands.
"""
# ruff: noqa: T201 - its output is the policy

from __future__ import annotations

import json
import re
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
LAMBDA = {
    r"POST .*/functions$": "CreateFunction",
    r"GET .*/functions/[^/]+$": "GetFunction",
    r"DELETE .*/functions/[^/]+$": "DeleteFunction",
    r"GET .*/versions$": "ListVersionsByFunction",
    r"GET .*/code-signing-config$": "GetFunctionCodeSigningConfig",
    r"PUT .*/concurrency$": "PutFunctionConcurrency",
    r"GET .*/policy$": "GetPolicy",
    r"POST .*/policy$": "AddPermission",
    r"DELETE .*/policy/[^/]+$": "RemovePermission",
    r"PUT .*/code$": "UpdateFunctionCode",
    r"PUT .*/configuration$": "UpdateFunctionConfiguration",
}
"""Actions by method and path, which is how the record has them."""
BESIDE = {
    # What AWS asks for besides, on behalf of whoever asks: nothing on the wire shows it.
    "ec2:RunInstances": ["iam:PassRole", "ec2:CreateTags"],
    "ec2:CreateLaunchTemplate": ["ec2:CreateTags", "ec2:RunInstances", "iam:PassRole"],
    "autoscaling:CreateAutoScalingGroup": ["iam:CreateServiceLinkedRole", "ec2:RunInstances", "ec2:CreateTags"],
    "elasticloadbalancing:CreateLoadBalancer": ["iam:CreateServiceLinkedRole", "elasticloadbalancing:AddTags"],
    "lambda:CreateFunction": ["iam:PassRole"],
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
    "lambda": ["ListTags", "TagResource", "UntagResource", "UpdateFunctionCode", "UpdateFunctionConfiguration"],
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
    "s3": ["arn:*:s3:::fleet-*", "arn:*:s3:::fleet-*/*"],
    "secretsmanager": ["arn:*:secretsmanager:*:*:secret:vllm-fleet/*"],
    "lambda": ["arn:*:lambda:*:*:function:fleet-*"],
    "autoscaling": ["arn:*:autoscaling:*:*:autoScalingGroup:*:autoScalingGroupName/fleet-*"],
    "logs": ["arn:*:logs:*:*:log-group:/vllm-fleet/*"],
}
"""Services in which all that the fleet makes has a name by which it is known."""
READS = ("Describe", "Get", "List", "Head")
ANYWHERE = {"iam:CreateServiceLinkedRole", "s3:ListAllMyBuckets", "logs:DescribeLogGroups"}


def action(service: str, operation: str) -> list[str]:
    """What IAM calls an operation; several where the record does not tell them apart.

    Raises:
        ValueError: A path that no table has.
    """
    if service == "s3":
        return [f"s3:{it}" for it in S3]
    if service == "lambda" and " " in operation:
        found = [name for pattern, name in LAMBDA.items() if re.fullmatch(pattern, operation)]
        if not found:
            raise ValueError(f"which action is {operation}? say so in LAMBDA")
        return [f"lambda:{it}" for it in found]
    return [f"{PREFIXES.get(service, service)}:{operation}"]


def actions(calls: Iterable[Sequence[Any]]) -> list[str]:
    """Every action that was asked for and not denied, and what comes with it."""
    used = {
        it for service, operation, status, *_ in calls if int(status) != DENIED for it in action(service, operation)
    }
    beside = {it for name in used for it in BESIDE.get(name, ())}
    unseen = {f"{service}:{it}" for service, names in NOT_RECORDED.items() for it in names}
    return sorted(used | beside | unseen | set(ALWAYS))


def policy(calls: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """The policy document."""
    by_resource: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in actions(calls):
        service, _, operation = name.partition(":")
        named = NAMED.get(service)
        free = named is None or name in ANYWHERE or (service == "autoscaling" and operation.startswith(READS))
        by_resource[("*",) if free or named is None else tuple(named)].append(name)
    statements = [
        {
            "Sid": "Anywhere" if resources == ("*",) else f"Named{names[0].partition(':')[0].capitalize()}",
            "Effect": "Allow",
            "Action": names,
            "Resource": list(resources) if len(resources) > 1 else resources[0],
        }
        for resources, names in sorted(by_resource.items())
    ]
    for statement in statements:
        if "iam:PassRole" in statement["Action"]:
            statement["Action"] = [it for it in statement["Action"] if it != "iam:PassRole"]
    services = ["ec2", "autoscaling", "lambda", "codebuild", "events", "vpc-flow-logs"]
    passing = {
        "Sid": "PassRoles",
        "Effect": "Allow",
        "Action": "iam:PassRole",
        "Resource": NAMED["iam"][0],
        "Condition": {"StringEquals": {"iam:PassedToService": [f"{it}.amazonaws.com" for it in services]}},
    }
    return {"Version": "2012-10-17", "Statement": [*statements, passing]}


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
