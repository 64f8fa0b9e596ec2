"""`fleet status`: how a deployed stack is, asked of its agent, its gateway and its monitoring."""

from __future__ import annotations

import csv
import http.client
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from infra.deployed import OK, Deployed, Row, SilentError, ask

READY = "ready"
UNKNOWN = "unknown"
"""State of an engine that the agent says nothing of."""
INTERVAL_S = 2.0
"""Tokens per second are counted over so long: the agent reads an engine's counters twice a second."""
HEALTH = {"prometheus": "/-/ready", "alertmanager": "/-/ready", "grafana": "/api/health"}


@dataclass(frozen=True)
class EngineStatus:
    """One engine."""

    engine: str
    model: str
    state: str
    """As the agent names it (nodeconfig/agent/fleet_agent/engine.py), or `unknown` if the agent is silent."""
    since_s: float | None
    in_flight: int | None
    tokens_per_s: float | None
    """Generated; None if there are not two counts to compare."""
    in_rotation: bool | None
    """Whether the gateway sends it new requests; None if the gateway does not say."""
    weights: str
    format: str
    bundle: str
    port: int | None
    starts: int | None
    crash_loop: bool
    last_error: str

    @property
    def problem(self) -> str:
        """Why it does not serve, or ""."""
        if self.state != READY:
            return f"{self.engine} is {self.state}"
        if self.in_rotation is False:
            return f"{self.engine} is ready, and the gateway sends it nothing"
        return ""

    @property
    def note(self) -> str:
        """What else went wrong of late, or ""."""
        notes = [f"{self.engine} crashes again and again"] if self.crash_loop else []
        notes += [f"{self.engine}: {self.last_error}"] if self.last_error else []
        return "; ".join(notes)


@dataclass(frozen=True)
class ServiceStatus:
    """A server that is no engine."""

    name: str
    up: bool
    port: int | None
    detail: str
    """What it answered, or why it did not."""


@dataclass(frozen=True)
class Status:
    """A whole stack."""

    stack: str
    engines: tuple[EngineStatus, ...]
    services: tuple[ServiceStatus, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is not as it should be; empty: every engine serves and every server is up."""
        down = [f"{service.name} is down: {service.detail}" for service in self.services if not service.up]
        return (*down, *(engine.problem for engine in self.engines if engine.problem))

    @property
    def nothing_runs(self) -> bool:
        """Not one server of the stack answers: after a reboot, say."""
        return not any(service.up for service in self.services)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"ok": not self.problems, "problems": list(self.problems), **asdict(self)}


@dataclass(frozen=True)
class _Look:
    """What everyone answered at one moment."""

    at: float
    """Seconds on a monotonic clock."""
    rows: dict[str, Row]
    servers: dict[str, str]
    """Status of each of the gateway's servers, in HAProxy's words."""
    services: tuple[ServiceStatus, ...]


def status(deployed: Deployed) -> Status:
    """How a stack is now. Takes `INTERVAL_S` longer if there are tokens to count, or if the gateway lags behind.

    Raises:
        NotDeployedError: There is no such stack here.
    """
    first = _look(deployed)
    now = _status(deployed, first, None)
    if not any(engine.in_flight or engine.in_rotation is False for engine in now.engines if engine.state == READY):
        return now
    time.sleep(INTERVAL_S)
    return _status(deployed, _look(deployed), first)


def watch(deployed: Deployed) -> Iterator[Status]:
    """How a stack is, again and again; tokens per second since the time before.

    Raises:
        NotDeployedError: There is no such stack here, or not any more.
    """
    before = None
    while True:
        look = _look(deployed)
        yield _status(deployed, look, before)
        before = look
        time.sleep(INTERVAL_S)


def _look(deployed: Deployed) -> _Look:
    """Ask everyone at once: one that hangs holds up none of the others."""
    deployed.require()
    rows: dict[str, Row] = {}
    servers: dict[str, str] = {}

    def agent() -> str:
        rows.update(deployed.engines())
        return f"{len(rows)} engines"

    def gateway() -> str:
        port = deployed.port("gateway statistics")
        if deployed.proxy == "nginx":
            ready = _get(port, "/rotation").split()
            servers.update({name: "UP" if name in ready else "DOWN" for name in deployed.declared()})
        else:
            servers.update(_servers(_get(port, "/;csv")))
        return f"{sum(map(_in_rotation, servers.values()))} of {len(servers)} engines in rotation"

    questions: dict[str, Callable[[], str]] = {"gateway": gateway, "agent": agent}
    for name, path in HEALTH.items():
        if name != "grafana" or deployed.port(name):  # the others belong to every stack
            questions[name] = lambda name=name, path=path: _get(deployed.port(name), path) and "ready"  # type: ignore[misc]

    def answer(name: str) -> ServiceStatus:
        port = deployed.port(name)
        try:
            return ServiceStatus(name, up=True, port=port, detail=questions[name]())
        except SilentError as error:
            return ServiceStatus(name, up=False, port=port, detail=error.findings[0].problem)
        except OSError as error:
            return ServiceStatus(name, up=False, port=port, detail=error.strerror or str(error))
        except (ValueError, LookupError, http.client.HTTPException) as error:
            return ServiceStatus(name, up=False, port=port, detail=f"answers nonsense: {error!r}")

    with ThreadPoolExecutor(len(questions)) as pool:
        services = tuple(pool.map(answer, questions))
    return _Look(time.monotonic(), rows, servers, services)


def _get(port: int | None, path: str) -> str:
    if port is None:
        raise OSError("is not deployed")
    code, text = ask(port, path)
    if code != OK:
        raise OSError(f"answers {code} to {path}")
    return text


def _servers(table: str) -> dict[str, str]:
    """Status of each engine in HAProxy's statistics."""
    rows = csv.DictReader(io.StringIO(table.removeprefix("# ")))
    return {row["svname"]: row["status"] for row in rows if row["svname"] not in {"FRONTEND", "BACKEND"}}


def _in_rotation(server: str) -> bool:
    """`UP 1/2` is on its way down and still gets requests; `NOLB` is draining."""
    return server.startswith("UP")


def _status(deployed: Deployed, look: _Look, before: _Look | None) -> Status:
    declared = deployed.declared()
    # An engine that the agent has and no slot: it is on its way out.
    rows = {name: {**declared.get(name, {}), **look.rows.get(name, {})} for name in sorted({*declared, *look.rows})}
    earlier = before.rows if before else {}
    seconds = look.at - before.at if before else 0.0
    return Status(
        stack=deployed.stack,
        engines=tuple(_engine(row, earlier.get(name), seconds, look.servers) for name, row in rows.items()),
        services=look.services,
    )


def _engine(row: Row, before: Row | None, seconds: float, servers: dict[str, str]) -> EngineStatus:
    name = row["engine"]
    return EngineStatus(
        engine=name,
        model=row.get("model", UNKNOWN),
        state=row.get("state", UNKNOWN),
        since_s=row.get("since_s"),
        in_flight=row.get("in_flight"),
        tokens_per_s=_tokens_per_s(row, before, seconds),
        in_rotation=_in_rotation(servers[name]) if name in servers else (False if servers else None),
        weights=row.get("weights", UNKNOWN),
        format=row.get("format", UNKNOWN),
        bundle=row["bundle"][:12],
        port=row.get("port"),
        starts=row.get("starts"),
        crash_loop=row.get("crash_loop", False),
        last_error=row.get("last_error", ""),
    )


def _tokens_per_s(row: Row, before: Row | None, seconds: float) -> float | None:
    now: int | None = row.get("generation_tokens")
    if now is None:
        return None
    if before is None:
        return None if row["in_flight"] else 0.0
    # A new process counts from zero.
    earlier: int = before.get("generation_tokens", now)
    return max(0, now - earlier) / seconds
