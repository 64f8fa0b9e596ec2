"""A plan as tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from infra import show_cost
from infra.plan.ledger import gib
from infra.plan.money import usd
from infra.show import NONE, spaced, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from infra.plan.model import ChoicePlan, EngineSetPlan, FleetPlan, MemoryPlan, PoolPlan


def plan(plan: FleetPlan, *, explain: bool, notices: bool = True) -> RenderableType:
    """What was decided; with `explain`, why, and what else there was to choose from."""
    parts: list[RenderableType] = [Text(headline(plan), style="bold")]
    if plan.memory is not None:
        parts += [_local_models(plan), _engines_and_ports(plan), _memory(plan.memory)]
    if plan.engine_sets:
        parts += [_gpu_models(plan), _gpu_memory(plan), _pools(plan)]
    if plan.choices and explain:
        parts += [_choices(plan, model.name) for model in plan.models]
    if plan.cost is not None:
        parts.append(show_cost.cost(plan.cost, explain=explain))
    if plan.notices and notices:
        parts.append(table("notices", ("at", "notice"), ((notice.path, notice.message) for notice in plan.notices)))
    if explain:
        rows = ((origin.path, origin.value, origin.because) for origin in plan.origins)
        parts.append(table("where values come from", ("value of", "is", "because"), rows))
    elif plan.choices:
        parts.append(
            Text("`fleet plan --explain` shows what else was looked at, and where every value comes from", style="dim")
        )
    return spaced(parts)


def headline(plan: FleetPlan) -> str:
    """The plan in one line."""
    where = f"{plan.target} {plan.region}" if plan.region else plan.target
    text = f"stack {plan.stack} on {where}, vLLM {plan.vllm_version}: fits"
    if plan.pools:
        engines = sum(it.engines for it in plan.engine_sets)
        nodes = sum(pool.nodes for pool in plan.pools)
        text += f", {engines:,} engine{'s' * (engines != 1)} on {nodes:,} node{'s' * (nodes != 1)}"
    if plan.cost:
        text += f", {show_cost.headline(plan.cost)}"
    return text


# On one machine


def _local_models(plan: FleetPlan) -> Table:
    columns = (
        *("model", "weights", "format", "computes in", "context", "concurrency"),
        *("KV cache", "memory", "engines"),
    )
    rows = (
        (
            *(model.name, model.weights, model.format, model.dtype, str(model.context), str(model.concurrency)),
            *(gib(model.kv_cache_bytes), gib(model.engine_memory_bytes), str(len(plan.engines_of(model.name)))),
        )
        for model in plan.models
    )
    return table("models (KV cache and memory: of each engine)", columns, rows)


def _engines_and_ports(plan: FleetPlan) -> Table:
    rows = [(f"engine {engine.name}", f"{engine.port}", f"model {engine.model}") for engine in plan.engines]
    keys = ", ".join(name for name, _ in plan.gateway.keys)
    rows += [
        ("gateway", f"{plan.gateway.port}", f"{plan.gateway.url}/v1, API keys: {keys}"),
        ("gateway statistics", f"{plan.gateway.stats_port}", ""),
        ("agent", f"{plan.agent.port}", ""),
        ("prometheus", f"{plan.monitor.prometheus_port}", f"keeps samples for {plan.timings.retention}"),
        ("alertmanager", f"{plan.monitor.alertmanager_port}", ""),
        ("grafana", f"{plan.monitor.grafana_port}", "if it is installed"),
    ]
    return table("engines and servers", ("server", "port", ""), rows)


def _memory(memory: MemoryPlan) -> Table:
    rows = (
        ("engines", gib(memory.engines)),
        ("gateway and monitoring", gib(memory.services)),
        ("total", gib(memory.total)),
        ("this machine can give", gib(memory.available)),
        ("left", gib(memory.available - memory.total)),
    )
    return table("does it fit (estimates)", ("", "memory"), rows)


# On GPUs


def _gpu_models(plan: FleetPlan) -> Table:
    columns = (
        *("model", "weights", "format", "engines", "GPUs of each", "context", "concurrency"),
        *("tokens/s", "TTFT", "TPOT", "by"),
    )

    def row(it: EngineSetPlan) -> tuple[str, ...]:
        model, speed = plan.model(it.model), it.speed
        return (
            *(it.model, model.weights, model.format, f"{it.engines:,}", f"{it.tensor_parallel_size} x {it.gpu}"),
            *(f"{model.context:,}", str(model.concurrency), f"{speed.output_tokens_s:,.0f}", _ms(speed.ttft_s)),
            *(_ms(speed.tpot_s), "measured" if speed.measured else f"estimate, +-{speed.error_percent} %"),
        )

    title = "models (concurrency and tokens/s: of each engine with its batch full; TTFT and TPOT: means)"
    return table(title, columns, (row(it) for it in plan.engine_sets))


def _gpu_memory(plan: FleetPlan) -> Table:
    columns = ("model", "weights", "activations", "CUDA and NCCL", "graphs", "KV cache", "of", "KV tokens", "holds")
    rows = (
        (
            *(it.model, gib(it.fit.weights_bytes), gib(it.fit.activation_bytes), gib(it.fit.non_torch_bytes)),
            *(gib(it.fit.graph_bytes), gib(it.fit.kv_bytes), gib(it.fit.budget_bytes), f"{it.fit.kv_tokens:,}"),
            f"{it.fit.holds_typical} usual requests, {it.fit.holds_full:.1f} of full length",
        )
        for it in plan.engine_sets
    )
    return table("does it fit: one GPU of an engine (predicted)", columns, rows)


def _pools(plan: FleetPlan) -> Table:
    columns = ("pool", "nodes", "instance", "GPUs", "on each node", "zones", "capacity", "all/h")
    return table("pools", columns, (_pool(pool) for pool in plan.pools))


def _pool(pool: PoolPlan) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for slot in pool.slots:
        counts[slot.model] = counts.get(slot.model, 0) + 1
    load = ", ".join(f"{count} x {model}" for model, count in counts.items()) or "as the scheduler places them"
    idle = f", {pool.idle_gpus} idle" if pool.idle_gpus else ""
    return (
        *(pool.name, f"{pool.nodes:,}", pool.instance or NONE, f"{pool.gpus_per_node} x {pool.gpu}", load + idle),
        *(str(len(pool.zones)) if pool.zones else NONE, " then ".join(rung.kind for rung in pool.rungs) or NONE),
        usd(pool.usd_per_hour) if pool.usd_per_hour is not None else NONE,
    )


def _choices(plan: FleetPlan, model: str) -> Table:
    columns = (
        *("", "GPUs of an engine", "quantization", "format", "nodes", "engines", "concurrency", "tokens/s"),
        *("TPOT", "all/h", "/Mtok", "why"),
    )
    found = [choice for choice in plan.choices if choice.model == model]
    title = f"choices for {model}, best first (on demand; /Mtok: at its traffic, at full load if none is stated)"
    return table(title, columns, (tuple(_choice(choice)) for choice in found))


def _choice(it: ChoicePlan) -> Iterator[str]:
    yield "->" if it.chosen else ""
    yield f"{it.tensor_parallel_size} x {it.gpu}"
    yield it.quantization
    yield it.format or NONE
    yield f"{it.nodes} x {it.instance}" if it.instance else NONE
    yield str(it.engines) if it.engines else NONE
    yield str(it.concurrency) if it.concurrency else NONE
    yield f"{it.output_tokens_s:,.0f}" if it.output_tokens_s else NONE
    yield _ms(it.tpot_s) if it.tpot_s else NONE
    yield usd(it.usd_per_hour) if it.usd_per_hour is not None else NONE
    yield usd(it.usd_per_mtok) if it.usd_per_mtok is not None else NONE
    yield it.verdict


def _ms(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
