"""What every part of a stack on AWS knows: the plan, the region, the tags; and what parts are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pulumi

from infra import aws_names
from infra.aws_names import PREFIX
from infra.plan.model import AwsPlan, AwsTimings, FleetPlan

GB = 10**9
GIB = 1 << 30


@dataclass(frozen=True)
class Site:
    """A stack on AWS."""

    plan: FleetPlan
    aws: AwsPlan
    timings: AwsTimings
    region: str

    @classmethod
    def of(cls, plan: FleetPlan) -> Site:
        """The site of a plan.

        Raises:
            ValueError: The plan is for another target.
        """
        if plan.on_aws is None or plan.aws is None or plan.region is None:
            raise ValueError(f"the plan is for {plan.target}, not for aws")
        return cls(plan, plan.on_aws, plan.aws, plan.region)

    @property
    def stack(self) -> str:
        """Name of the stack."""
        return self.plan.stack

    def fixed_tags(self, role: str, pool: str | None = None) -> dict[str, str]:
        """Tags that never change: those of things which would be replaced, or cannot have many."""
        tags = {f"{PREFIX}:stack": self.stack, f"{PREFIX}:role": role}
        return {**tags, f"{PREFIX}:pool": pool} if pool else tags

    def tags(self, role: str, pool: str | None = None, **more: str) -> dict[str, str]:
        """All tags of a resource; `more` are others of the fleet's own, without their prefix."""
        own = {f"{PREFIX}:{key}": value for key, value in more.items()}
        return {**dict(self.aws.tags), **self.fixed_tags(role, pool), **own}

    def named(self, role: str, pool: str | None = None, **more: str) -> dict[str, str]:
        """All tags of something that AWS shows by its tag `Name`."""
        name = "-".join(["fleet", self.stack, role, *([pool] if pool else [])])
        return {"Name": name, **self.tags(role, pool, **more)}

    @property
    def path(self) -> str:
        """Of everything in IAM: a policy for who deploys can name it."""
        return f"/{PREFIX}/{self.stack}/"

    def parameter(self, machine: str) -> str:
        """Name of the parameter that says what a machine runs."""
        return aws_names.parameter(self.stack, machine)

    @property
    def bucket_prefix(self) -> str:
        """What the bucket's name begins with."""
        return aws_names.bucket_start(self.stack)


class Part(pulumi.ComponentResource):
    """A part of a stack: its resources are below it."""

    def __init__(self, kind: str, name: str, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__(f"{PREFIX}:aws:{kind}", name, None, opts)

    def within(self, **options: Any) -> pulumi.ResourceOptions:
        """Options of a resource of this part."""
        return pulumi.ResourceOptions(parent=self, **options)


def gib(size: int) -> int:
    """Bytes as whole GiB, rounded up: in which AWS counts volumes."""
    return -(-size // GIB)


def policy(*statements: Mapping[str, Any]) -> pulumi.Output[str]:
    """A policy document; values may be outputs."""
    return pulumi.Output.json_dumps({"Version": "2012-10-17", "Statement": list(statements)})


def allow(actions: list[str], resources: Any, **more: Any) -> dict[str, Any]:
    """One statement of a policy."""
    return {"Effect": "Allow", "Action": actions, "Resource": resources, **more}


def trust(*services: str, **condition: Any) -> str:
    """Who may be a role: services of AWS."""
    statement: dict[str, Any] = {
        "Effect": "Allow",
        "Principal": {"Service": [f"{service}.amazonaws.com" for service in services]},
        "Action": "sts:AssumeRole",
        **condition,
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})
