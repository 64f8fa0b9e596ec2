"""A fleet on booted hosts: the stack that `pulumi up` makes on the stand-in, and machines from its groups.

Runs inside a world (`python -m hosts run`): test_hosts.py starts it there.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hosts import image
from hosts.aws import Aws
from hosts.fleet import Follower
from hosts.host import Host, HostError

from infra.paths import ROOT
from infra.plan.model import FleetPlan
from infra.planning import plan_config
from infra.render import node
from infra.render.bundle import Bundle
from infra.render.user_data import NodeSettings, user_data
from infra.stack_file import load_stack_file
from infra.weights.lock import WeightsLock, load
from tests.aws.hosts.front import PATIENCE_S, Answer, Front, ask
from tests.aws.standin import ENFORCING, Stack, StandIn

HERE = Path(__file__).parent
PORT = 5000
REGION = "us-east-1"
STACK = "boots"
LIKE, ENTRY = "smollm2-135m-instruct", "smollm2-135m-small"
"""An entry of the real lock, and one that differs from it in having small files: what the fake engine serves."""
REAL = os.environ.get("FLEET_TEST_REAL")
"""The folder of the real one's files, where its engine is installed."""
KEY = "sk-fleet-key-of-a-test"
FILES = {"config.json": b"{}\n", "model-1.safetensors": os.urandom(3 << 20), "model-2.safetensors": os.urandom(1 << 20)}
IN_TIME_S = 240
"""After so long something hangs: two busy cores boot a machine in ten seconds."""


def until(what: str, condition: Callable[[], Any], timeout: float = IN_TIME_S) -> Any:
    """Poll until it is so; what it was then."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)
    return found


def facts(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """As locks have them."""
    return {path: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()}


def small_lock(files: Mapping[str, bytes] = FILES) -> str:
    """The text of a lock: the real one's, and an entry with files of a few megabytes."""
    found = yaml.safe_load((ROOT / "stacks/models.lock.yaml").read_text())
    found["models"][ENTRY] = {**found["models"][LIKE], "files": facts(files)}
    return json.dumps(found)


def read_lock(text: str) -> WeightsLock:
    """The lock of a text."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load(Path(file.name))


class Fleet:
    """The stack, its machines, and its clients."""

    def __init__(self, aws: Aws, follower: Follower, front: Front, folder: Path) -> None:
        self.aws, self.follower, self.front = aws, follower, front
        self.stand_in = StandIn(aws.url)
        self.client = functools.cache(self.stand_in.client)
        """Patient: a hundred calls a second from machines that boot keep the stand-in busy."""
        self.stack = Stack(STACK, self.stand_in, folder)
        self.cases: set[str] = set()
        self.began = time.monotonic()
        self._up: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._planned: tuple[str, FleetPlan] | None = None

    def all(self, service: str, operation: str, **query: Any) -> list[Any]:
        """Every item of a paginated answer."""
        pages = self.client(service).get_paginator(operation)
        found: list[Any] = pages.paginate(**query).build_full_result()[pages.result_keys[0].expression]
        return found

    # The stack.

    def configure(self) -> None:
        """The stack of stack.yaml, not up yet. Models that need the real engine only where it is."""
        config = yaml.safe_load((HERE / "stack.yaml").read_text())["config"]
        if not REAL:
            config["vllm-fleet:models"].pop("real")
            config["vllm-fleet:pools"].pop("real")
        config["vllm-fleet:api-keys"] = {"team-a": f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"}
        (self.stack.project / "stacks/models.lock.yaml").write_text(small_lock())
        self.stack.write(config)
        self.stack.run("pulumi", "stack", "init", STACK)

    def begin(self) -> None:
        """`pulumi up`; returns once engine nodes can be started: Pulumi still waits for the bucket and the balancer."""

        def up() -> None:
            try:
                self.stack.up()
            except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
                self._failed = error

        self.began = time.monotonic()
        self._up = threading.Thread(target=up)
        self._up.start()
        # As the fill job does: the bucket gets the weights while machines come up.
        until("there is a bucket", lambda: self._going() and self.bucket)
        self.fill()
        if REAL:
            files = {path.name: path.read_bytes() for path in Path(REAL).iterdir()}
            self.fill(LIKE, files)
        until("there is a template", lambda: self._going() and self.template)
        until("there is a place to register", lambda: self._going() and len(self.services) == len(self.plan.models))

    def _going(self) -> bool:
        if self._failed:
            raise self._failed
        return True

    def age(self) -> float:
        """Seconds since `pulumi up` began."""
        return round(time.monotonic() - self.began, 1)

    def up(self) -> None:
        """Once the whole stack is up."""
        assert self._up
        self._up.join()
        self._going()

    def over(self) -> None:
        """Wait for Pulumi, whatever became of it."""
        if self._up:
            self._up.join()

    @property
    def bucket(self) -> str | None:
        """The stack's, once there is one."""
        names = [it["Name"] for it in self.client("s3").list_buckets()["Buckets"]]
        return next((name for name in names if name.startswith(f"fleet-{STACK}-")), None)

    @property
    def plan(self) -> FleetPlan:
        """Of what the stack file says now."""
        text = self.stack.file.read_text()
        if self._planned is None or self._planned[0] != text:
            config = load_stack_file(self.stack.file)
            self._planned = text, plan_config(STACK, config, self.lock, config.api_keys)
        return self._planned[1]

    @functools.cached_property
    def lock(self) -> WeightsLock:
        return load(self.stack.project / "stacks/models.lock.yaml")

    @property
    def engines(self) -> str:
        """The group of the nodes with fake engines."""
        assert self.plan.on_aws
        return next(it.name for it in self.plan.on_aws.groups if it.pool == "small")

    @property
    def real(self) -> str:
        """The group of the one with the real engine."""
        assert self.plan.on_aws
        return next(it.name for it in self.plan.on_aws.groups if it.pool == "real")

    @property
    def gateways(self) -> str:
        assert self.plan.on_aws
        return str(self.plan.on_aws.gateway.group)

    def pointer(self, machine: str) -> str:
        """The digest of the bundle that machines of a kind run."""
        found = self.client("ssm").get_parameter(Name=f"/vllm-fleet/{STACK}/{machine}")["Parameter"]["Value"]
        return str(json.loads(found)["bundle"])

    # What a case has for itself.

    def put(self, key: str, body: bytes) -> None:
        self.client("s3").put_object(Bucket=self.bucket, Key=key, Body=body)

    def fill(self, entry: str = ENTRY, files: Mapping[str, bytes] = FILES, lock: WeightsLock | None = None) -> str:
        """What the fill job leaves in the bucket for an entry as it was locked; its prefix."""
        lock = lock or self.lock
        prefix = f"weights/{entry}/{lock.digest(entry)}"
        for path in lock.models[entry].files.keys() & files.keys():
            self.put(f"{prefix}/{path}", files[path])
        known = {path: fact.model_dump(include={"size", "sha256"}) for path, fact in lock.models[entry].files.items()}
        self.put(f"{prefix}/.complete", json.dumps(known).encode())
        return prefix

    def engine_bundle(self, lock: WeightsLock | None = None, **flags: str) -> Bundle:
        """What engine nodes run; `flags` are other values of the engine's flags, hyphens as underscores."""
        plan = self.plan
        kind, *others = sorted(plan.engine_sets, key=lambda it: it.pool != "small")
        changed = list(kind.flags)
        for flag, value in flags.items():
            changed[changed.index(f"--{flag.replace('_', '-')}") + 1] = value
        sets = (kind.model_copy(update={"flags": tuple(changed)}), *others)
        pool = next(pool for pool in plan.pools if pool.name == "small")
        return node.engine_bundle(
            plan.model_copy(update={"engine_sets": sets}), pool, lock or self.lock, node.CloudLayout()
        )

    def store(self, bundle: Bundle) -> str:
        """An engine node's bundle in the bucket; its digest."""
        public, secret = node.split(bundle)
        assert not secret
        self.put(f"bundles/{bundle.digest}.json", json.dumps({"schema": 1, "files": public}).encode())
        return bundle.digest

    def case(self, name: str, bundle: str, more: str = "", *, once: bool = False) -> str:
        """A group with one engine node, which has a pointer of its own; its name.

        All else is as `pulumi up` makes it for the pool: template, subnets, hooks, tags.

        Args:
            name: Of the case.
            bundle: Digest of what it runs.
            more: Lines at the end of the user data.
            once: The group starts no other machine in the place of one that gives up.
        """
        machine = f"engine-{name}"
        group = f"fleet-{STACK}-{machine}"
        ec2, plan = self.client("ec2"), self.plan
        assert plan.aws
        assert plan.on_aws
        pointer = json.dumps({"bundle": bundle, "secrets": [], "runtime": None, "services": self.services})
        self.client("ssm").put_parameter(Name=f"/vllm-fleet/{STACK}/{machine}", Value=pointer, Type="String")
        template = self.template
        first, *_ = yaml.safe_load(base64.b64decode(template["UserData"]))["write_files"]
        told = replace(NodeSettings(**json.loads(first["content"])), machine=machine, group=group)
        data = {
            **template,
            "UserData": base64.b64encode((user_data(told) + more).encode()).decode(),
            "IamInstanceProfile": {"Name": self._profile},
        }
        made = ec2.create_launch_template(LaunchTemplateName=group, LaunchTemplateData=data)["LaunchTemplate"]
        private = [zone.private for zone in plan.on_aws.network.zones]
        subnets = ec2.describe_subnets(Filters=[{"Name": "cidr-block", "Values": private}])["Subnets"]
        hooks = [
            {
                "LifecycleHookName": hook,
                "LifecycleTransition": f"autoscaling:EC2_INSTANCE_{transition}",
                "HeartbeatTimeout": seconds,
                "DefaultResult": default,
            }
            for hook, transition, seconds, default in (
                (told.launch_hook, "LAUNCHING", plan.aws.launch_hook_s, "ABANDON"),
                (told.terminate_hook, "TERMINATING", plan.aws.drain_hook_s, "CONTINUE"),
            )
        ]
        self.client("autoscaling").create_auto_scaling_group(
            AutoScalingGroupName=group,
            MinSize=0,
            MaxSize=1,
            DesiredCapacity=1,
            VPCZoneIdentifier=",".join(it["SubnetId"] for it in subnets),
            LaunchTemplate={"LaunchTemplateId": made["LaunchTemplateId"]},
            LifecycleHookSpecificationList=hooks,
            HealthCheckType="EC2",
            HealthCheckGracePeriod=plan.aws.health_grace_s,
            NewInstancesProtectedFromScaleIn=once,
            Tags=[
                {"Key": f"vllm-fleet:{key}", "Value": value, "PropagateAtLaunch": True}
                for key, value in {"stack": STACK, "role": "engine", "pool": "small", "machine": machine}.items()
            ],
        )
        self.cases.add(name)
        if once:
            self.resize(group, 0)
        return group

    @functools.cached_property
    def _profile(self) -> str:
        """The role of all cases: the pool's, with the names of their pointers and groups."""
        iam, path = self.client("iam"), f"/vllm-fleet/{STACK}/"
        own = next(it for it in iam.list_roles(PathPrefix=path)["Roles"] if it["RoleName"].startswith("engine-small"))
        (policy,) = iam.list_role_policies(RoleName=own["RoleName"])["PolicyNames"]
        rights = iam.get_role_policy(RoleName=own["RoleName"], PolicyName=policy)["PolicyDocument"]
        trust = json.dumps(own["AssumeRolePolicyDocument"])
        iam.create_role(RoleName="cases", Path=path, AssumeRolePolicyDocument=trust)
        text = json.dumps(rights).replace(self.engines, f"fleet-{STACK}-engine-*")
        text = text.replace(f"/{STACK}/engine-small", f"/{STACK}/engine-*")
        iam.put_role_policy(RoleName="cases", PolicyName="cases", PolicyDocument=text)
        iam.create_instance_profile(InstanceProfileName="cases", Path=path)
        iam.add_role_to_instance_profile(InstanceProfileName="cases", RoleName="cases")
        return "cases"

    def end_cases(self) -> None:
        """What the cases made goes; their machines at once."""
        if not self.cases:
            return
        for name in self.cases:
            group = f"fleet-{STACK}-engine-{name}"
            self.client("autoscaling").delete_auto_scaling_group(AutoScalingGroupName=group, ForceDelete=True)
            self.client("ec2").delete_launch_template(LaunchTemplateName=group)
            self.client("ssm").delete_parameter(Name=f"/vllm-fleet/{STACK}/engine-{name}")
        self.cases.clear()
        iam = self.client("iam")
        iam.remove_role_from_instance_profile(InstanceProfileName="cases", RoleName="cases")
        iam.delete_instance_profile(InstanceProfileName="cases")
        iam.delete_role_policy(RoleName="cases", PolicyName="cases")
        iam.delete_role(RoleName="cases")

    # What is asked of AWS.

    def members(self, group: str) -> dict[str, str]:
        """Instance to its state in the group; those that leave are not in it any more."""
        found = self.all("autoscaling", "describe_auto_scaling_instances")
        return {
            it["InstanceId"]: it["LifecycleState"]
            for it in found
            if it["AutoScalingGroupName"] == group and not it["LifecycleState"].startswith("Terminating")
        }

    def in_service(self, group: str, size: int) -> list[Host]:
        """Wait until so many machines of a group serve."""

        def serving() -> list[str]:
            self.follower.check()
            self.front.check()
            self._going()
            members = self.members(group)
            return sorted(members) if list(members.values()) == ["InService"] * size else []

        try:
            return [Host(name) for name in until(f"{size} machines of {group} serve", serving)]
        except AssertionError as error:
            said = "\n".join(f"--- {name}\n{tell(Host(name))}" for name in self.members(group))
            raise AssertionError(f"{error}: {self.members(group)}\n{said}") from None

    def address(self, instance: str) -> str:
        """Private address of an instance."""
        (seen,) = self.client("ec2").describe_instances(InstanceIds=[instance])["Reservations"]
        return str(seen["Instances"][0]["PrivateIpAddress"])

    def monitor(self) -> Host:
        """The monitor, once its machine is there."""
        only = [
            {"Name": "tag:vllm-fleet:role", "Values": ["monitor"]},
            {"Name": "tag:vllm-fleet:stack", "Values": [STACK]},
        ]
        (seen,) = [it for r in self.all("ec2", "describe_instances", Filters=only) for it in r["Instances"]]
        host = Host(seen["InstanceId"])
        until("the monitor is on", lambda: host.dir.exists() and host.alive)
        return host

    def resize(self, group: str, size: int) -> None:
        """Let a group want so many machines, whatever the stack says."""
        scaling = self.client("autoscaling")
        scaling.update_auto_scaling_group(AutoScalingGroupName=group, MinSize=0, DesiredCapacity=size)

    @property
    def template(self) -> dict[str, Any]:
        """What the engines' launch template has; nothing while it is not there."""
        named = [{"Name": "tag:vllm-fleet:pool", "Values": ["small"]}]
        found = self.client("ec2").describe_launch_templates(Filters=named)["LaunchTemplates"]
        if not found:
            return {}
        versions = self.client("ec2").describe_launch_template_versions(
            LaunchTemplateId=found[0]["LaunchTemplateId"], Versions=["$Latest"]
        )
        data: dict[str, Any] = versions["LaunchTemplateVersions"][0]["LaunchTemplateData"]
        return data

    @property
    def services(self) -> dict[str, str]:
        """Model to the id of its service in Cloud Map."""
        ids = {it["Name"]: it["Id"] for it in self.all("servicediscovery", "list_services")}
        names = {model: srv.removesuffix(f".{STACK}.internal") for model, srv, _ in self.plan.gateway.srv}
        return {model: ids[name] for model, name in names.items() if name in ids}

    def registered(self, model: str = "chat") -> set[str]:
        """Engines of a model that gateways find."""
        found = self.all("servicediscovery", "list_instances", ServiceId=self.services[model])
        return {member["Id"] for member in found}

    def faults(self, *rules: dict[str, Any]) -> None:
        """What the stand-in does wrong from now on; none: nothing."""
        self.stand_in.control("faults", list(rules))

    @functools.cached_property
    def endpoint(self) -> str:
        """Name of the load balancer."""
        return str(self.all("elbv2", "describe_load_balancers")[0]["DNSName"])

    @functools.cached_property
    def targets(self) -> str:
        """The gateways' target group."""
        return str(self.all("elbv2", "describe_target_groups")[0]["TargetGroupArn"])

    # A client.

    def ask(self, tokens: int = 5, every_s: float = 0.02, patience_s: float = PATIENCE_S, **more: Any) -> Answer:
        """A stream, from outside, by the name of the load balancer."""
        body = {"model": "chat", "stream": True, "max_tokens": tokens, "every_s": every_s, "messages": []}
        return ask(self.endpoint, KEY, {**body, **more}, patience_s)

    def agent(self, host: Host, path: str = "/engines") -> Any:
        """What a node's agent says; None while it says nothing."""
        try:
            with urllib.request.urlopen(f"http://{host.instance.ip}:{self.plan.agent.port}{path}", timeout=5) as answer:
                return json.load(answer)
        except (OSError, ValueError):
            return None

    def state(self, host: Host) -> str:
        """Of a node's engine; "" while nothing is known."""
        rows = self.agent(host)
        return str(rows[0]["state"]) if rows else ""


def tell(host: Host, lines: int = 40) -> str:
    """The end of what a machine's units logged."""
    with contextlib.suppress(HostError, OSError):
        return str(host.journal("-u", "fleet-*", "-n", str(lines), "-o", "cat"))
    return "(gone)"


@contextlib.contextmanager
def stand_in(python: str, program: str) -> Iterator[Aws]:
    """AWS, inside this world: the machines' roles may do what their policies say, and nothing else."""
    with subprocess.Popen(
        [python, str(ENFORCING), program, str(PORT)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout
        server.stdout.readline()  # it answers
        try:
            yield Aws(PORT, REGION)
        finally:
            server.kill()


@contextlib.contextmanager
def fleet(binds: dict[str, str]) -> Iterator[Fleet]:
    """A stack that is on its way up; what it is made of goes with the world."""
    with (
        tempfile.TemporaryDirectory(prefix="fleet-boots-", ignore_cleanup_errors=True) as folder,
        stand_in(os.environ["FLEET_TEST_MOTO"], os.environ["FLEET_TEST_STANDIN"]) as aws,
        Follower(aws, image.build(), binds, grace=30) as follower,
        Front(aws, pace=0.1) as front,
    ):
        made = Fleet(aws, follower, front, Path(folder))
        made.configure()
        try:
            made.begin()
            yield made
        finally:
            made.over()
