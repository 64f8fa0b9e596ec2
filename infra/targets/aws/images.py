"""What machines boot from: the image that the config names, or the newest public one when a stack is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.catalog.images import public_images
from infra.findings import ConfigError, Finding
from infra.targets.aws.site import Site


@dataclass(frozen=True)
class Image:
    """An image of machines."""

    id: str
    root: str
    """Device name of its root volume."""
    pinned: bool
    """The config says which. Else it is kept as it is: a newer public image must not replace machines by itself."""

    @property
    def ignored(self) -> list[str]:
        """What of a machine's settings an update leaves alone."""
        return [] if self.pinned else ["imageId", "blockDeviceMappings[0].deviceName"]


def find(role: str, wanted: str | None, site: Site) -> Image:
    """The image of a role.

    Raises:
        ConfigError: There is no such image.
    """
    if wanted is None:
        found = _public(role)
        if found is None:
            fix = f"add `aws.images.{role}: ami-…`: no public image that is known can be had in {site.region}"
            raise ConfigError([Finding(f"aws.images.{role}", "is missing", fix)])
    else:
        found = aws.ssm.get_parameter(name=wanted).insecure_value if wanted.startswith("/") else wanted
    known = aws.ec2.get_ami(filters=[{"name": "image-id", "values": [found]}])
    return Image(found, known.root_device_name, wanted is not None)


def _public(role: str) -> str | None:
    """The newest of the first kind of public image that can be had here."""
    for kind in public_images(role):
        filters: list[Any] = [{"name": "name", "values": [kind.name]}, {"name": "state", "values": ["available"]}]
        ids = aws.ec2.get_ami_ids(owners=[kind.owner], filters=filters).ids
        if ids:
            return ids[0]
        pulumi.log.debug(f"no image {kind.name} of {kind.owner} here")
    return None
