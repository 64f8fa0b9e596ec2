"""The plan and the state of a stack as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from infra.deployed import command_to_deploy
from infra.plan.ledger import gib
from infra.plan.model import FleetPlan
from infra.status import READY, EngineStatus, ServiceStatus, Status
from infra.weights import cache
from infra.weights.lock import WeightsLock
from infra.weights.progress import size

NONE = "-"
BAD, GOOD, DIM = "bold red", "green", "dim"
NUMBERS = frozenset(
    {"concurrency", "context", "engines", "in flight", "KV cache", "memory", "port", "size", "starts", "tokens/s"}
)
"""Columns that are aligned to the right."""


def plan(plan: FleetPlan, *, explain: bool) -> RenderableType:
    """What was decided; with `explain`, why."""
    parts: list[RenderableType] = [
        Text(f"stack {plan.stack} on {plan.target}, vLLM {plan.vllm_version}: fits", style="bold"),
        _models(plan),
        _engines_and_ports(plan),
        _memory(plan),
    ]
    if plan.notices:
        parts.append(_table("notices", ("at", "notice"), ((notice.path, notice.message) for notice in plan.notices)))
    if explain:
        rows = ((origin.path, origin.value, origin.because) for origin in plan.origins)
        parts.append(_table("where values come from", ("value of", "is", "because"), rows))
    return _spaced(parts)


def _models(plan: FleetPlan) -> Table:
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
    return _table("models (KV cache and memory: of each engine)", columns, rows)


def _engines_and_ports(plan: FleetPlan) -> Table:
    rows = [(f"engine {engine.name}", f"{engine.port}", f"model {engine.model}") for engine in plan.engines]
    keys = ", ".join(name for name, _ in plan.gateway.keys)
    rows += [
        ("gateway", f"{plan.gateway.port}", f"http://{plan.gateway.bind}:{plan.gateway.port}/v1, API keys: {keys}"),
        ("gateway statistics", f"{plan.gateway.stats_port}", ""),
        ("agent", f"{plan.agent.port}", ""),
        ("prometheus", f"{plan.monitor.prometheus_port}", f"keeps samples for {plan.timings.retention}"),
        ("alertmanager", f"{plan.monitor.alertmanager_port}", ""),
        ("grafana", f"{plan.monitor.grafana_port}", "if it is installed"),
    ]
    return _table("engines and servers", ("server", "port", ""), rows)


def _memory(plan: FleetPlan) -> Table:
    memory = plan.memory
    rows = (
        ("engines", gib(memory.engines)),
        ("gateway and monitoring", gib(memory.services)),
        ("total", gib(memory.total)),
        ("this machine can give", gib(memory.available)),
        ("left", gib(memory.available - memory.total)),
    )
    return _table("does it fit (estimates)", ("", "memory"), rows)


def status(status: Status) -> RenderableType:
    """How a stack is."""
    title = Text.assemble(
        f"stack {status.stack}: ", ("as it should be", GOOD) if not status.problems else ("not as it should be", BAD)
    )
    columns = (
        *("engine", "model", "state", "for", "gateway", "in flight", "tokens/s"),
        *("weights", "format", "bundle", "starts"),
    )
    parts: list[RenderableType] = [
        title,
        _table("", columns, (_engine(engine) for engine in status.engines)),
        _table("", ("server", "", "port", ""), (_service(service) for service in status.services)),
    ]
    remarks = [Text(problem, style=BAD) for problem in status.problems]
    remarks += [Text(engine.note, style="yellow") for engine in status.engines if engine.note]
    if status.nothing_runs:
        remarks.append(Text(f"Nothing of it runs, as after a reboot: {command_to_deploy(status.stack)} starts it."))
    return _spaced([*parts, Group(*remarks)] if remarks else parts)


def _engine(engine: EngineStatus) -> tuple[str | Text, ...]:
    rotation = {True: Text("in rotation", style=GOOD), False: Text("out", style=BAD), None: Text(NONE)}
    return (
        engine.engine,
        engine.model,
        Text(engine.state, style=GOOD if engine.state == READY else BAD),
        _ago(engine.since_s),
        rotation[engine.in_rotation],
        _number(engine.in_flight),
        NONE if engine.tokens_per_s is None else f"{engine.tokens_per_s:.1f}",
        engine.weights,
        engine.format,
        engine.bundle,
        _number(engine.starts),
    )


def _service(service: ServiceStatus) -> tuple[str | Text, ...]:
    up = Text("up", style=GOOD) if service.up else Text("down", style=BAD)
    return (service.name, up, _number(service.port), service.detail)


def weights(lock: WeightsLock) -> RenderableType:
    """The entries of the lock."""
    rows = (
        (
            *(name, entry.format, size(entry.size), entry.licence),
            "yes" if cache.place(name, lock).folder.is_dir() else "no",
            entry.source or f"made here from {entry.made_from}",
        )
        for name, entry in lock.models.items()
    )
    return _table("", ("entry", "format", "size", "licence", "in the cache", "source"), rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str | Text]]) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, header_style=DIM, justify="right" if column in NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _spaced(parts: Iterable[RenderableType]) -> Group:
    return Group(*(line for part in parts for line in (part, "")))


def _number(value: int | None) -> str:
    return NONE if value is None else str(value)


def _ago(seconds: float | None) -> str:
    """A duration in its largest unit."""
    if seconds is None:
        return NONE
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
