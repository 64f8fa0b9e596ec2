"""What `fleet` asks AWS, with the user's own credentials. Nothing here changes anything; the judging is elsewhere."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.aws_names import parameter
from infra.aws_status import Answers, AwsStatus, judge, machine_kinds, short
from infra.deployed import NotDeployedError
from infra.findings import ConfigError, Finding
from infra.weights.upload import COMPLETE

if TYPE_CHECKING:
    from infra.plan.model import AwsPlan, FleetPlan
    from infra.weights.lock import WeightsLock

CONNECT_S, READ_S, TRIES = 5, 15, 3
SAY_S = 2.0
"""What takes longer says what it waits for, and again after as long."""
INTERVAL_S = 10.0
"""Between two looks: AWS counts the questions of an account, and groups move in minutes."""
ACTIVITIES = 20
"""Of a group, newest first: between two failures to get one machine others may have come and gone."""
BUCKET = re.compile(r"^\s+FLEET_BUCKET=(\S+)$", re.MULTILINE)
"""In the user data of every machine: nodeconfig/boot/user-data.yaml.j2."""
SERVICES = ("autoscaling", "ec2", "elbv2", "s3", "servicediscovery", "ssm", "sts")
IAM = {"elbv2": "elasticloadbalancing"}
"""What IAM calls a service, where it is not as boto3 does."""
ACTIONS = {"s3:ListObjectsV2": "s3:ListBucket"}
"""What IAM calls a right, where it is not as the operation."""
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403", "Forbidden"}
STRANGERS = {
    *("AuthFailure", "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException"),
    *("InvalidAccessKeyId", "InvalidToken", "RequestExpired", "SignatureDoesNotMatch", "InvalidSignatureException"),
}
"""Credentials that AWS does not take: over, of nobody, or of a machine whose clock is wrong."""
LOG_IN = (
    "`aws sts get-caller-identity` must answer: `aws sso login` or `aws configure`, and AWS_PROFILE chooses a profile"
)

ABSENT = {"ParameterNotFound"}

Say = Callable[[str], None]


class AbsentError(ConfigError):
    """What was asked for is not there."""


class Aws:
    """AWS in the region of one stack."""

    def __init__(self, stack: str, region: str) -> None:
        """Nothing is asked yet.

        Raises:
            ConfigError: There are no credentials.
        """
        self.stack, self.region = stack, region
        config = Config(
            connect_timeout=CONNECT_S, read_timeout=READ_S, retries={"mode": "standard", "total_max_attempts": TRIES}
        )
        try:
            session = boto3.Session(region_name=region)
            if session.get_credentials() is None:
                raise ConfigError([Finding("aws", "there are no credentials of AWS", LOG_IN)])
            # All of them here: making clients is not for several threads at once.
            self.clients: dict[str, Any] = {it: session.client(it, config=config) for it in SERVICES}
        except BotoCoreError as error:  # a profile that is not there, an SSO session that is over …
            raise ConfigError([self._finding("sts", error)]) from None

    def call(self, service: str, method: str, **arguments: Any) -> Any:
        """One call.

        Raises:
            ConfigError: AWS does not answer, or refuses.
        """
        try:
            return getattr(self.clients[service], method)(**arguments)
        except (BotoCoreError, ClientError) as error:
            code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else ""
            raise (AbsentError if code in ABSENT else ConfigError)([self._finding(service, error)]) from None

    def pages(self, service: str, method: str, key: str, **arguments: Any) -> list[Any]:
        """What is under `key` on every page.

        Raises:
            ConfigError: As `call`.
        """
        try:
            pages = self.clients[service].get_paginator(method).paginate(**arguments)
            return [it for page in pages for it in page.get(key, ())]
        except (BotoCoreError, ClientError) as error:
            raise ConfigError([self._finding(service, error)]) from None

    def _finding(self, service: str, error: BotoCoreError | ClientError) -> Finding:
        """What went wrong, and what to do."""
        where = f"aws in {self.region}"
        if not isinstance(error, ClientError):
            if type(error).__name__ in {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"}:
                fix = f"is there a network, and is `aws:region: {self.region}` in the stack file a region?"
                return Finding(where, f"does not answer: {error}", fix)
            return Finding("aws", str(error), LOG_IN)
        said = error.response.get("Error", {})
        code, message = str(said.get("Code", "")), str(said.get("Message", ""))
        if code in STRANGERS:
            fix = f"{LOG_IN}; is the clock right, and is {self.region} enabled in the account?"
            return Finding(where, f"does not take these credentials: {code}: {message}", fix)
        action = f"{IAM.get(service, service)}:{error.operation_name}"
        action = ACTIONS.get(action, action)
        if code in DENIED:
            return Finding(where, f"the right {action} is missing", f"give it to who runs this; {message}")
        return Finding(where, f"{action}: {code}: {message}", "try again; if it stays, AWS's own words say why")

    # What there is.

    def account(self) -> str:
        """Whose credentials they are; needs no right."""
        return str(self.call("sts", "get_caller_identity")["Account"])

    def own(self, *roles: str) -> list[dict[str, Any]]:
        """Filters for what has the tags of this stack, and a role's."""
        found = [{"Name": "tag:vllm-fleet:stack", "Values": [self.stack]}]
        return [*found, {"Name": "tag:vllm-fleet:role", "Values": list(roles)}] if roles else found

    def groups(self) -> list[dict[str, Any]]:
        """The groups of machines."""
        return self.pages("autoscaling", "describe_auto_scaling_groups", "AutoScalingGroups", Filters=self.own())

    def activities(self, group: str) -> list[dict[str, Any]]:
        """What a group did of late, newest first."""
        asked = {"AutoScalingGroupName": group, "MaxRecords": ACTIVITIES}
        found: list[dict[str, Any]] = self.call("autoscaling", "describe_scaling_activities", **asked)["Activities"]
        return found

    def health(self, target_group: str) -> list[dict[str, Any]]:
        """What a load balancer thinks of what is behind it."""
        asked = self.call("elbv2", "describe_target_health", TargetGroupArn=target_group)
        found: list[dict[str, Any]] = asked["TargetHealthDescriptions"]
        return found

    def instances(self, *roles: str) -> list[dict[str, Any]]:
        """Machines that are not gone."""
        states = ["pending", "running", "stopping", "stopped", "shutting-down"]
        filters = [*self.own(*roles), {"Name": "instance-state-name", "Values": states}]
        found = self.pages("ec2", "describe_instances", "Reservations", Filters=filters)
        return [instance for reservation in found for instance in reservation["Instances"]]

    def registered(self) -> dict[str, list[str]]:
        """SRV name to the ids of the engines that are registered there."""
        asked = [{"Name": "NAME", "Values": [f"{self.stack}.internal"], "Condition": "EQ"}]
        found: dict[str, list[str]] = {}
        for namespace in self.pages("servicediscovery", "list_namespaces", "Namespaces", Filters=asked):
            own = [{"Name": "NAMESPACE_ID", "Values": [namespace["Id"]], "Condition": "EQ"}]
            for service in self.pages("servicediscovery", "list_services", "Services", Filters=own):
                rows = self.pages("servicediscovery", "list_instances", "Instances", ServiceId=service["Id"])
                found[f"{service['Name']}.{namespace['Name']}"] = [row["Id"] for row in rows]
        return found

    def pointers(self, kinds: list[str]) -> dict[str, dict[str, Any]]:
        """What each kind of machine is meant to run; those that are there."""
        found: dict[str, dict[str, Any]] = {}
        for kind in kinds:
            # One by one, which is the right that who deploys has.
            with contextlib.suppress(AbsentError):
                asked = self.call("ssm", "get_parameter", Name=parameter(self.stack, kind))
                found[kind] = json.loads(asked["Parameter"]["Value"])
        return found

    def bucket(self, group: Mapping[str, Any]) -> str | None:
        """The stack's cache, as the machines of a group are told; None where they are told none."""
        template = group.get("LaunchTemplate", {})
        asked = {"LaunchTemplateId": template.get("LaunchTemplateId"), "Versions": [template.get("Version")]}
        versions = self.call("ec2", "describe_launch_template_versions", **asked)["LaunchTemplateVersions"]
        for text in (base64.b64decode(it["LaunchTemplateData"].get("UserData", "")).decode() for it in versions):
            if told := BUCKET.search(text):
                return told[1]
        return None

    def there(self, bucket: str, key: str) -> bool:
        """Whether a bucket has an object; needs the right to list it, and none to read."""
        found = self.call("s3", "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", ())
        return any(it["Key"] == key for it in found)


class _Look:
    """One look at a stack: each question fills in its part of the answers."""

    def __init__(self, aws: Aws, plan: FleetPlan, cloud: AwsPlan, lock: WeightsLock) -> None:
        self._aws, self._plan, self._cloud, self._lock = aws, plan, cloud, lock
        self.said = Answers("")

    def account(self) -> None:
        """Whose account it is: the first question, as nothing else is answered without credentials."""
        self.said.account = self._aws.account()

    @property
    def questions(self) -> dict[str, Callable[[], None]]:
        """They do not depend on each other."""
        return {
            "groups, load balancer, cache": self.groups,
            "engines": self.engines,
            "monitor": self.monitor,
            "bundles": self.pointers,
        }

    def groups(self) -> None:
        """The groups; why they lack machines; what the load balancer thinks of the gateways; what the cache has."""
        said = self.said
        said.groups = self._aws.groups()
        for name in (it["AutoScalingGroupName"] for it in said.groups if short(it)):
            with self._apart():
                said.activities[name] = self._aws.activities(name)
        own = [it for it in said.groups if it["AutoScalingGroupName"] == self._cloud.gateway.group]
        with self._apart():
            said.targets = [row for it in own for arn in it.get("TargetGroupARNs", ()) for row in self._aws.health(arn)]
        with self._apart():
            said.cached = self._cached(own)

    def engines(self) -> None:
        """Engines in Cloud Map."""
        self.said.registered = self._aws.registered()

    def monitor(self) -> None:
        """The monitor's machine."""
        self.said.monitors = self._aws.instances("monitor")

    def pointers(self) -> None:
        """What machines are meant to run."""
        self.said.pointers = self._aws.pointers(machine_kinds(self._plan))

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What this cannot tell shall not hide the rest."""
        try:
            yield
        except ConfigError as error:
            self.said.unanswered += error.findings

    def _cached(self, groups: list[dict[str, Any]]) -> dict[str, bool]:
        """Whether the cache has the weights of each model."""
        bucket = next(filter(None, map(self._aws.bucket, groups)), None)
        keys = {it.weights: f"weights/{it.weights}/{self._lock.digest(it.weights)}" for it in self._plan.models}
        return {name: bucket is not None and self._aws.there(bucket, f"{key}/{COMPLETE}") for name, key in keys.items()}


def ask(aws: Aws, plan: FleetPlan, cloud: AwsPlan, lock: WeightsLock, say: Say) -> Answers:
    """Everything that a status is judged from. What one right is missing for leaves the rest as it is.

    Args:
        aws: The stack's region.
        plan: Of the stack file.
        cloud: Its part for AWS.
        lock: The models.
        say: Told what is waited for, every `SAY_S`.

    Raises:
        ConfigError: AWS cannot be asked at all.
        NotDeployedError: It has no such stack.
    """
    look = _Look(aws, plan, cloud, lock)
    if failed := list(_at_once({"account": look.account}, say)):
        raise ConfigError(failed)
    failed = list(_at_once(look.questions, say))
    said = look.said
    said.unanswered = list(dict.fromkeys([*said.unanswered, *failed]))
    if said.nothing:
        raise not_deployed(plan.stack, aws.region, said.account)
    return said


def looks(aws: Aws, plan: FleetPlan, lock: WeightsLock, say: Say) -> Iterator[AwsStatus]:
    """How a stack is, again and again, every `INTERVAL_S`.

    Raises:
        ConfigError: As `ask`.
    """
    if plan.on_aws is None:
        raise ValueError(f"the plan is for {plan.target}, not for aws")
    while True:
        yield judge(plan, plan.on_aws, ask(aws, plan, plan.on_aws, lock, say))
        time.sleep(INTERVAL_S)


def not_deployed(stack: str, region: str, account: str) -> NotDeployedError:
    """There is no such stack where was looked."""
    profile = os.environ.get("AWS_PROFILE")
    fix = (
        f"`pulumi up -s {stack}` deploys it. If it is up: AWS_PROFILE ({profile or 'not set'}) chooses the account, "
        f"`aws:region` in the stack file the region"
    )
    problem = f"is not deployed in the account {account} in {region}"
    return NotDeployedError([Finding(f"stack {stack}", problem, fix)])


def _at_once(questions: Mapping[str, Callable[[], None]], say: Say) -> Iterator[Finding]:
    """Ask everything at once; what could not be answered, each finding once."""
    found: dict[Finding, None] = {}
    with ThreadPoolExecutor(len(questions)) as pool:
        asked = {pool.submit(question): name for name, question in questions.items()}
        waiting = set(asked)
        while waiting:
            done, waiting = wait(waiting, SAY_S, FIRST_COMPLETED)
            if not done:
                say(f"waiting for AWS: {', '.join(sorted(asked[it] for it in waiting))}")
            for it in done:
                try:
                    it.result()
                except ConfigError as error:
                    found.update(dict.fromkeys(error.findings))
    yield from found
