"""What makes a later rung of a pool's ladder serve when an earlier one has no capacity: a small program in Lambda.

No one group can do it: reservations, on-demand and spot differ in their templates, and a mixed-instances policy divides
nodes between on-demand and spot by fixed shares: what one lacks the other does not take over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.paths import NODECONFIG
from infra.targets.aws.identity import Account
from infra.targets.aws.site import Part, Site, allow, policy, trust

PROGRAM = NODECONFIG / "ladder" / "ladder.py"
RUNTIME = "python3.12"
LONGEST_S = 60
LOG_DAYS = 30
EVENTS = ["EC2 Instance Launch Successful", "EC2 Instance Launch Unsuccessful", "EC2 Instance Terminate Successful"]
ALSO = "rate(5 minutes)"
"""An event may be lost."""


def ladders(site: Site) -> list[list[str]]:
    """Names of the groups of every pool that has several."""
    groups = [[it.name for it in site.aws.groups if it.pool == pool.name] for pool in site.plan.pools]
    return [names for names in groups if len(names) > 1]


class Ladder(Part):
    """The program, what it may do, and what it is called by."""

    def __init__(self, name: str, site: Site, account: Account, after: Sequence[pulumi.Resource]) -> None:
        super().__init__("Ladder", name)
        tags, found = site.tags("ladder"), ladders(site)
        called = f"fleet-{re.sub('[^A-Za-z0-9_-]', '-', site.stack)}-ladder"
        log = aws.cloudwatch.LogGroup(
            "ladder",
            name=f"/aws/lambda/{called}",  # where Lambda writes by itself
            retention_in_days=LOG_DAYS,
            tags=tags,
            opts=self.within(),
        )
        role = aws.iam.Role(
            "ladder",
            path=site.path,
            assume_role_policy=trust("lambda"),
            permissions_boundary=site.aws.permissions_boundary,
            tags=tags,
            opts=self.within(),
        )
        may = aws.iam.RolePolicy(
            "ladder",
            role=role.id,
            policy=policy(
                allow(["autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeScalingActivities"], "*"),
                allow(["autoscaling:SetDesiredCapacity"], [account.group(it) for names in found for it in names[1:]]),
                allow(["logs:CreateLogStream", "logs:PutLogEvents"], pulumi.Output.concat(log.arn, ":*")),
            ),
            opts=self.within(),
        )
        function = aws.lambda_.Function(
            "ladder",
            name=called,
            description=f"vllm-fleet {site.stack}: nodes from the next rung where one has none",
            runtime=RUNTIME,
            handler="ladder.handler",
            code=pulumi.AssetArchive(
                {
                    "ladder.py": pulumi.FileAsset(str(PROGRAM)),
                    "ladders.json": pulumi.StringAsset(json.dumps(found)),
                }
            ),
            role=role.arn,
            timeout=LONGEST_S,
            reserved_concurrent_executions=1,  # two at once would look at the same groups
            tags=tags,
            opts=self.within(depends_on=[log, may, *after]),
        )
        pattern = {
            "source": ["aws.autoscaling"],
            "detail-type": EVENTS,
            "detail": {"AutoScalingGroupName": [{"prefix": f"fleet-{site.stack}-engine-"}]},
        }
        self._call("ladder", function, tags, event_pattern=json.dumps(pattern))
        self._call("ladder-also", function, tags, schedule_expression=ALSO)
        self.register_outputs({})

    def _call(self, name: str, function: aws.lambda_.Function, tags: dict[str, str], **when: Any) -> None:
        rule = aws.cloudwatch.EventRule(name, tags=tags, opts=self.within(), **when)
        aws.cloudwatch.EventTarget(name, rule=rule.name, arn=function.arn, opts=self.within())
        aws.lambda_.Permission(
            name,
            action="lambda:InvokeFunction",
            function=function.name,
            principal="events.amazonaws.com",
            source_arn=rule.arn,
            opts=self.within(),
        )
