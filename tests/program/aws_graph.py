"""The whole graph of a stack on AWS, on mocks: every resource with its inputs and with what it waits for."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml
from pulumi.runtime import mocks

from infra import program
from infra.paths import ROOT
from tests.program.test_graph import close_event_loops

ACCOUNT = "123456789012"
KEY_HASH = "ab" * 32
ANSWERS: dict[str, dict[str, Any]] = {
    "aws:index/getCallerIdentity:getCallerIdentity": {"accountId": ACCOUNT},
    "aws:index/getPartition:getPartition": {"partition": "aws"},
    "aws:index/getAvailabilityZone:getAvailabilityZone": {"name": "us-east-1a"},
    "aws:ec2/getAmiIds:getAmiIds": {"ids": ["ami-0123456789abcdef0"]},
    "aws:ec2/getAmi:getAmi": {"rootDeviceName": "/dev/sda1"},
    "aws:ec2/getVpc:getVpc": {"cidrBlock": "10.1.0.0/16"},
    "aws:ec2/getSubnet:getSubnet": {"availabilityZone": "us-east-1b"},
    "aws:ssm/getParameter:getParameter": {"insecureValue": "ami-0fedcba9876543210"},
}
Dependencies = dict[str, set[str]]


@dataclass(frozen=True)
class Made:
    """One resource."""

    kind: str
    """`aws:ec2/launchTemplate:LaunchTemplate`."""
    name: str
    inputs: dict[str, Any]
    """With secrets as they are on their way to the engine: a mapping with a signature."""

    @property
    def type(self) -> str:
        return self.kind.rpartition(":")[2]

    @property
    def text(self) -> str:
        return json.dumps(self.inputs, default=str)


@dataclass
class Graph(mocks.Mocks):
    """Everything that a program declares."""

    resources: list[Made] = field(default_factory=list)
    waits: Dependencies = field(default_factory=dict)
    """By `Type name`: what it waits for, likewise."""
    exports: dict[str, Any] = field(default_factory=dict)

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, dict[Any, Any]]:
        self.resources.append(Made(args.typ, args.name, dict(args.inputs)))
        ident = f"{args.name}-id"
        arn = f"arn:aws:any:us-east-1:{ACCOUNT}:{args.typ.rpartition(':')[2]}/{args.name}"
        made = {"arn": arn, "dnsName": "lb.example.com", "zoneId": "Z1", "latestVersion": 1, "hostedZone": "ZNAMES"}
        named = {"bucket": f"{args.name}-bucket", "name": args.name, "availabilityZone": "us-east-1a"}
        options = [{"resourceRecordName": "_x", "resourceRecordType": "CNAME", "resourceRecordValue": "_y"}]
        proof = {"domainValidationOptions": options, "fqdn": "_x", "certificateArn": arn}
        return ident, {**made, **named, **proof, **dict(args.inputs)}

    def call(self, args: mocks.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        return ANSWERS[args.token], []

    def of(self, kind: str) -> list[Made]:
        """Every resource of a type."""
        return [made for made in self.resources if made.type == kind]

    def one(self, kind: str, name: str) -> Made:
        """The resource with this type and name."""
        return next(made for made in self.of(kind) if made.name == name)

    def before(self, start: str) -> set[str]:
        """All that something waits for, directly or not."""
        found: set[str] = set()
        todo = [start]
        while todo:
            for other in self.waits.get(todo.pop(), set()) - found:
                found.add(other)
                todo.append(other)
        return found

    def user_data(self) -> Iterator[tuple[str, str]]:
        """Name and user data of every machine."""
        for made in [*self.of("LaunchTemplate"), *self.of("Instance")]:
            encoded = made.inputs.get("userData") or made.inputs["userDataBase64"]
            yield made.name, base64.b64decode(encoded).decode()


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """What stacks/Pulumi.NAME.yaml has, with changes of keys of ours."""
    written = yaml.safe_load((ROOT / f"stacks/Pulumi.{name}.yaml").read_text())["config"]
    keyed = {"vllm-fleet:api-keys": {"team-a": f"sha256:{KEY_HASH}"}}
    return {**written, **keyed, **{f"vllm-fleet:{key.replace('_', '-')}": value for key, value in changes.items()}}


def graph_of(monkeypatch: pytest.MonkeyPatch, folder: Path, stack: str, config: dict[str, Any]) -> Graph:
    """Run the program as Pulumi would."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
    monkeypatch.setenv("FLEET_DIR", str(folder))
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps(texts))
    graph = Graph()
    register: Any = mocks.MockMonitor.RegisterResource

    def noted(monitor: Any, request: Any) -> Any:
        answer = register(monitor, request)
        named = {_named(urn) for urn in request.dependencies}
        graph.waits.setdefault(_named(answer.urn), set()).update(named)
        return answer

    monkeypatch.setattr(mocks.MockMonitor, "RegisterResource", noted)
    monkeypatch.setattr(pulumi, "export", graph.exports.__setitem__)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        pulumi.runtime.set_mocks(graph, project="vllm-fleet", stack=stack)
        until_settled: Any = pulumi.runtime.test
        until_settled(lambda: program.run(stack))()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        close_event_loops()
    return graph


def _named(urn: str) -> str:
    *_, kinds, name = urn.split("::")
    return f"{kinds.rpartition(':')[2]} {name}"
