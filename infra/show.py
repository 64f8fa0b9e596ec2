"""The state of a stack as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from infra.deployed import command_to_deploy
from infra.status import READY, EngineStatus, ServiceStatus, Status
from infra.weights import cache
from infra.weights.lock import WeightsLock
from infra.weights.progress import size

NONE = "-"
BAD, GOOD, DIM = "bold red", "green", "dim"
NUMBERS = frozenset(
    {
        *("concurrency", "context", "engines", "in flight", "KV cache", "memory", "port", "size", "starts", "tokens/s"),
        *("activations", "all/h", "CUDA and NCCL", "graphs", "KV tokens", "/Mtok", "of", "TPOT", "TTFT", "zones"),
        *("wanted", "in service", "pending", "terminating"),
    }
)
"""Columns that are aligned to the right."""


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
        table("", columns, (_engine(engine) for engine in status.engines)),
        table("", ("server", "", "port", ""), (_service(service) for service in status.services)),
    ]
    remarks = [Text(problem, style=BAD) for problem in status.problems]
    remarks += [Text(engine.note, style="yellow") for engine in status.engines if engine.note]
    if status.nothing_runs:
        remarks.append(Text(f"Nothing of it runs, as after a reboot: {command_to_deploy(status.stack)} starts it."))
    return spaced([*parts, Group(*remarks)] if remarks else parts)


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
            "digests unknown" if lock.unknown(name) else "yes" if cache.place(name, lock).folder.is_dir() else "no",
            entry.source or f"made here from {entry.made_from}",
        )
        for name, entry in lock.models.items()
    )
    return table("", ("entry", "format", "size", "licence", "in the cache", "source"), rows)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str | Text]]) -> Table:
    """Rows under a title, without lines: they can be copied."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, header_style=DIM, justify="right" if column in NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def spaced(parts: Iterable[RenderableType]) -> Group:
    """One after the other, with an empty line after each."""
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
