"""How machines that run take up an edit: State Manager, one machine after the other, gateways before engines."""

from __future__ import annotations

from collections.abc import Sequence

import pulumi
import pulumi_aws as aws

from infra.paths import NODECONFIG
from infra.targets.aws.site import Part, Site

DOCUMENT = NODECONFIG / "aws" / "apply.yml"
SAY_S = 60
"""For the agent to hear of an order and to say how it went."""


class Rollout(Part):
    """The document that machines run to take up a bundle, and who runs which."""

    def __init__(self, name: str, site: Site) -> None:
        super().__init__("Rollout", name)
        self._site = site
        self.document = aws.ssm.Document(
            "apply",
            document_type="Command",
            document_format="YAML",
            content=DOCUMENT.read_text(encoding="utf-8"),
            target_type="/AWS::EC2::Instance",
            tags=site.tags("rollout"),
            opts=self.within(),
        )
        self.register_outputs({})

    def move(
        self, machine: str, digest: str, timeout_s: int, tags: dict[str, str], after: Sequence[pulumi.Resource]
    ) -> list[pulumi.Resource]:
        """Let the machines of one kind take up a bundle: one at a time, and none any more after one has failed.

        State Manager runs it on machines that join later too: these have the bundle already, and do nothing.

        Args:
            machine: The kind.
            digest: Of the bundle.
            timeout_s: How long one machine may take.
            tags: Of the association.
            after: What comes first: gateways learn, then nodes move. It is the order in which AWS is told, not in which
                it is done; engines find their way into the gateways by DNS, so that neither has to wait for the other.
        """
        site = self._site
        if site.aws.rollout == "manual":
            return []
        return [
            aws.ssm.Association(
                machine,
                name=self.document.name,
                association_name=f"fleet-{site.stack}-{machine}",
                parameters={"Digest": digest, "TimeoutSeconds": str(timeout_s + SAY_S)},
                targets=[
                    {"key": "tag:vllm-fleet:stack", "values": [site.stack]},
                    {"key": "tag:vllm-fleet:machine", "values": [machine]},
                ],
                max_concurrency="1",
                max_errors="0",
                compliance_severity="HIGH",
                tags=tags,
                opts=self.within(depends_on=list(after)),
            )
        ]

    @property
    def command(self) -> pulumi.Output[str]:
        """What moves machines by hand."""
        site = self._site
        return pulumi.Output.concat(
            f"aws ssm send-command --region {site.region} --document-name ",
            self.document.name,
            f" --targets Key=tag:vllm-fleet:stack,Values={site.stack} Key=tag:vllm-fleet:machine,Values=MACHINE",
            " --parameters Digest=DIGEST,TimeoutSeconds=7200 --max-concurrency 1 --max-errors 0",
        )
