"""The stand-in with an IAM that looks at resources and conditions, as moto's own does not.

    PYTHON enforcing.py MOTOPLUS [PORT]        # as MOTOPLUS serve [PORT]; PYTHON is one that has moto

Keys that IAM gave out, a user's or for a time a role's, may do what their policies say: every resource of a call has to
be allowed, and none denied. Other keys, such as `test`, may do everything. What AWS asks for besides (iam:PassRole) is
asked for too. Not looked at: signatures (moto computes those of a GET without a body wrongly), resource policies,
boundaries.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moto.backends import get_backend
from moto.core.authorization import ActionAuthenticatorMixin
from moto.core.exceptions import AccessDeniedError
from moto.iam.access_control import CreateAccessKeyFailure, create_access_key
from moto.s3.exceptions import S3AccessDeniedError

PREFIXES = {"monitoring": "cloudwatch"}
EC2 = {
    "i": "instance",
    "vol": "volume",
    "vpc": "vpc",
    "subnet": "subnet",
    "igw": "internet-gateway",
    "nat": "natgateway",
    "rtb": "route-table",
    "sg": "security-group",
    "eipalloc": "elastic-ip",
    "lt": "launch-template",
    "vpce": "vpc-endpoint",
    "fl": "vpc-flow-log",
}
"""The beginning of an id to what an ARN calls the kind."""
EC2_ID = re.compile(rf"({'|'.join(EC2)})-[0-9a-f]+")
S3_NAMES = {
    "HeadBucket": "ListBucket",
    "HeadObject": "GetObject",
    "GetObjectVersion": "GetObject",
    "GetPublicAccessBlock": "GetBucketPublicAccessBlock",
    "PutPublicAccessBlock": "PutBucketPublicAccessBlock",
    "DeletePublicAccessBlock": "PutBucketPublicAccessBlock",
    "ListBuckets": "ListAllMyBuckets",
}
"""What moto calls an action, and IAM otherwise."""


@dataclass
class Check:
    """One thing that has to be allowed."""

    action: str
    resource: str = "*"
    context: dict[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """What was asked for."""

    service: str
    action: str
    given: dict[str, Any]
    path: str
    account: str
    region: str

    def arn(self, service: str, rest: str) -> str:
        return f"arn:aws:{service}:{self.region}:{self.account}:{rest}"

    def backend(self, service: str, *, everywhere: bool = False) -> Any:
        return get_backend(service)[self.account]["aws" if everywhere else self.region]

    def text(self, *names: str) -> str:
        """The first of these that was given."""
        return next((str(self.given[name]) for name in names if self.given.get(name)), "")


def given(response: Any) -> dict[str, Any]:
    """The arguments of a call; those of the query protocol with their flat names."""
    body = response.raw_body or b""
    body = body if isinstance(body, bytes) else str(body).encode()
    # A form was read already: its body is empty here.
    found = {str(key): it[0] if isinstance(it, list) else it for key, it in (response.querystring or {}).items()}
    return {**found, **json.loads(body)} if body.lstrip()[:1] == b"{" else found


# Resources of a call, by service


def iam(call: Call) -> Iterator[str]:
    backend, path = call.backend("iam", everywhere=True), call.text("Path") or "/"
    if name := call.text("InstanceProfileName"):
        known = {it.name: it.arn for it in backend.instance_profiles.values()}
        yield known.get(name, f"arn:aws:iam::{call.account}:instance-profile{path}{name}")
    elif name := call.text("RoleName"):
        known = {it.name: it.arn for it in backend.roles.values()}
        yield known.get(name, f"arn:aws:iam::{call.account}:role{path}{name}")


def ssm(call: Call) -> Iterator[str]:
    names = call.given.get("Names") or [call.text("Name", "ResourceId")]
    document = "Document" in call.action or call.text("ResourceType") == "Document"
    for name in names:
        if call.action == "DescribeParameters" or not name:
            yield call.arn("ssm", "*")
        elif document:
            yield call.arn("ssm", f"document/{name}")
        elif str(name).startswith("/aws/service/"):
            yield f"arn:aws:ssm:{call.region}::parameter{name}"
        else:
            yield call.arn("ssm", f"parameter/{str(name).lstrip('/')}")


def secretsmanager(call: Call) -> Iterator[str]:
    name = call.text("SecretId", "Name")
    known = {it.name: it.arn for it in call.backend("secretsmanager").secrets.values()}
    yield name if name.startswith("arn:") else known.get(name, call.arn("secretsmanager", f"secret:{name}-AbCdEf"))


def autoscaling(call: Call) -> Iterator[str]:
    name = call.text("AutoScalingGroupName", "Tags.member.1.ResourceId")
    if not call.action.startswith("Describe"):
        yield call.arn("autoscaling", f"autoScalingGroup:0:autoScalingGroupName/{name}")


def logs(call: Call) -> Iterator[str]:
    name = call.text("logGroupName")
    if arn := call.text("resourceArn"):
        yield arn
    elif name:
        yield call.arn("logs", f"log-group:{name}:*")


def servicediscovery(call: Call) -> Iterator[str]:
    if arn := call.text("ResourceARN"):
        yield arn
    elif call.action in {"RegisterInstance", "DeregisterInstance", "GetService", "UpdateService", "DeleteService"}:
        yield call.arn("servicediscovery", f"service/{call.text('ServiceId', 'Id')}")


def ec2(call: Call) -> Iterator[str]:
    if call.action.startswith("Describe"):
        return
    if call.action == "CreateTags" or not call.action.startswith(("Create", "Run", "Allocate")):
        for value in call.given.values():
            if found := EC2_ID.fullmatch(str(value)):
                yield call.arn("ec2", f"{EC2[found[1]]}/{value}")


def kms(call: Call) -> Iterator[str]:
    name = call.text("KeyId")
    if name:
        yield name if name.startswith("arn:") else call.arn("kms", f"key/{name}")


def elasticloadbalancing(call: Call) -> Iterator[str]:
    if not call.action.startswith("Describe"):
        names = ("ListenerArn", "TargetGroupArn", "LoadBalancerArn", "ResourceArns.member.1")
        yield from filter(None, [call.text(*names)])


def events(call: Call) -> Iterator[str]:
    yield call.text("ResourceARN") or call.arn("events", f"rule/{call.text('Name', 'Rule')}")


def codebuild(call: Call) -> Iterator[str]:
    yield call.arn("codebuild", f"project/{call.text('name', 'projectName')}")


RESOURCES: dict[str, Callable[[Call], Iterator[str]]] = {
    it.__name__: it
    for it in (
        *(iam, ssm, secretsmanager, autoscaling, logs, servicediscovery, ec2, kms),
        *(elasticloadbalancing, events, codebuild),
    )
}


def tags_of(call: Call, arn: str) -> dict[str, str]:
    """Tags of a resource that is there."""
    if call.service == "ec2":
        return dict(call.backend("ec2").tags.get(arn.rpartition("/")[2], {}))
    if call.service == "kms":
        return dict(call.backend("kms").tagger.get_tag_dict_for_resource(arn.rpartition("/")[2]))
    if call.service == "elasticloadbalancing":
        return dict(call.backend("elbv2").tagging_service.get_tag_dict_for_resource(arn))
    return {}


def checks(call: Call) -> Iterator[Check]:
    """Everything that has to be allowed for a call."""
    context: dict[str, Any] = {}
    if call.service == "servicediscovery" and call.action == "DiscoverInstances":
        context["servicediscovery:NamespaceName"] = call.text("NamespaceName")
    keys = [it for name, it in call.given.items() if re.fullmatch(r"Tag(s|)\.(member\.)?\d+\.Key", name)]
    if keys:
        context["aws:TagKeys"] = keys
    action = f"{PREFIXES.get(call.service, call.service)}:{call.action}"
    of = RESOURCES.get(call.service)
    found = list(of(call)) if of else []
    for resource in found or ["*"]:
        tags = {f"aws:ResourceTag/{key}": value for key, value in tags_of(call, resource).items()}
        tags |= {f"ec2:ResourceTag/{key}": value for key, value in tags_of(call, resource).items()}
        yield Check(action, resource, {**context, **tags})
    yield from passed(call)


def passed(call: Call) -> Iterator[Check]:
    """Roles that a call hands to a service."""
    passing = {
        ("codebuild", "CreateProject"): ("serviceRole", "codebuild"),
        ("ec2", "CreateFlowLogs"): ("DeliverLogsPermissionArn", "vpc-flow-logs"),
    }
    name, service = passing.get((call.service, call.action), ("", ""))
    roles = [call.text(name)] if name else []
    if (call.service, call.action) == ("events", "PutTargets"):
        roles, service = [it["RoleArn"] for it in call.given["Targets"] if it.get("RoleArn")], "events"
    if call.service == "ec2" and (profile := call.text("LaunchTemplateData.IamInstanceProfile.Arn")):
        profiles = call.backend("iam", everywhere=True).instance_profiles.values()
        roles, service = [role.arn for it in profiles if it.arn == profile for role in it.roles], "ec2"
    for role in filter(None, roles):
        yield Check("iam:PassRole", role, {"iam:PassedToService": f"{service}.amazonaws.com"})


# What a policy says of it


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def like(pattern: str, text: str, *, case: bool = True) -> bool:
    form = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(form, text, 0 if case else re.IGNORECASE) is not None


def holds(operator: str, key: str, wanted: Any, context: Mapping[str, Any]) -> bool:
    """Whether a condition holds.

    Raises:
        ValueError: An operator that is not known here.
    """
    have, values = context.get(key), [str(it) for it in listed(wanted)]
    if operator == "Null":
        return (have is None) == (values == ["true"])
    every = operator.removeprefix("ForAllValues:")
    asked = [str(it) for it in listed(have)] if have is not None else []
    tests: dict[str, Callable[[str], bool]] = {
        "StringEquals": lambda it: it in values,
        "StringLike": lambda it: any(like(value, it) for value in values),
        "ArnLike": lambda it: any(like(value, it) for value in values),
        "Bool": lambda it: it.lower() in values,
        "StringNotEquals": lambda it: it not in values,
        "StringNotLike": lambda it: not any(like(value, it) for value in values),
    }
    if every not in tests:
        raise ValueError(f"{operator} is not known here")
    if every != operator:
        return all(map(tests[every], asked))
    return (bool(asked) and all(map(tests[every], asked))) or (not asked and every.startswith("StringNot"))


def concerns(statement: Mapping[str, Any], check: Check) -> bool:
    """Whether a statement speaks of it."""
    if "NotAction" in statement:
        named = not any(like(it, check.action, case=False) for it in listed(statement["NotAction"]))
    else:
        named = any(like(it, check.action, case=False) for it in listed(statement["Action"]))
    if "NotResource" in statement:
        there = not any(like(it, check.resource) for it in listed(statement["NotResource"]))
    else:
        there = any(like(it, check.resource) for it in listed(statement["Resource"]))
    conditions = statement.get("Condition", {})
    return (
        named
        and there
        and all(holds(op, key, value, check.context) for op, keys in conditions.items() for key, value in keys.items())
    )


def refused(policies: list[Any], check: Check) -> bool:
    documents = [json.loads(it) if isinstance(it, str) else it for it in policies]
    statements = [it for document in documents for it in listed(document["Statement"]) if concerns(it, check)]
    effects = {it["Effect"] for it in statements}
    return effects != {"Allow"}


def documents(found: Any) -> Iterator[Any]:
    for it in found:
        if hasattr(it, "versions"):
            yield next(version.document for version in it.versions if version.is_default)
        elif isinstance(it, dict) and "policy_document" in it:
            yield it["policy_document"]
        else:
            yield it


def authorize(self: Any, _request: type, resource: str = "*") -> None:
    """See that whoever calls may.

    Raises:
        AccessDeniedError: No.
        S3AccessDeniedError: No, and it is S3.
    """
    scope = re.search(r"Credential=([^/]+)/\d+/([^/]+)/([^/]+)/", self.headers.get("Authorization", ""))
    if not scope:
        return
    key, region, service = scope.groups()
    try:
        who = create_access_key(self.current_account, "aws", key, dict(self.headers))
    except (CreateAccessKeyFailure, KeyError):
        return  # nobody's: may do everything
    action = self._get_action()
    action = action[0] if isinstance(action, list) else action
    if (service, action) == ("sts", "GetCallerIdentity"):
        return
    policies = list(documents(who.collect_policies()))
    if service == "s3":
        wanted = iter([Check(f"s3:{S3_NAMES.get(action, action)}", resource)])
    else:
        wanted = checks(Call(service, action, given(self), self.raw_path, self.current_account, region))
    for check in wanted:
        if refused(policies, check):
            sys.stderr.write(f"denied: {who.arn} {check}\n")
            if service == "s3":
                raise S3AccessDeniedError
            raise AccessDeniedError(user_arn=who.arn, action=f"{check.action} on resource: {check.resource}")


def main() -> None:
    """Serve."""
    program, *rest = sys.argv[1:]
    sys.argv = [program]
    serve = runpy.run_path(program, run_name="motoplus")["serve"]
    ActionAuthenticatorMixin._authenticate_and_authorize_action = authorize
    serve(int(rest[-1]) if rest and rest[-1].isdigit() else 0)


if __name__ == "__main__":
    main()
