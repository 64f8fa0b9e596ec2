"""The plan on AWS: every part in its order, and the outputs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_aws as aws

from infra.plan.model import FleetPlan
from infra.plan.money import usd
from infra.render import node
from infra.render.bundle import Bundle
from infra.targets.aws import images, nodes
from infra.targets.aws.bakery import Bakery
from infra.targets.aws.cache import Cache
from infra.targets.aws.discovery import Discovery
from infra.targets.aws.fill import Fill
from infra.targets.aws.firewall import Firewall
from infra.targets.aws.gateway import Balancer, Gateways
from infra.targets.aws.identity import Account, MachineRole, Rights
from infra.targets.aws.machines import Look
from infra.targets.aws.monitor import Monitor
from infra.targets.aws.network import Network
from infra.targets.aws.rollout import Rollout
from infra.targets.aws.secrets import SCHEMA, Runs
from infra.targets.aws.site import Part, Site
from infra.weights.lock import WeightsLock


def deploy(plan: FleetPlan, lock: WeightsLock) -> None:
    """Declare the resources and the outputs of a stack on AWS.

    Raises:
        ConfigError: What AWS would refuse, all of it before any resource.
    """
    site = Site.of(plan)
    nodes.check_blocks(site)
    nodes.check_user_data(site)
    fleet = _Fleet(site, lock)
    fleet.declare()


@dataclass
class _Fleet:
    """A stack while it is declared."""

    site: Site
    lock: WeightsLock

    def declare(self) -> None:
        """Everything, in the order in which it depends on each other."""
        site, plan = self.site, self.site.plan
        caller = aws.get_caller_identity()
        self.images = {
            role: images.find(role, getattr(site.aws, f"{role}_image"), site)  # before any resource: it may refuse
            for role in ("engine", "gateway", "monitor")
        }
        self.account = Account(aws.get_partition().partition, caller.account_id, site.region)
        network = Network("network", site)
        place = network.place
        firewall = Firewall("firewall", site, place)
        network.endpoints(firewall["endpoints"] if site.aws.network.interface_endpoints else "")
        self.cache = Cache("cache", site)
        self.rights = Rights(site, self.account, self.cache)
        self.discovery = discovery = Discovery("discovery", site, place)
        self.rollout = Rollout("rollout", site)
        self.identity = Part("Identity", "identity")
        self.firewall = firewall
        bucket = self.cache.bucket.bucket
        self.runtime, kept = self._runtime()
        ways_out: list[pulumi.Resource] = [network, *kept]
        fill = Fill("fill", site, self.account, self.cache, self.lock, ways_out)

        balancer = Balancer("balancer", site, place, firewall)
        self.targets = balancer.targets.arn
        gateways = self._runs("gateway", "gateway", node.gateway_bundle(plan), site.tags("gateway"))
        look = self._look("gateway", "gateway", gateways, site.aws.gateway.volume_bytes)
        Gateways("gateways", site, place, look, balancer, bucket, [*ways_out, gateways])
        stop_s = plan.timings.gateway_stop_s
        moved = self.rollout.move("gateway", gateways.digest, stop_s, site.tags("gateway"), [gateways])

        monitor = self._runs("monitor", "monitor", node.monitor_bundle(plan), site.tags("monitor"))
        look = self._look("monitor", "monitor", monitor, site.aws.monitor.volume_bytes)
        watching = Monitor("monitor", site, place, look, bucket, [*ways_out, monitor])
        self.rollout.move("monitor", monitor.digest, stop_s, site.tags("monitor"), [monitor])

        for pool in plan.pools:
            machine = nodes.machine_name(pool.name)
            tags = site.tags("engine", pool.name)
            bundle = node.engine_bundle(plan, pool, self.lock, node.CloudLayout())
            services = discovery.ids(sorted({slot.model for slot in pool.slots}))
            runs = self._runs(machine, "engine", bundle, tags, services)
            look = self._look(machine, "engine", runs, pool.volume_bytes, pool.name, discovery)
            nodes.Pool(pool, site, place, look, bucket, [*ways_out, runs])
            one = plan.timings.drain_s + plan.timings.stop_s + plan.timings.start_s
            self.rollout.move(machine, runs.digest, one * max(1, len(pool.slots)), tags, [runs, *moved])
        if site.aws.bake:
            subnet = next(iter(place.private.values()))
            bakery = Bakery("images", site, self.account, self.cache, subnet, firewall["builder"])
            pulumi.export("images", bakery.commands)
        pulumi.export("fill", fill.command)
        self._outputs(balancer, watching)

    def _runs(self, machine: str, role: str, bundle: Bundle, tags: dict[str, str], services: Any = None) -> Runs:
        public, secret = node.split(bundle)
        baked = getattr(self.site.aws, f"{role}_image") is not None
        runtime = None if baked else self.runtime
        return Runs(machine, self.site, self.cache, bundle, public, secret, runtime, tags, services)

    def _runtime(self) -> tuple[str, list[pulumi.Resource]]:
        """What machines without an image of their own install: its digest, and where it is kept."""
        text = json.dumps({"schema": SCHEMA, "files": node.runtime()}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return digest, [self.cache.store("runtime", f"runtime/{digest}.json", text, self.site)]

    def _look(  # noqa: PLR0913, PLR0917 - what it is made of
        self,
        machine: str,
        role: str,
        runs: Runs,
        volume_bytes: int,
        pool: str | None = None,
        discovery: Discovery | None = None,
    ) -> Look:
        """What machines of a kind boot from, and what they may."""
        site, rights = self.site, self.rights
        statements: list[Any] = rights.common(machine, [self.rollout.document.arn])
        if runs.secret:
            statements.append(rights.secret(runs.secret.arn))
        if role == "gateway":
            statements += [*rights.groups([str(site.aws.gateway.group)], keep=False), rights.find_engines()]
            statements += rights.balance(self.targets)
            if site.plan.gateway.peers_port:
                statements += rights.count_together()
            if site.aws.ladders:
                statements += rights.climb()
        if role == "monitor":
            statements += [rights.find_machines(), *rights.strike(self.discovery)]
        if pool and discovery:
            models = sorted({slot.model for slot in nodes.pool_of(site, pool).slots})
            statements += [*rights.weights(), *rights.register(discovery, models)]
            statements += rights.groups([it.name for it in site.aws.groups if it.pool == pool], keep=True)
        known = MachineRole(machine, site, site.tags(role, pool), statements, self.identity)
        return Look(self.images[role], known.profile, self.firewall[role], volume_bytes, site.fixed_tags(role, pool))

    def _outputs(self, balancer: Balancer, monitor: Monitor) -> None:
        plan = self.site.plan
        body = f'{{"model": "{plan.models[0].name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        headers = "-H \"Authorization: Bearer $API_KEY\" -H 'Content-Type: application/json'"
        pulumi.export("endpoint", pulumi.Output.concat(balancer.url, "/v1"))
        pulumi.export("models", [model.name for model in plan.models])
        pulumi.export(
            "curl", pulumi.Output.concat("curl ", balancer.url, f"/v1/chat/completions {headers} -d '{body}'")
        )
        pulumi.export("dashboards", self._dashboards(monitor))
        pulumi.export("rollout", self.rollout.command)
        if plan.cost:
            lines = {line.name: f"{line.what} {usd(line.usd_per_hour)}/h" for line in plan.cost.lines}
            month = f"${plan.cost.usd_per_month:,.0f} a month"
            pulumi.export("cost", {**lines, "total": f"${plan.cost.usd_per_hour:.2f}/h, {month}"})
        pulumi.export("plan_digest", plan.digest)

    def _dashboards(self, monitor: Monitor) -> dict[str, pulumi.Output[str]]:
        """How to see them: no port is open, SSM carries them to the user's own machine."""
        plan = self.site.plan.monitor
        ports = {
            "grafana": plan.grafana_port,
            "prometheus": plan.prometheus_port,
            "alertmanager": plan.alertmanager_port,
        }
        return {
            name: pulumi.Output.concat(
                f"aws ssm start-session --region {self.site.region} --target ",
                monitor.instance.id,
                " --document-name AWS-StartPortForwardingSession --parameters ",
                f"portNumber={port},localPortNumber={port}   # then http://127.0.0.1:{port}",
            )
            for name, port in ports.items()
        }
