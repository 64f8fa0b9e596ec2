"""From what a user wants to one frozen plan. Pure: no I/O, no clock, no Pulumi."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from infra.catalog import gpus as catalog_gpus
from infra.catalog import hosted_prices, vllm_cpu
from infra.catalog import instances as catalog_instances
from infra.catalog.charges import charges
from infra.catalog.efficiency import efficiency
from infra.catalog.gpu_start import gpu_start
from infra.catalog.memory import memory_catalog
from infra.catalog.services import services
from infra.config import with_limits
from infra.findings import did_you_mean, nearest, show
from infra.plan.candidates import World
from infra.plan.cost import priced
from infra.plan.engines import names, plan_engines, step_tokens
from infra.plan.gateway import listening, plan_gateway, thresholds
from infra.plan.gpu_fleet import GpuPlanner
from infra.plan.hosted import hosted
from infra.plan.ledger import Ledger
from infra.plan.memory import plan_memory
from infra.plan.model import AgentPlan, FleetPlan, HostFacts, MonitorPlan, Timings
from infra.plan.models import ModelPlanner
from infra.plan.ports import plan_ports
from infra.plan.timings import explain, timings
from infra.plan.work import on_cpu

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infra.benchmarks import Benchmark
    from infra.catalog import Instance
    from infra.config import ApiKeys, StackConfig
    from infra.plan.memory import Sizing
    from infra.weights.lock import WeightsLock

DEFAULT_TTFT_P95_S = 10.0
"""As long as a slow machine reads a prompt of 2,000 tokens (measured on 2 cores, 2026-11)."""
SHARED_FOLDERS = frozenset({"cache", "engines", "passphrase", "pulumi-home", "state", "toolchain", "weights"})
"""What else may be beside the stacks' folders."""


def make_plan(  # noqa: PLR0913, PLR0917 - what a plan is made from
    stack: str,
    config: StackConfig,
    lock: WeightsLock,
    host: HostFacts | None,
    api_keys: ApiKeys,
    benchmarks: Sequence[Benchmark] = (),
) -> FleetPlan:
    """Decide everything that a fleet needs to have decided.

    Args:
        stack: Name of the Pulumi stack.
        config: What the user wants.
        lock: The models that can be served.
        host: The machine of a local stack; the other targets need none.
        api_keys: The API keys, by their owners' names.
        benchmarks: What was measured; it stands before what is estimated.

    Raises:
        ConfigError: It cannot be. Has all findings: those of the config and those of the planning.
    """
    ledger = Ledger(list(config.findings))
    region = config.region
    config = config.model_copy(update={"api_keys": with_limits(api_keys)})
    _check_name(stack, ledger)
    _note_promises(config, ledger)
    _check_parsers(config, ledger)
    if config.target == "local" and host is not None:
        return _local(stack, config, lock, host, ledger)
    return _on_gpus(stack, config, lock, region, benchmarks, ledger)


def _check_parsers(config: StackConfig, ledger: Ledger) -> None:
    """Refuse parsers for tool calls that vLLM does not have."""
    engine = vllm_cpu()
    for name, wanted in config.models.items():
        if wanted.tool_calls is not None and wanted.tool_calls not in engine.tool_parsers:
            problem = f"vLLM {engine.version} has no parser {show(wanted.tool_calls)}"
            ledger.refuse(f"models.{name}.tool-calls", problem, did_you_mean(wanted.tool_calls, engine.tool_parsers))


def _note_promises(config: StackConfig, ledger: Ledger) -> None:
    """Say of what is promised, and not yet kept by anything."""
    if config.slo.availability is not None and config.gateway.proxy == "nginx":
        ledger.note("slo.availability", "is written down; nginx does not count what fails: no alert compares with it")
    if config.gateway.hostname is not None and config.aws.hosted_zone is None:
        ledger.note("gateway.hostname", "is written down; no certificate and no name are made for it yet")
    if config.slo.tpot_p95 is not None and config.target == "local":
        ledger.note("slo.tpot_p95", "is what an alert compares with; on local nothing else is derived from it")


def _on_gpus(  # noqa: PLR0913, PLR0917 - what a plan is made of
    stack: str,
    config: StackConfig,
    lock: WeightsLock,
    region: str | None,
    benchmarks: Sequence[Benchmark],
    ledger: Ledger,
) -> FleetPlan:
    instances = catalog_instances()
    if config.target == "aws":
        region = _region(region, instances, ledger)
        for name in config.prices.instances:
            if name not in instances:
                ledger.refuse(f"prices.instances.{name}", "is not in the catalog", did_you_mean(name, instances))
    engine = vllm_cpu()
    world = World(
        gpus=catalog_gpus(),
        instances=priced(instances, config.prices.instances, region or ""),
        region=(region or "") if config.target == "aws" else "",
        lock=lock,
        regime=memory_catalog().regime(engine.version),
        efficiency=efficiency(),
        start=gpu_start(),
        benchmarks=benchmarks,
    )
    others = hosted(hosted_prices(), config.prices.hosted)
    return GpuPlanner(stack, config, world, services(), charges(), others, engine.version, ledger).plan()


def _region(region: str | None, instances: Mapping[str, Instance], ledger: Ledger) -> str:
    """The region; the first that is known where the config's is not, so that the rest can be checked."""
    offers = Counter(name for row in instances.values() for name in row.usd_per_hour)
    known = sorted(offers, key=lambda name: (-offers[name], name))
    if region is None:
        others = ", ".join(known[1:])
        ledger.refuse("aws:region", "is missing", f"add `aws:region: {known[0]}` beside the other keys, or {others}")
        return known[0]
    if region not in known:
        near = nearest(region, known, least=0.8)
        fix = f"did you mean `{near}`?" if near else f"one of: {', '.join(known)}"
        ledger.refuse("aws:region", f"the catalog has no prices for {show(region)}", fix)
        return near or known[0]
    return region


def _local(stack: str, config: StackConfig, lock: WeightsLock, host: HostFacts, ledger: Ledger) -> FleetPlan:
    catalog = vllm_cpu()
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
    gateway = plan_gateway(config, sizings, ports, derived, ledger, audio=listening(models.values(), lock))
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
            thresholds=thresholds(config, sizings, ttft),
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
        on_cpu(sizing, config.models[name].max_answer or sizing.context, step_tokens(sizing.concurrency), catalog)
        for name, sizing in models.items()
    ]
    explained = explain(works, ttft_p95_s)
    for name, (value, reason) in explained.items():
        ledger.because(f"timings.{name}", value, reason)
    return timings(explained)
