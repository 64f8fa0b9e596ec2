"""From what a user wants to one frozen plan. Pure: no I/O, no clock, no Pulumi."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from infra.catalog import vllm_cpu
from infra.findings import show
from infra.plan.engines import names, plan_engines, step_tokens
from infra.plan.gateway import plan_gateway, thresholds
from infra.plan.ledger import Ledger
from infra.plan.memory import plan_memory
from infra.plan.model import AgentPlan, FleetPlan, HostFacts, MonitorPlan, Timings
from infra.plan.models import ModelPlanner
from infra.plan.ports import plan_ports
from infra.plan.timings import Work, explain, timings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from infra.config import StackConfig
    from infra.plan.memory import Sizing
    from infra.weights.lock import WeightsLock

DEFAULT_TTFT_P95_S = 10.0
"""As long as a slow machine reads a prompt of 2,000 tokens (measured on 2 cores, 2026-11)."""
SHARED_FOLDERS = frozenset({"cache", "engines", "passphrase", "pulumi-home", "state", "toolchain", "weights"})
"""What else may be beside the stacks' folders."""


def make_plan(
    stack: str,
    config: StackConfig,
    lock: WeightsLock,
    host: HostFacts,
    api_keys: Mapping[str, str],
) -> FleetPlan:
    """Decide everything that a fleet needs to have decided.

    Args:
        stack: Name of the Pulumi stack.
        config: What the user wants.
        lock: The models that can be served.
        host: The machine of a local stack.
        api_keys: SHA-256 in hex of each API key, by its owner's name.

    Raises:
        ConfigError: It cannot be. Has all findings: those of the config and those of the planning.
    """
    catalog = vllm_cpu()
    ledger = Ledger(list(config.findings))
    config = config.model_copy(update={"api_keys": dict(api_keys)})
    _check_name(stack, ledger)
    planned = {
        name: plan
        for name, wanted in config.models.items()
        if (plan := ModelPlanner(name, wanted, lock, host, catalog, ledger).plan())
    }
    models = {name: model for name, (model, _) in planned.items()}
    sizings = {name: sizing for name, (_, sizing) in planned.items()}
    engines = {name: names(name, sizing.engines) for name, sizing in sizings.items()}
    ports = plan_ports(stack, config.local, [engine for group in engines.values() for engine in group], ledger)
    memory = plan_memory(sizings, host, catalog, ledger)
    if not planned:
        ledger.settle()
    ttft = config.slo.ttft_p95 or DEFAULT_TTFT_P95_S
    ledger.because("slo.ttft_p95", f"{ttft:g}s", "written in the stack file" if config.slo.ttft_p95 else "default")
    derived = _timings(sizings, config, ttft, ledger)
    gateway = plan_gateway(config, sizings, ports, derived, ledger)
    ledger.settle()
    return FleetPlan(
        stack=stack,
        target=config.target,
        vllm_version=catalog.version,
        models=tuple(models.values()),
        engines=plan_engines(models, ports, engines, derived, host),
        gateway=gateway,
        agent=AgentPlan(port=ports["agent"]),
        monitor=MonitorPlan(
            prometheus_port=ports["prometheus"],
            alertmanager_port=ports["alertmanager"],
            grafana_port=ports["grafana"],
            thresholds=thresholds(sizings, ttft),
        ),
        timings=derived,
        memory=memory,
        notices=tuple(ledger.notices),
        origins=tuple(ledger.origins),
    )


def _check_name(stack: str, ledger: Ledger) -> None:
    """A stack's name is the name of its folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", stack) or stack in SHARED_FOLDERS:
        fix = f"at most 40 letters, digits and . _ -, and none of: {', '.join(sorted(SHARED_FOLDERS))}"
        ledger.refuse("stack", f"cannot be called {show(stack)}", fix)


def _timings(models: Mapping[str, Sizing], config: StackConfig, ttft_p95_s: float, ledger: Ledger) -> Timings:
    catalog = vllm_cpu()
    works = [
        Work(sizing, config.models[name].max_answer or sizing.context, step_tokens(sizing.concurrency), catalog)
        for name, sizing in models.items()
    ]
    explained = explain(works, ttft_p95_s)
    for name, (value, reason) in explained.items():
        ledger.because(f"timings.{name}", value, reason)
    return timings(explained)
