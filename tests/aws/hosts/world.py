"""A fleet on booted hosts: what the stack's resources are to a machine, made with boto3 on the stand-in.

Runs inside a world (`python -m hosts run`): test_hosts.py starts it there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from hosts import image
from hosts.aws import Aws
from hosts.fleet import Follower
from hosts.host import Host, HostError

from infra.plan.model import FleetPlan, PoolPlan
from infra.planning import plan_config
from infra.render import node
from infra.render.bundle import Bundle, Program
from infra.render.user_data import NodeSettings, user_data
from infra.stack_file import load_stack_file
from infra.weights.entry import FileFact
from infra.weights.lock import WeightsLock, load

HERE = Path(__file__).parent
PORT = 5000
REGION = "us-east-1"
STACK = "boots"
BUCKET = "fleet-boots-cache"
ENTRY = "smollm2-135m-instruct"
KEY = "sk-fleet-key-of-a-test"
FILES = {"config.json": b"{}\n", "model-1.safetensors": os.urandom(3 << 20), "model-2.safetensors": os.urandom(1 << 20)}
IN_TIME_S = 120
"""After so long something hangs: two busy cores boot a machine in ten seconds."""


def until(what: str, condition: Callable[[], Any], timeout: float = IN_TIME_S) -> Any:
    """Poll until it is so; what it was then."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)
    return found


def small_lock(files: Mapping[str, bytes] = FILES) -> WeightsLock:
    """The real lock, with files of a few megabytes in the entry that is served."""
    lock = load()
    facts = {path: FileFact(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for path, data in files.items()}
    entry = lock.models[ENTRY].model_copy(update={"files": facts})
    return lock.model_copy(update={"models": {**lock.models, ENTRY: entry}})


def small_plan(lock: WeightsLock, **timings: Any) -> FleetPlan:
    """The plan of stack.yaml; some timings may be others, so that what takes minutes is seen in seconds."""
    config = load_stack_file(HERE / "stack.yaml")
    plan = plan_config(STACK, config, lock, {"team-a": hashlib.sha256(KEY.encode()).hexdigest()})
    return plan.model_copy(update={"timings": plan.timings.model_copy(update=timings)})


@dataclass
class Answer:
    """What a client got."""

    status: int
    body: bytes

    @property
    def whole(self) -> bool:
        """A stream that ended as it should."""
        return self.status == 200 and self.body.rstrip().endswith(b"data: [DONE]")


@dataclass
class Load:
    """Clients that ask all the time; what each got."""

    ask: Callable[[], Answer]
    clients: int = 2
    answers: list[Answer] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def _run(self) -> None:
        while not self._over.is_set():
            self.answers.append(self.ask())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.whole]


class Fleet:
    """The stack's part of the world: bucket, pointers, roles, names, groups."""

    def __init__(self, aws: Aws, follower: Follower) -> None:
        self.aws, self.follower = aws, follower
        self.lock = small_lock()
        self.plan = small_plan(self.lock)
        self.services: dict[str, str] = {}
        self.groups: set[str] = set()

    # What `pulumi up` makes.

    def account(self) -> None:
        """What there is once."""
        ec2, iam = self.aws.client("ec2"), self.aws.client("iam")
        vpc = ec2.create_vpc(CidrBlock="10.64.0.0/16")["Vpc"]["VpcId"]
        self.subnets = [
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.64.{n}.0/24", AvailabilityZone=f"us-east-1{zone}")["Subnet"][
                "SubnetId"
            ]
            for n, zone in enumerate("ab", 1)
        ]
        trust = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"Service": "ec2.amazonaws.com"}}
        iam.create_role(
            RoleName="node", AssumeRolePolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        )
        iam.create_instance_profile(InstanceProfileName="node")
        iam.add_role_to_instance_profile(InstanceProfileName="node", RoleName="node")
        self.aws.client("s3").create_bucket(Bucket=BUCKET)
        cloud_map = self.aws.client("servicediscovery")
        cloud_map.create_private_dns_namespace(Name=f"{STACK}.internal", Vpc=vpc)
        (space,) = self.aws.all("servicediscovery", "list_namespaces")
        for model, srv, _ in self.plan.gateway.srv:
            self.services[model] = cloud_map.create_service(
                Name=srv.removesuffix(f".{STACK}.internal"),
                NamespaceId=space["Id"],
                DnsConfig={"NamespaceId": space["Id"], "DnsRecords": [{"Type": "SRV", "TTL": 10}]},
            )["Service"]["Id"]

    def store(self, bundle: Bundle) -> str:
        """A bundle in the bucket, its secret files beside it; its digest."""
        public, secret = node.split(bundle)
        self.put(f"bundles/{bundle.digest}.json", json.dumps({"schema": 1, "files": public}).encode())
        self.secret = None
        if secret:
            name = f"vllm-fleet/{STACK}/{bundle.role}"
            secrets = self.aws.client("secretsmanager")
            with contextlib.suppress(secrets.exceptions.ResourceExistsException):
                secrets.create_secret(Name=name, SecretString="{}")
            self.secret = secrets.put_secret_value(SecretId=name, SecretString=json.dumps(secret))["ARN"]
        return bundle.digest

    def put(self, key: str, body: bytes) -> None:
        self.aws.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body)

    def point(self, machine: str, digest: str) -> None:
        """What machines of a kind run."""
        value = json.dumps({"bundle": digest, "secrets": [self.secret] if self.secret else [], "runtime": None})
        self.aws.client("ssm").put_parameter(
            Name=f"/vllm-fleet/{STACK}/{machine}", Value=value, Type="String", Overwrite=True
        )

    def fill(self, lock: WeightsLock | None = None, files: Mapping[str, bytes] = FILES) -> str:
        """What the fill job leaves in the bucket for an entry as it was locked; its prefix."""
        lock = lock or self.lock
        prefix = f"weights/{ENTRY}/{lock.digest(ENTRY)}"
        for path, data in files.items():
            self.put(f"{prefix}/{path}", data)
        facts = {path: fact.model_dump(include={"size", "sha256"}) for path, fact in lock.models[ENTRY].files.items()}
        self.put(f"{prefix}/.complete", json.dumps(facts).encode())
        return prefix

    @property
    def pool(self) -> PoolPlan:
        return self.plan.pools[0]

    def engine_bundle(self, lock: WeightsLock | None = None, **flags: str) -> Bundle:
        """What engine nodes run; `flags` are other values of the engine's flags, hyphens as underscores."""
        plan, (kind,) = self.plan, self.plan.engine_sets
        changed = list(kind.flags)
        for flag, value in flags.items():
            changed[changed.index(f"--{flag.replace('_', '-')}") + 1] = value
        plan = plan.model_copy(update={"engine_sets": (kind.model_copy(update={"flags": tuple(changed)}),)})
        return node.engine_bundle(plan, plan.pools[0], lock or self.lock, node.CloudLayout())

    def group(self, machine: str, size: int, more: str = "", **settings: Any) -> str:
        """A group of machines of a kind, with its hooks; its name. `more`: lines at the end of the user data."""
        role: Any = machine.partition("-")[0]
        group, timings = self.group_name(machine), self.plan.aws
        assert timings
        told = NodeSettings(
            stack=STACK,
            role=role,
            machine=machine,
            region=REGION,
            bucket=BUCKET,
            group=group,
            launch_heartbeat_s=timings.launch_hook_s,
            terminate_heartbeat_s=timings.drain_hook_s,
            boot_limit_s=timings.launch_hook_s,
            metadata_poll_s=1,
            spot_drain_s=timings.spot_drain_s,
            drain_s=self.plan.timings.drain_s,
            services=self.services if role == "engine" else {},
            baked=True,
        )
        told = replace(told, **settings)
        template = self.aws.client("ec2").create_launch_template(
            LaunchTemplateName=group,
            LaunchTemplateData={
                "ImageId": "ami-0d1a000000000002a",
                "InstanceType": "g5.xlarge",
                "UserData": base64.b64encode((user_data(told) + more).encode()).decode(),
                "IamInstanceProfile": {"Name": "node"},
                "MetadataOptions": {"HttpTokens": "required", "InstanceMetadataTags": "enabled"},
            },
        )["LaunchTemplate"]["LaunchTemplateId"]
        hooks = [
            {
                "LifecycleHookName": hook,
                "LifecycleTransition": f"autoscaling:EC2_INSTANCE_{transition}",
                "HeartbeatTimeout": seconds,
                "DefaultResult": default,
            }
            for hook, transition, seconds, default in (
                ("ready", "LAUNCHING", timings.launch_hook_s, "ABANDON"),
                ("drain", "TERMINATING", 40, "CONTINUE"),
            )
        ]
        self.aws.client("autoscaling").create_auto_scaling_group(
            AutoScalingGroupName=group,
            MinSize=0,
            MaxSize=4,
            DesiredCapacity=size,
            VPCZoneIdentifier=",".join(self.subnets),
            LaunchTemplate={"LaunchTemplateId": template},
            LifecycleHookSpecificationList=hooks,
            HealthCheckType="EC2",
            HealthCheckGracePeriod=600,
            Tags=[
                {"Key": f"vllm-fleet:{key}", "Value": value, "PropagateAtLaunch": True}
                for key, value in {"stack": STACK, "role": role, "pool": "small"}.items()
            ],
        )
        self.groups.add(group)
        return group

    @staticmethod
    def group_name(machine: str) -> str:
        """Of the group of a kind of machines."""
        return f"fleet-{STACK}-{machine}-0"

    # What is asked of AWS.

    def members(self, group: str) -> dict[str, str]:
        """Instance to its state in the group."""
        found = self.aws.all("autoscaling", "describe_auto_scaling_instances")
        return {it["InstanceId"]: it["LifecycleState"] for it in found if it["AutoScalingGroupName"] == group}

    def machines(self, group: str) -> list[str]:
        """The machines that a group has, once it has some and they are switched on."""

        def on() -> list[str]:
            self.follower.check()
            found = sorted(self.members(group))
            return found if found and all(Host(name).alive for name in found) else []

        return list(until(f"{group} has machines", on))

    def in_service(self, group: str, size: int) -> list[Host]:
        """Wait until so many machines of a group serve."""
        assert group in self.groups, f"{group} was not made: the test that makes it failed"

        def serving() -> list[str]:
            self.follower.check()
            members = self.members(group)
            return sorted(members) if list(members.values()) == ["InService"] * size else []

        try:
            return [Host(name) for name in until(f"{size} machines of {group} serve", serving)]
        except AssertionError as error:
            said = "\n".join(f"--- {name}\n{tell(Host(name))}" for name in self.members(group))
            raise AssertionError(f"{error}: {self.members(group)}\n{said}") from None

    def resize(self, group: str, size: int) -> None:
        self.aws.client("autoscaling").set_desired_capacity(AutoScalingGroupName=group, DesiredCapacity=size)

    def remove(self, group: str) -> None:
        """End a group's machines at once."""
        self.aws.client("autoscaling").delete_auto_scaling_group(AutoScalingGroupName=group, ForceDelete=True)
        self.aws.client("ec2").delete_launch_template(LaunchTemplateName=group)
        self.groups.discard(group)

    def registered(self) -> set[str]:
        """Engines that gateways find."""
        return {
            member["Id"]
            for service in self.services.values()
            for member in self.aws.all("servicediscovery", "list_instances", ServiceId=service)
        }

    def faults(self, *rules: dict[str, Any]) -> None:
        """What the stand-in does wrong from now on; none: nothing."""
        data = json.dumps(list(rules)).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.aws.url}/_ctl/faults", data)).read()

    def calls(self) -> list[list[Any]]:
        with urllib.request.urlopen(f"{self.aws.url}/_ctl/calls") as answer:
            found: list[list[Any]] = json.load(answer)
        return found

    # A client.

    def ask(self, gateway: Host, tokens: int = 5, every_s: float = 0.02, timeout: float = 60) -> Answer:
        """A stream, through the gateway, as the load balancer passes it on."""
        body = json.dumps(
            {"model": "chat", "stream": True, "max_tokens": tokens, "every_s": every_s, "messages": []}
        ).encode()
        head = (
            "PROXY TCP4 10.64.9.9 10.64.1.1 40000 8080\r\n"
            "POST /v1/chat/completions HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        try:
            with socket.create_connection((gateway.instance.ip, self.plan.gateway.port), timeout) as connection:
                connection.sendall(head + body)
                raw = b"".join(iter(lambda: connection.recv(65536), b""))
        except OSError as error:
            return Answer(0, str(error).encode())
        top, _, rest = raw.partition(b"\r\n\r\n")
        status = int(top.split()[1]) if top else 0
        return Answer(status, _plain(rest) if b"chunked" in top.lower() else rest)

    def agent(self, host: Host, path: str = "/engines") -> Any:
        """What a node's agent says; None while it says nothing."""
        try:
            with urllib.request.urlopen(f"http://{host.instance.ip}:{self.plan.agent.port}{path}", timeout=5) as answer:
                return json.load(answer)
        except (OSError, ValueError):
            return None


def _plain(chunked: bytes) -> bytes:
    """A body without its chunks; what is cut off ends where it was cut."""
    plain = b""
    while chunked:
        size, _, chunked = chunked.partition(b"\r\n")
        count = int(size or b"0", 16)
        if count == 0:
            break
        plain, chunked = plain + chunked[:count], chunked[count + 2 :]
    return plain


def tell(host: Host, lines: int = 40) -> str:
    """The end of what a machine's units logged."""
    with contextlib.suppress(HostError, OSError):
        return str(host.journal("-u", "fleet-*", "-n", str(lines), "-o", "cat"))
    return "(gone)"


@contextlib.contextmanager
def stand_in(python: str, program: str) -> Iterator[Aws]:
    """AWS, inside this world."""
    with subprocess.Popen(
        [python, program, "serve", str(PORT)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout
        server.stdout.readline()  # it answers
        try:
            yield Aws(PORT, REGION)
        finally:
            server.kill()


@contextlib.contextmanager
def fleet(binds: dict[str, str]) -> Iterator[Fleet]:
    """An account with nothing running in it."""
    with (
        stand_in(os.environ["FLEET_TEST_MOTO"], os.environ["FLEET_TEST_STANDIN"]) as aws,
        Follower(aws, image.build(), binds, grace=30) as follower,
    ):
        made = Fleet(aws, follower)
        made.account()
        yield made


__all__ = ["Answer", "Fleet", "Load", "Program", "fleet", "tell", "until"]
