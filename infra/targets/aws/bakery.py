"""Images of machines: a pipeline of EC2 Image Builder for each role.

A pipeline runs when it is told to, and writes the id of the image that it made into an SSM parameter, which
`aws.images` of a stack can name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.catalog import bakes
from infra.targets.aws.cache import Cache
from infra.targets.aws.identity import SESSIONS, Account, MachineRole
from infra.targets.aws.site import Part, Site, allow

PARAMETERS = "/imagebuilder/"
"""Image Builder's own role may write parameters below this, and no others."""
INLINE_LIMIT = 16_000
"""Characters of a component document that is given with the request (API reference of CreateComponent, 2026-11)."""


def parameter(stack: str, role: str) -> str:
    """Name of the parameter that holds the id of a role's newest image."""
    return f"{PARAMETERS}vllm-fleet/{stack}/{role}"


def version(*content: str) -> str:
    """A version for content that cannot be changed once it has one: another content has another.

    Image Builder takes three numbers below 2**30.
    """
    return f"1.0.{int(hashlib.sha256(chr(0).join(content).encode()).hexdigest()[:7], 16)}"


class Bakery(Part):
    """Everything that makes images of a stack's machines."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it is made of
        self,
        name: str,
        site: Site,
        account: Account,
        cache: Cache,
        subnet: pulumi.Input[str],
        group: pulumi.Input[str],
    ) -> None:
        """Declare it.

        Args:
            name: Of the part.
            site: The stack.
            account: Of whom it is.
            cache: Where locks and pins are kept for the machines that build.
            subnet: Where those machines are: they need a way to package archives.
            group: Their security group: nobody has to reach them.
        """
        super().__init__("Bakery", name)
        self._site, self._cache = site, cache
        text = bakes.install_files()
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        stored = cache.store("image-files", f"runtime/{self._digest}.json", text, site)
        tags = site.tags("image")
        rights = _rights(account, cache, self._digest)
        profile = MachineRole("image", site, tags, rights, self).profile.apply(lambda arn: arn.rpartition("/")[2])
        needed = dict.fromkeys(name for row in bakes.images().values() for name in row.components)
        components = {name: self._component(name) for name in needed}
        self.pipelines = {
            role: self._pipeline(role, row, components, profile, subnet, group, [stored])
            for role, row in bakes.images().items()
        }
        self.register_outputs({})

    def _component(self, name: str) -> aws.imagebuilder.Component:
        site, text = self._site, bakes.component(name)
        if len(text) > INLINE_LIMIT:
            raise ValueError(
                f"images/components/{name}.yaml has {len(text)} characters: Image Builder takes {INLINE_LIMIT}"
            )
        return aws.imagebuilder.Component(
            f"image-{name}",
            name=f"fleet-{site.stack}-{name}",
            version=version(text),
            platform="Linux",
            data=text,
            tags=site.tags("image"),
            # A recipe may still use the old one while the new one is made.
            opts=self.within(),
        )

    def _pipeline(  # noqa: PLR0913, PLR0917 - what it is made of
        self,
        role: str,
        row: bakes.ImageRow,
        components: dict[str, aws.imagebuilder.Component],
        profile: pulumi.Input[str],
        subnet: pulumi.Input[str],
        group: pulumi.Input[str],
        after: Sequence[pulumi.Resource],
    ) -> aws.imagebuilder.ImagePipeline:
        site, name, tags = self._site, f"fleet-{self._site.stack}-{role}", self._site.tags("image", made=role)
        texts = [bakes.component(one) for one in row.components]
        recipe = aws.imagebuilder.ImageRecipe(
            f"image-{role}",
            name=name,
            version=version(row.model_dump_json(), self._digest, *texts),
            parent_image=f"ssm:{row.parent}",
            components=[
                aws.imagebuilder.ImageRecipeComponentArgs(
                    component_arn=components[one].arn, parameters=self._given() if one == "fleet" else None
                )
                for one in row.components
            ],
            block_device_mappings=[
                aws.imagebuilder.ImageRecipeBlockDeviceMappingArgs(
                    device_name=row.root,
                    ebs=aws.imagebuilder.ImageRecipeBlockDeviceMappingEbsArgs(
                        volume_size=row.volume_gb, volume_type="gp3", encrypted="true", delete_on_termination="true"
                    ),
                )
            ],
            # The rollout of an edit goes through the agent of SSM.
            systems_manager_agent={"uninstall_after_build": False},
            tags=tags,
            opts=self.within(),
        )
        where = aws.imagebuilder.InfrastructureConfiguration(
            f"image-{role}",
            name=name,
            instance_profile_name=profile,
            instance_types=list(row.instances),
            instance_metadata_options={"http_tokens": "required", "http_put_response_hop_limit": 1},
            subnet_id=subnet,
            security_group_ids=[group],
            terminate_instance_on_failure=True,
            resource_tags=tags,
            tags=tags,
            opts=self.within(),
        )
        known = aws.imagebuilder.DistributionConfiguration(
            f"image-{role}",
            name=name,
            distributions=[
                {
                    "region": site.region,
                    "ami_distribution_configuration": {
                        "name": f"{name}-{{{{ imagebuilder:buildDate }}}}",
                        "ami_tags": tags,
                    },
                    "ssm_parameter_configurations": [
                        {"parameter_name": parameter(site.stack, role), "data_type": "aws:ec2:image"}
                    ],
                }
            ],
            tags=tags,
            opts=self.within(),
        )
        return aws.imagebuilder.ImagePipeline(
            f"image-{role}",
            name=name,
            image_recipe_arn=recipe.arn,
            infrastructure_configuration_arn=where.arn,
            distribution_configuration_arn=known.arn,
            tags=tags,
            opts=self.within(depends_on=list(after)),
        )

    def _given(self) -> list[aws.imagebuilder.ImageRecipeComponentParameterArgs]:
        """Parameters of the component `fleet`."""
        source = pulumi.Output.concat("s3://", self._cache.bucket.bucket, f"/runtime/{self._digest}.json")
        given: dict[str, pulumi.Input[str]] = {"Source": source, "Sha256": self._digest}
        return [aws.imagebuilder.ImageRecipeComponentParameterArgs(name=it, value=value) for it, value in given.items()]

    @property
    def commands(self) -> dict[str, pulumi.Output[str]]:
        """What begins to build an image, by role."""
        start = f"aws imagebuilder start-image-pipeline-execution --region {self._site.region} --image-pipeline-arn "
        return {role: pulumi.Output.concat(start, it.arn) for role, it in self.pipelines.items()}


def _rights(account: Account, cache: Cache, digest: str) -> list[dict[str, Any]]:
    """What a machine may while it is made into an image."""
    components = account.arn("imagebuilder", "component/fleet-*")
    logs = account.arn("logs", "log-group:/aws/imagebuilder/*")
    return [
        allow(SESSIONS, "*"),
        allow(["imagebuilder:GetComponent"], components),
        allow(["s3:GetObject"], pulumi.Output.concat(cache.bucket.arn, f"/runtime/{digest}.json")),
        # Where Image Builder keeps the program that runs components.
        allow(["s3:GetObject"], f"arn:{account.partition}:s3:::ec2imagebuilder*"),
        allow(["kms:Decrypt"], cache.key.arn),
        allow(["logs:CreateLogStream", "logs:CreateLogGroup", "logs:PutLogEvents"], logs),
    ]
