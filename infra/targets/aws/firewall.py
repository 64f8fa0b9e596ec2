"""Who may talk to whom: security groups that name each other. Nothing is open to the world but the endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pulumi
import pulumi_aws as aws

from infra.plan.aws import EXPORTER_PORTS
from infra.targets.aws.network import ANYWHERE
from infra.targets.aws.site import Part, Site

if TYPE_CHECKING:
    from infra.plan.model import FleetPlan
    from infra.targets.aws.network import Place

HTTPS, HTTP = 443, 80
MACHINES = ("engine", "gateway", "monitor")


@dataclass(frozen=True)
class Rule:
    """Machines of one role may open connections to another role."""

    client: str
    server: str
    first: int
    last: int
    why: str

    @property
    def name(self) -> str:
        """Of its resources."""
        return f"{self.client}-to-{self.server}-{self.first}"


def rules(plan: FleetPlan) -> list[Rule]:
    """Everything that one role may ask of another."""
    cloud, gateway = plan.on_aws, plan.gateway
    if cloud is None:
        return []
    first, last = cloud.engine_ports
    found = [
        Rule("balancer", "gateway", gateway.port, gateway.port, "requests and health checks"),
        Rule("gateway", "engine", first, last, "requests"),
        Rule("gateway", "engine", plan.agent.port, plan.agent.port, "which engines are ready"),
        Rule("monitor", "engine", first, last, "metrics of engines"),
        Rule("monitor", "engine", plan.agent.port, plan.agent.port, "metrics of agents"),
        Rule("monitor", "gateway", gateway.stats_port, gateway.stats_port, "metrics of gateways"),
        *(Rule("monitor", "engine", port, port, "metrics of machines") for port in EXPORTER_PORTS),
        Rule("monitor", "gateway", EXPORTER_PORTS[0], EXPORTER_PORTS[0], "metrics of machines"),
    ]
    if gateway.peers_port:
        found.append(Rule("gateway", "gateway", gateway.peers_port, gateway.peers_port, "what keys have used"))
    if cloud.network.interface_endpoints:
        found += [Rule(machine, "endpoints", HTTPS, HTTPS, "services of AWS") for machine in MACHINES]
    return found


class Firewall(Part):
    """The security groups."""

    def __init__(self, name: str, site: Site, place: Place) -> None:
        super().__init__("Firewall", name)
        builders = ["builder"] if site.aws.bake else []
        roles = [*MACHINES, *builders, "balancer", *(["endpoints"] if site.aws.network.interface_endpoints else [])]
        self._groups = {
            role: aws.ec2.SecurityGroup(
                role,
                description=f"vllm-fleet {site.stack}: {role}",
                vpc_id=place.vpc,
                tags=site.named(role),
                opts=self.within(),
            )
            for role in roles
        }
        for rule in rules(site.plan):
            self._between(rule, site)
        self._clients(site, place)
        for role in (*MACHINES, *builders):
            self._out(role, site)
        self.register_outputs({})

    def __getitem__(self, role: str) -> pulumi.Output[str]:
        """The security group of a role."""
        return self._groups[role].id

    def _between(self, rule: Rule, site: Site) -> None:
        client, server = self._groups[rule.client].id, self._groups[rule.server].id
        aws.vpc.SecurityGroupIngressRule(
            rule.name,
            security_group_id=server,
            referenced_security_group_id=client,
            ip_protocol="tcp",
            from_port=rule.first,
            to_port=rule.last,
            description=f"{rule.client}: {rule.why}",
            tags=site.tags(rule.server),
            opts=self.within(),
        )
        aws.vpc.SecurityGroupEgressRule(
            rule.name,
            security_group_id=client,
            referenced_security_group_id=server,
            ip_protocol="tcp",
            from_port=rule.first,
            to_port=rule.last,
            description=f"{rule.server}: {rule.why}",
            tags=site.tags(rule.client),
            opts=self.within(),
        )

    def _clients(self, site: Site, place: Place) -> None:
        """Those who may use the endpoint."""
        balancer = site.aws.balancer
        networks: dict[str, pulumi.Input[str]] = {cidr: cidr for cidr in balancer.clients} or {"vpc": place.cidr}
        for name, cidr in networks.items():
            aws.vpc.SecurityGroupIngressRule(
                f"clients-{name}",
                security_group_id=self._groups["balancer"].id,
                cidr_ipv4=cidr,
                ip_protocol="tcp",
                from_port=balancer.port,
                to_port=balancer.port,
                description="clients",
                tags=site.tags("balancer"),
                opts=self.within(),
            )

    def _out(self, role: str, site: Site) -> None:
        """What machines fetch: from AWS, whose addresses are public even where the way is not, and packages.

        Names and the time come from addresses that security groups do not look at.
        """
        to = {"https": HTTPS}
        if getattr(site.aws, f"{role}_image", None) is None:  # archives of Debian and Ubuntu are signed, and not on TLS
            to["http"] = HTTP
        for scheme, port in to.items():
            aws.vpc.SecurityGroupEgressRule(
                f"{role}-{scheme}",
                security_group_id=self._groups[role].id,
                cidr_ipv4=ANYWHERE,
                ip_protocol="tcp",
                from_port=port,
                to_port=port,
                description="services of AWS and packages" if scheme == "https" else "packages",
                tags=site.tags(role),
                opts=self.within(),
            )
