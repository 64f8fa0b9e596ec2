"""What each role of the stack `prod` has to be able to do, and some of what it must not: as calls of boto3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from tests.aws.standin import Stack

DENIED = 403
HOOK = {"LifecycleHookName": "ready", "InstanceId": "i-0123456789abcdef0"}


@dataclass(frozen=True)
class Call:
    """One call."""

    service: str
    operation: str
    arguments: dict[str, Any]


def call(service: str, operation: str, **arguments: Any) -> Call:
    return Call(service, operation, arguments)


def keys(stack: Stack, role: str) -> dict[str, str]:
    """Keys, for a time, of a role by the name of its resource."""
    (arn,) = (arn for name, arn in outputs(stack, "aws:iam/role:Role", "arn") if name == role)
    made = stack.aws.client("sts").assume_role(RoleArn=arn, RoleSessionName="test")["Credentials"]
    return {
        "aws_access_key_id": made["AccessKeyId"],
        "aws_secret_access_key": made["SecretAccessKey"],
        "aws_session_token": made["SessionToken"],
    }


def outputs(stack: Stack, kind: str, output: str) -> Iterator[tuple[str, str]]:
    """Name of each resource of a kind, and one of its outputs."""
    for it in stack.state["deployment"]["resources"]:
        if it["type"] == kind:
            yield it["urn"].rpartition("::")[2], it["outputs"][output]


def may(stack: Stack, credentials: dict[str, str], it: Call) -> bool:
    """Whether a call is allowed; another error is what comes after that."""
    try:
        getattr(stack.aws.client(it.service, **credentials), it.operation)(**it.arguments)
    except ClientError as error:
        # Not by its code: the stand-in writes it as XML, which not every protocol reads.
        return bool(error.response["ResponseMetadata"]["HTTPStatusCode"] != DENIED)
    return True


def work(stack: Stack) -> dict[str, tuple[list[Call], list[Call]]]:
    """By role: its work; and what is another's."""
    aws = stack.aws
    (bucket,) = aws.left()["s3:bucket"]
    keys_of = [it["Key"] for it in aws.client("s3").list_objects_v2(Bucket=bucket)["Contents"]]
    found = outputs(stack, "aws:servicediscovery/service:Service", "id")
    services = {name.removeprefix("engines-"): ident for name, ident in found}
    secrets = dict(outputs(stack, "aws:secretsmanager/secret:Secret", "arn"))
    groups = aws.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    machines = {it["AutoScalingGroupName"]: it["Instances"][0]["InstanceId"] for it in groups if it["Instances"]}
    bundle = next(it for it in keys_of if it.startswith("bundles/"))
    request = next(it for it in keys_of if it.startswith("fill/"))

    def read(key: str) -> Call:
        return call("s3", "get_object", Bucket=bucket, Key=key)

    def write(key: str) -> Call:
        return call("s3", "put_object", Bucket=bucket, Key=key, Body=b"")

    def pointer(machine: str) -> Call:
        return call("ssm", "get_parameter", Name=f"/vllm-fleet/prod/{machine}")

    def hook(group: str) -> Call:
        return call("autoscaling", "record_lifecycle_action_heartbeat", AutoScalingGroupName=group, **HOOK)

    def register(model: str) -> Call:
        where = {"AWS_INSTANCE_IPV4": "10.64.16.9", "AWS_INSTANCE_PORT": "8000"}
        return call(
            "servicediscovery", "register_instance", ServiceId=services[model], InstanceId="of-a-test", Attributes=where
        )

    def deregister(model: str) -> Call:
        return call("servicediscovery", "deregister_instance", ServiceId=services[model], InstanceId="of-a-test")

    def secret(machine: str) -> Call:
        return call("secretsmanager", "get_secret_value", SecretId=secrets[machine])

    def tag(group: str, key: str) -> Call:
        return call("ec2", "create_tags", Resources=[machines[group]], Tags=[{"Key": key, "Value": "1"}])

    def size(group: str) -> Call:
        return call("autoscaling", "set_desired_capacity", AutoScalingGroupName=group, DesiredCapacity=0)

    a100, h100, gateways = (
        "fleet-prod-engine-a100-on-demand",
        "fleet-prod-engine-h100-on-demand",
        "fleet-prod-gateway-0",
    )
    (targets,) = (arn for _, arn in outputs(stack, "aws:lb/targetGroup:TargetGroup", "arn"))
    attach, detach = (
        call("elbv2", f"{verb}_targets", TargetGroupArn=targets, Targets=[{"Id": machines["fleet-prod-gateway-0"]}])
        for verb in ("register", "deregister")
    )
    see = call("ec2", "describe_instances")
    look = call("autoscaling", "describe_auto_scaling_groups")
    nobodys = [
        call("iam", "list_roles"),
        call("iam", "create_user", UserName="other"),
        call("s3", "delete_object", Bucket=bucket, Key=bundle),
        call("s3", "delete_bucket", Bucket=bucket),
        call("ec2", "terminate_instances", InstanceIds=list(machines.values())),
        call("ssm", "put_parameter", Name="/vllm-fleet/prod/gateway", Value="x", Type="String", Overwrite=True),
        write(bundle),
    ]
    protect = {"AutoScalingGroupName": a100, "InstanceIds": [machines[a100]], "ProtectedFromScaleIn": False}
    return {
        "engine-a100": (
            [
                *(read(bundle), read("weights/any/file"), pointer("engine-a100"), hook(a100), look),
                call("s3", "list_objects_v2", Bucket=bucket, Prefix="weights/"),
                call("autoscaling", "set_instance_protection", **protect),
                register("fast"),
                deregister("fast"),
            ],
            [
                *(*nobodys, pointer("engine-h100"), pointer("gateway"), hook(h100), hook(gateways), register("chat")),
                *(attach, detach, read(request), secret("gateway"), see, write("weights/any/file"), size(a100)),
            ],
        ),
        "gateway": (
            [
                *(read(bundle), pointer("gateway"), secret("gateway"), hook(gateways), see, look, detach, attach),
                size("fleet-prod-engine-a100-spot"),
                tag(gateways, "vllm-fleet:gateway"),
                call("servicediscovery", "discover_instances", NamespaceName="prod.internal", ServiceName="any"),
            ],
            [
                *(*nobodys, pointer("monitor"), hook(a100), register("fast"), read("weights/any/file"), size(gateways)),
                *(tag(a100, "vllm-fleet:gateway"), tag(gateways, "vllm-fleet:role"), size(a100), size(h100)),
                call("servicediscovery", "discover_instances", NamespaceName="dev.internal", ServiceName="any"),
            ],
        ),
        "monitor": (
            [
                *(read(bundle), pointer("monitor"), see, deregister("fast"), deregister("chat")),
                call("servicediscovery", "list_instances", ServiceId=services["fast"]),
            ],
            [
                *(*nobodys, pointer("gateway"), register("fast"), secret("gateway"), read("weights/any/file")),
                *(hook(gateways), look),
            ],
        ),
        "fill": (
            [
                *(read(request), read("source/fill.zip"), read("weights/any/file"), write("weights/any/file")),
                call("ssm", "get_parameters", Names=["/vllm-fleet/prod/fill"]),
            ],
            [*nobodys, read(bundle), pointer("gateway"), secret("gateway"), see, look],
        ),
        "fill-start": ([], [*nobodys, look, see, read(bundle), pointer("gateway")]),
    }


def shown(it: Call) -> str:
    return f"{it.service}:{it.operation} {json.dumps(it.arguments, default=str)}"
