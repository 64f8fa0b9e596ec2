"""What all machines have in common: how they boot, what they show of themselves, how they are replaced."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.render.machines import LAUNCH, TERMINATE
from infra.render.user_data import NodeSettings, user_data
from infra.targets.aws.images import Image
from infra.targets.aws.site import Site, gib

METADATA: Any = {"http_endpoint": "enabled", "http_tokens": "required", "http_put_response_hop_limit": 1}
"""Tokens only, and no further than the machine itself: nothing that is tricked into a request gets the role's keys."""


@dataclass(frozen=True)
class Look:
    """What a machine boots from and with."""

    image: Image
    profile: pulumi.Output[str]
    """ARN of its instance profile."""
    group: pulumi.Output[str]
    """Its security group."""
    volume_bytes: int
    """Of the root volume."""
    tags: dict[str, str]
    """Of what is never retagged: of volumes, whose tags stand in the template; another template means new machines."""


def root_volume(look: Look) -> Any:
    """The root volume of a machine, encrypted with the account's key for EBS.

    Not with the stack's own: for that the role by which AWS starts instances of a group would need a grant.
    """
    return {
        "volume_type": "gp3",
        "volume_size": gib(look.volume_bytes),
        "encrypted": True,
        "delete_on_termination": True,
    }


def encoded(settings: pulumi.Output[NodeSettings]) -> pulumi.Output[str]:
    """User data as AWS takes it."""
    return settings.apply(lambda it: base64.b64encode(user_data(it).encode()).decode())


def template(  # noqa: PLR0913, PLR0917 - what it is made of
    name: str,
    site: Site,
    look: Look,
    settings: pulumi.Output[NodeSettings],
    instance: str,
    opts: pulumi.ResourceOptions,
    tags: Mapping[str, str],
    **more: Any,
) -> aws.ec2.LaunchTemplate:
    """The launch template of a group.

    It holds only what means new machines when it changes. Tags of instances are the group's, therefore.
    """
    volume: Any = {"device_name": look.image.root, "ebs": {key: _text(it) for key, it in root_volume(look).items()}}
    interface: Any = {
        "device_index": 0,
        "associate_public_ip_address": "false",
        "delete_on_termination": "true",
        "security_groups": [look.group],
    }
    metadata: Any = {**METADATA, "instance_metadata_tags": "enabled"}
    profile: Any = {"arn": look.profile}
    tagged: Any = [{"resource_type": kind, "tags": look.tags} for kind in ("volume", "network-interface")]
    made: aws.ec2.LaunchTemplate = aws.ec2.LaunchTemplate(
        name,
        description=f"vllm-fleet {site.stack}: {name}",
        image_id=look.image.id,
        instance_type=instance,
        user_data=encoded(settings),
        iam_instance_profile=profile,
        metadata_options=metadata,
        block_device_mappings=[volume],
        network_interfaces=[interface],
        tag_specifications=tagged,
        update_default_version=True,
        tags=dict(tags),
        opts=pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(ignore_changes=look.image.ignored)),
        **more,
    )
    return made


def _text(value: Any) -> Any:
    """Truth as the launch template's arguments want it."""
    return str(value).lower() if isinstance(value, bool) else value


def group_tags(tags: Mapping[str, str]) -> list[Any]:
    """Tags of a group, which its instances get too."""
    return [{"key": key, "value": value, "propagate_at_launch": True} for key, value in sorted(tags.items())]


def hook(name: str, transition: str, heartbeat_s: int, default: str) -> Any:
    """A lifecycle hook, as groups are made with it: the first machine meets it too."""
    return {
        "name": name,
        "lifecycle_transition": f"autoscaling:EC2_INSTANCE_{transition}",
        "heartbeat_timeout": heartbeat_s,
        "default_result": default,
    }


def hooks(launch_s: int, terminate_s: int) -> list[Any]:
    """A machine that does not get ready is abandoned; one that says nothing while it drains is ended."""
    return [
        hook(LAUNCH, "LAUNCHING", launch_s, "ABANDON"),
        hook(TERMINATE, "TERMINATING", terminate_s, "CONTINUE"),
    ]


def keep_hooks(name: str, group: aws.autoscaling.Group, wanted: list[Any], parent: pulumi.Resource) -> None:
    """Keep the hooks of a group as they are wanted: those that it was made with cannot be changed otherwise.

    They go before the group does, which ends what they hold: who destroys a group does not wait for its drains.
    """
    for it in wanted:
        settings = {key: value for key, value in it.items() if key != "name"}
        aws.autoscaling.LifecycleHook(
            f"{name}-{it['name']}",
            name=it["name"],
            autoscaling_group_name=group.name,
            opts=pulumi.ResourceOptions(parent=parent),
            **settings,
        )


def healthy(least: int, most: int) -> Any:
    """How many machines of a group there are while some are replaced, in per cent."""
    return {"min_healthy_percentage": least, "max_healthy_percentage": most}


def refresh(min_healthy: int, max_healthy: int, warmup_s: int) -> Any:
    """How a group replaces its machines when its template has a new version, and goes back when they do not come up.

    Machines that are protected as they are in use are replaced in their turn all the same: their terminate hook waits
    for what runs on them.
    """
    return {
        "strategy": "Rolling",
        "preferences": {
            **healthy(min_healthy, max_healthy),
            "instance_warmup": str(warmup_s),
            "auto_rollback": True,
            "skip_matching": True,
            "scale_in_protected_instances": "Refresh",
            "standby_instances": "Ignore",
        },
    }
