"""Discovery: a private namespace of Cloud Map, and in it a service for each model's engines."""

from __future__ import annotations

import pulumi
import pulumi_aws as aws

from infra.targets.aws.network import Place
from infra.targets.aws.site import Part, Site


class Discovery(Part):
    """Where gateways find the engines: SRV records of those that are ready, which nodes register themselves."""

    def __init__(self, name: str, site: Site, place: Place) -> None:
        super().__init__("Discovery", name)
        self.namespace = aws.servicediscovery.PrivateDnsNamespace(
            "names",
            name=f"{site.stack}.internal",
            description=f"vllm-fleet {site.stack}: engines that are ready",
            vpc=place.vpc,
            tags=site.tags("discovery"),
            opts=self.within(),
        )
        self._services = {
            model: aws.servicediscovery.Service(
                f"engines-{model}",
                name=srv.removesuffix(f".{site.stack}.internal"),
                # Said twice: Cloud Map's own API calls the one below outdated, and the Terraform provider wants it.
                namespace_id=self.namespace.id,
                dns_config={
                    "namespace_id": self.namespace.id,
                    "routing_policy": "MULTIVALUE",
                    "dns_records": [{"type": "SRV", "ttl": site.timings.dns_ttl_s}],
                },
                # Nodes that were ended hard could not take themselves out.
                force_destroy=True,
                tags=site.tags("discovery"),
                opts=self.within(),
            )
            for model, srv, _ in site.plan.gateway.srv
        }
        self.register_outputs({})

    @property
    def models(self) -> list[str]:
        """Those that have a service: all."""
        return list(self._services)

    def ids(self, models: list[str]) -> pulumi.Output[dict[str, str]]:
        """Model to the id of its service."""
        return pulumi.Output.all(**{model: self._services[model].id for model in models})

    def arns(self, models: list[str]) -> list[pulumi.Output[str]]:
        """What nodes of these models may register themselves at."""
        return [self._services[model].arn for model in models]
