"""The gateways and the load balancer in front of them."""

from __future__ import annotations

from collections.abc import Sequence

import pulumi
import pulumi_aws as aws

from infra.targets.aws import machines
from infra.targets.aws.firewall import Firewall
from infra.targets.aws.machines import Look
from infra.targets.aws.network import Place
from infra.targets.aws.nodes import settings
from infra.targets.aws.site import Part, Site

TLS_POLICY = "ELBSecurityPolicy-TLS13-1-2-2021-06"
CHECK_S = 10
"""How often the load balancer looks after a gateway; 5 to 300 s are allowed."""
CHECKS = 2
"""Answers that are alike before it believes them."""
RECORD_TTL_S = 60


class Balancer(Part):
    """The network load balancer: connections go to gateways that answer for their engines."""

    def __init__(self, name: str, site: Site, place: Place, firewall: Firewall) -> None:
        super().__init__("Balancer", name)
        plan = site.aws.balancer
        self._site, self._plan = site, plan
        balancer = aws.lb.LoadBalancer(
            "endpoint",
            load_balancer_type="network",
            internal=not plan.public,
            # Of zones that stay: one that leaves a zone is another one, with another name.
            subnets=list(place.public.values()) if plan.public else place.subnets(site.aws.gateway.zones),
            security_groups=[firewall["balancer"]],
            enable_cross_zone_load_balancing=True,
            tags=site.tags("balancer"),
            opts=self.within(),
        )
        self.targets = aws.lb.TargetGroup(
            "gateways",
            vpc_id=place.vpc,
            port=site.plan.gateway.port,
            protocol="TCP",
            # The gateways learn who the client is from the PROXY header, which works in every zone and through TLS.
            proxy_protocol_v2=True,
            preserve_client_ip="false",
            # A gateway that leaves keeps its connections until it has finished with them.
            deregistration_delay=site.timings.deregistration_s,
            connection_termination=False,
            health_check={
                "protocol": "HTTPS" if plan.tls == "gateway" else "HTTP",
                "path": plan.health_path,
                "port": "traffic-port",
                "interval": CHECK_S,
                "healthy_threshold": CHECKS,
                "unhealthy_threshold": CHECKS,
                "matcher": "200",
            },
            tags=site.tags("gateway"),
            opts=self.within(),
        )
        ends_tls = plan.tls == "balancer"
        aws.lb.Listener(
            "endpoint",
            load_balancer_arn=balancer.arn,
            port=plan.port,
            protocol="TLS" if ends_tls else "TCP",
            certificate_arn=self._certificate() if ends_tls else None,
            ssl_policy=TLS_POLICY if ends_tls else None,
            # A TLS listener has 350 s, which cannot be changed.
            tcp_idle_timeout_seconds=None if ends_tls else site.timings.idle_s,
            default_actions=[{"type": "forward", "target_group_arn": self.targets.arn}],
            tags=site.tags("balancer"),
            opts=self.within(),
        )
        if plan.hosted_zone and plan.hostname:
            aws.route53.Record(
                "endpoint",
                zone_id=plan.hosted_zone,
                name=plan.hostname,
                type="A",
                aliases=[{"name": balancer.dns_name, "zone_id": balancer.zone_id, "evaluate_target_health": False}],
                opts=self.within(),
            )
        host = plan.hostname if plan.hosted_zone or plan.tls else None
        scheme = "https" if plan.tls else "http"
        self.url = pulumi.Output.concat(f"{scheme}://", host or balancer.dns_name)
        self.register_outputs({"url": self.url})

    def _certificate(self) -> pulumi.Input[str]:
        """The certificate that the config names, or one that ACM gives when the name is ours."""
        plan, site = self._plan, self._site
        if plan.certificate is not None:
            return plan.certificate
        certificate = aws.acm.Certificate(
            "endpoint",
            domain_name=plan.hostname,
            validation_method="DNS",
            tags=site.tags("balancer"),
            opts=self.within(),
        )
        proof = certificate.domain_validation_options[0]
        record = aws.route53.Record(
            "certificate",
            zone_id=str(plan.hosted_zone),
            name=proof.resource_record_name,
            type=proof.resource_record_type,
            records=[proof.resource_record_value],
            ttl=RECORD_TTL_S,
            allow_overwrite=True,
            opts=self.within(),
        )
        return aws.acm.CertificateValidation(
            "endpoint",
            certificate_arn=certificate.arn,
            validation_record_fqdns=[record.fqdn],
            opts=self.within(),
        ).certificate_arn


class Gateways(Part):
    """The gateways' group."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it is made of
        self,
        name: str,
        site: Site,
        place: Place,
        look: Look,
        balancer: Balancer,
        bucket: pulumi.Output[str],
        after: Sequence[pulumi.Resource],
    ) -> None:
        super().__init__("Gateways", name)
        plan, timings = site.aws.gateway, site.timings
        launch = machines.template(
            "gateway",
            site,
            look,
            bucket.apply(lambda it: settings(site, "gateway", "gateway", plan.group, it)),
            plan.instance,
            self.within(),
            site.tags("gateway"),
        )
        wanted = machines.hooks(timings.launch_hook_s, timings.gateway_hook_s)
        self.group = aws.autoscaling.Group(
            "gateway",
            name=plan.group,
            min_size=plan.hosts,
            max_size=plan.most,
            desired_capacity=plan.hosts,
            vpc_zone_identifiers=place.subnets(plan.zones),
            target_group_arns=[balancer.targets.arn],
            # Not the balancer's check: it fails while no engine is ready, and new gateways would not mend that.
            health_check_type="EC2",
            health_check_grace_period=timings.health_grace_s,
            default_instance_warmup=timings.instance_warmup_s,
            wait_for_capacity_timeout="0",
            # Who destroys a group does not wait for drains: what runs has the time that EC2 gives a machine to stop.
            force_delete=True,
            initial_lifecycle_hooks=wanted,
            instance_maintenance_policy=machines.healthy(plan.min_healthy_percent, plan.max_healthy_percent),
            instance_refresh=machines.refresh(
                plan.min_healthy_percent, plan.max_healthy_percent, timings.instance_warmup_s
            ),
            launch_template={"id": launch.id, "version": launch.latest_version.apply(str)},
            tags=machines.group_tags(site.named("gateway", machine="gateway")),
            opts=self.within(
                depends_on=list(after),
                ignore_changes=["initialLifecycleHooks"],
            ),
        )
        machines.keep_hooks("gateway", self.group, wanted, self)
        self.register_outputs({})
