"""The plan as Pulumi resources on this machine: one for the host, one a model's weights, one a machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pulumi

from infra.findings import ConfigError
from infra.paths import engine_dir, machine_dir, stack_dir
from infra.plan.model import FleetPlan
from infra.render.bundle import Bundle, Layout
from infra.render.engine import engine_node
from infra.render.gateway import gateway
from infra.render.monitor import monitor
from infra.targets.local import host, tools
from infra.targets.local.resources import Host, Machine, Weights
from infra.weights import cache
from infra.weights.lock import WeightsLock


def deploy(plan: FleetPlan, lock: WeightsLock) -> None:
    """Declare the resources and the outputs of a local stack.

    Raises:
        ConfigError: this machine lacks a tool, or a port is taken.
    """
    findings = [*tools.missing(plan), *host.taken_ports(plan.stack, host.ports(plan))]
    if findings:
        raise ConfigError(findings)

    machines = Host("host", folder=str(stack_dir(plan.stack)))
    weights = [
        Weights(
            f"weights-{name}", entry=name, digest=lock.digest(name), opts=pulumi.ResourceOptions(depends_on=machines)
        )
        for name in sorted({model.weights for model in plan.models})
    ]

    def machine(bundle: Bundle, after: list[pulumi.Resource]) -> Machine:
        return Machine(
            bundle.role,
            root=str(machine_dir(plan.stack, bundle.role)),
            bundle=bundle,
            opts=pulumi.ResourceOptions(depends_on=[machines, *after]),
        )

    # Gateways first learn, then nodes move: an engine's port is in the gateway before the engine is there.
    balancer = machine(gateway(plan, layout(plan, lock, "gateway")), [])
    machine(monitor(plan, layout(plan, lock, "monitor")), [*weights])
    machine(engine_node(plan, layout(plan, lock, "engine")), [*weights, balancer])
    _outputs(plan)


def layout(plan: FleetPlan, lock: WeightsLock, role: str) -> Layout:
    """Where things are on one of the stack's machines."""
    found = tools.find()
    return Layout(
        root=machine_dir(plan.stack, role),
        python=Path(sys.executable),
        vllm=engine_dir(f"vllm-{plan.vllm_version}") / "bin" / "vllm",
        weights={model.weights: cache.place(model.weights, lock) for model in plan.models},
        haproxy=found.haproxy,
        nginx=found.nginx,
        prometheus=found.prometheus,
        alertmanager=found.alertmanager,
        grafana=found.grafana,
    )


def _outputs(plan: FleetPlan) -> None:
    base = plan.gateway.url
    key_file = host.default_key_file(plan.stack)
    own_key = any(name == "default" for name, _ in plan.gateway.keys) and key_file.is_file()
    key = f'"$(cat {key_file})"' if own_key else '"$API_KEY"'
    model = plan.models[0].name
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
    pulumi.export("endpoint", f"{base}/v1")
    pulumi.export("api_key_file", str(key_file) if own_key else "keys are listed by `fleet keys list`")
    pulumi.export("models", [m.name for m in plan.models])
    headers = f"-H 'Authorization: Bearer '{key} -H 'Content-Type: application/json'"
    pulumi.export("curl", f"curl {base}/v1/chat/completions {headers} -d '{body}'")
    dashboards = {
        "prometheus": f"http://127.0.0.1:{plan.monitor.prometheus_port}",
        "alertmanager": f"http://127.0.0.1:{plan.monitor.alertmanager_port}",
        "gateway": f"http://127.0.0.1:{plan.gateway.stats_port}",
    }
    if tools.find().grafana:
        dashboards["grafana"] = f"http://127.0.0.1:{plan.monitor.grafana_port}"
    pulumi.export("dashboards", dashboards)
    pulumi.export("plan_digest", plan.digest)
