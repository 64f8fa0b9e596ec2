"""The monitor: one machine, and a volume with its metrics that outlives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.targets.aws import machines
from infra.targets.aws.machines import Look
from infra.targets.aws.network import Place
from infra.targets.aws.nodes import settings
from infra.targets.aws.site import Part, Site, gib

DEVICE = "/dev/sdf"
"""What the volume is attached as; the system calls it otherwise, and finds it by its id."""


class Monitor(Part):
    """Prometheus, Alertmanager and Grafana."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it is made of
        self,
        name: str,
        site: Site,
        place: Place,
        look: Look,
        bucket: pulumi.Output[str],
        after: Sequence[pulumi.Resource],
    ) -> None:
        super().__init__("Monitor", name)
        plan = site.aws.monitor
        subnet = place.subnets(plan.zones)[0]
        # Not asked of the machine: the volume outlives it, and the whole network.
        if site.aws.network.vpc:
            zone = aws.ec2.get_subnet(id=site.aws.network.subnets[0]).availability_zone
        else:
            zone = aws.get_availability_zone(zone_id=plan.zones[0]).name
        told = bucket.apply(lambda it: settings(site, "monitor", "monitor", None, it, data_volume=DEVICE))
        metadata: Any = {**machines.METADATA, "instance_metadata_tags": "enabled"}
        root: Any = {**machines.root_volume(look), "tags": look.tags}
        self.instance = aws.ec2.Instance(
            "monitor",
            ami=look.image.id,
            instance_type=plan.instance,
            subnet_id=subnet,
            vpc_security_group_ids=[look.group],
            # Subnets that are made give none; of others nobody knows.
            associate_public_ip_address=False if site.aws.network.vpc else None,
            iam_instance_profile=look.profile.apply(lambda arn: arn.rpartition("/")[2]),
            metadata_options=metadata,
            root_block_device=root,
            user_data_base64=machines.encoded(told),
            user_data_replace_on_change=True,
            tags=site.named("monitor", machine="monitor"),
            opts=self.within(
                depends_on=list(after),
                # The volume can be in one machine at a time, and stays in the zone in which it was made.
                delete_before_replace=True,
                ignore_changes=["subnetId", *([] if look.image.pinned else ["ami"])],
            ),
        )
        volume = aws.ebs.Volume(
            "metrics",
            availability_zone=zone,
            size=gib(plan.data_bytes),
            type="gp3",
            encrypted=True,
            final_snapshot=False,
            tags=site.named("metrics"),
            opts=self.within(protect=site.aws.protect, ignore_changes=["availabilityZone"]),
        )
        aws.ec2.VolumeAttachment(
            "metrics",
            device_name=DEVICE,
            instance_id=self.instance.id,
            volume_id=volume.id,
            stop_instance_before_detaching=True,
            opts=self.within(delete_before_replace=True),
        )
        self.register_outputs({})
