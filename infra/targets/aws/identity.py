"""What each kind of machine may do: its own work on named things, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.targets.aws.cache import Cache
from infra.targets.aws.discovery import Discovery
from infra.targets.aws.site import Part, Site, allow, policy, trust

SESSIONS = [
    *(f"ssmmessages:{verb}{channel}Channel" for verb in ("Create", "Open") for channel in ("Control", "Data")),
    *(
        f"ec2messages:{action}"
        for action in (
            *("AcknowledgeMessage", "DeleteMessage", "FailMessage"),
            *("GetEndpoint", "GetMessages", "SendReply"),
        )
    ),
    *(
        f"ssm:{action}"
        for action in (
            *("UpdateInstanceInformation", "ListInstanceAssociations", "UpdateInstanceAssociationStatus"),
            *("PutComplianceItems", "PutInventory", "GetManifest"),
        )
    ),
]
"""What the SSM agent needs of its own machine; AWS knows no narrower resource for these. The managed policy for it,
AmazonSSMManagedInstanceCore, would let every machine read every parameter of the account."""
HOOKS = ["autoscaling:CompleteLifecycleAction", "autoscaling:RecordLifecycleActionHeartbeat"]
KEEP = ["autoscaling:SetInstanceProtection", "autoscaling:SetInstanceHealth"]


@dataclass(frozen=True)
class Account:
    """Of whom everything is."""

    partition: str
    id: str
    region: str

    def arn(self, service: str, rest: str) -> str:
        """The ARN of something in this account and region."""
        return f"arn:{self.partition}:{service}:{self.region}:{self.id}:{rest}"

    def group(self, name: str) -> str:
        """The ARN of an Auto Scaling group by its name; AWS puts an id between."""
        return self.arn("autoscaling", f"autoScalingGroup:*:autoScalingGroupName/{name}")


class MachineRole(Part):
    """The role of one kind of machines, and the profile by which instances have it."""

    def __init__(
        self, name: str, site: Site, tags: dict[str, str], statements: Sequence[dict[str, Any]], parent: pulumi.Resource
    ) -> None:
        super().__init__("MachineRole", name, pulumi.ResourceOptions(parent=parent))
        self.role = aws.iam.Role(
            name,
            path=site.path,
            assume_role_policy=trust("ec2"),
            permissions_boundary=site.aws.permissions_boundary,
            tags=tags,
            opts=self.within(),
        )
        rights = aws.iam.RolePolicy(name, role=self.role.id, policy=policy(*statements), opts=self.within())
        profile = aws.iam.InstanceProfile(
            name, path=site.path, role=self.role.name, tags=tags, opts=self.within(depends_on=[rights])
        )
        self.profile = profile.arn
        self.register_outputs({})


@dataclass(frozen=True)
class Rights:
    """What machines may do, by what they do."""

    site: Site
    account: Account
    cache: Cache

    def common(self, machine: str, documents: Sequence[pulumi.Input[str]]) -> list[dict[str, Any]]:
        """What every machine may: read what it is to run, and be reached through SSM.

        Args:
            machine: As in its parameter.
            documents: ARNs of what SSM may run on it.
        """
        objects = [pulumi.Output.concat(self.cache.bucket.arn, f"/{prefix}/*") for prefix in ("bundles", "runtime")]
        pointer = self.account.arn("ssm", f"parameter{self.site.parameter(machine)}")
        found = [
            allow(["s3:GetObject"], objects),
            allow(["kms:Decrypt"], self.cache.key.arn),
            allow(["ssm:GetParameter"], pointer),
            allow(SESSIONS, "*"),
        ]
        if documents:
            found.append(allow(["ssm:GetDocument", "ssm:DescribeDocument"], list(documents)))
            machines = self.account.arn("ec2", "instance/*")
            associations = [*documents, machines, self.account.arn("ssm", "association/*")]
            found.append(allow(["ssm:ListAssociations", "ssm:DescribeAssociation"], associations))
        return found

    def weights(self) -> list[dict[str, Any]]:
        """Engine nodes: read the weights."""
        bucket = self.cache.bucket.arn
        return [
            allow(["s3:GetObject"], pulumi.Output.concat(bucket, "/weights/*")),
            # Else S3 answers 403 where it should say that there is no such object; with a prefix as condition, too.
            allow(["s3:ListBucket"], bucket),
        ]

    def register(self, discovery: Discovery, models: list[str]) -> list[dict[str, Any]]:
        """Engine nodes: put themselves into the DNS as engines of their models.

        Cloud Map changes the records with the caller's rights. Its services have no health checks, so none for these.
        """
        actions = ["servicediscovery:RegisterInstance", "servicediscovery:DeregisterInstance"]
        return [allow(actions, discovery.arns(models)), *self._records(discovery)]

    def strike(self, discovery: Discovery) -> list[dict[str, Any]]:
        """The monitor: take engines out of the DNS whose machine is no more."""
        lists = [f"servicediscovery:List{what}" for what in ("Namespaces", "Services", "Instances")]
        return [
            allow(lists, "*"),  # have no resource
            allow(["servicediscovery:DeregisterInstance"], discovery.arns(discovery.models)),
            *self._records(discovery),
        ]

    def _records(self, discovery: Discovery) -> list[dict[str, Any]]:
        zones = f"arn:{self.account.partition}:route53:::hostedzone/"
        zone = pulumi.Output.concat(zones, discovery.namespace.hosted_zone)
        return [
            allow(["servicediscovery:GetOperation"], "*"),  # has no resource
            allow(["route53:GetHostedZone", "route53:ChangeResourceRecordSets"], zone),
            allow(["route53:ListHostedZonesByName"], "*"),  # has no resource
        ]

    def find_engines(self) -> dict[str, Any]:
        """Gateways: hear which engines are ready. The action has no resource, but a condition."""
        own = {"StringEquals": {"servicediscovery:NamespaceName": f"{self.site.stack}.internal"}}
        return allow(["servicediscovery:DiscoverInstances"], "*", Condition=own)

    def count_together(self) -> list[dict[str, Any]]:
        """Gateways: see the others, and write a number on oneself; on no other machine, and nothing else."""
        marked = {
            "StringEquals": {
                "ec2:ResourceTag/vllm-fleet:stack": self.site.stack,
                "ec2:ResourceTag/vllm-fleet:role": "gateway",
            },
            "ForAllValues:StringEquals": {"aws:TagKeys": ["vllm-fleet:gateway"]},
        }
        return [
            allow(["ec2:DescribeInstances"], "*"),  # has no resource
            allow(["ec2:CreateTags"], self.account.arn("ec2", "instance/*"), Condition=marked),
        ]

    def groups(self, names: Sequence[str], *, keep: bool) -> list[dict[str, Any]]:
        """Machines of groups: say that they are ready, and that they are done; `keep`: and that they are in use.

        Which of them may go although all are, they agree on: for that they look at the group.
        """
        found = [allow([*HOOKS, *(KEEP if keep else [])], [self.account.group(name) for name in names])]
        if keep:
            found.append(allow(["autoscaling:DescribeAutoScalingGroups"], "*"))  # has no resource
        return found

    def balance(self, targets: pulumi.Input[str]) -> list[dict[str, Any]]:
        """Gateways: leave the load balancer when they shut down, and come back."""
        return [
            allow(["autoscaling:DescribeAutoScalingGroups"], "*"),  # has no resource
            allow([f"elasticloadbalancing:{verb}Targets" for verb in ("Register", "Deregister")], targets),
        ]

    def climb(self) -> list[dict[str, Any]]:
        """Gateways: ask later rungs of a ladder for what earlier ones cannot get.

        The first rung and the limits of all, by which a pool has its size, are not theirs to change.
        """
        later = [self.account.group(name) for names in self.site.aws.ladders for name in names[1:]]
        return [
            # These two have no resource.
            allow(["autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeScalingActivities"], "*"),
            allow(["autoscaling:SetDesiredCapacity"], later),
        ]

    @staticmethod
    def secret(arn: pulumi.Input[str]) -> dict[str, Any]:
        """Read one secret."""
        return allow(["secretsmanager:GetSecretValue"], arn)

    @staticmethod
    def find_machines() -> dict[str, Any]:
        """The monitor: see which machines there are; AWS knows no narrower resource."""
        return allow(["ec2:DescribeInstances", "ec2:DescribeAvailabilityZones"], "*")
