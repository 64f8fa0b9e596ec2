"""What a machine of a group does next, given what is known of it. No I/O, no clock of its own.

launching   until its engines are ready (or the gateway answers): the group waits for the launch hook
serving     ready engines are registered, others are not
leaving     a spot notice, the group's decision or a shutdown: nothing new, what is open finishes, then the hook
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

CONFIG = 78
"""Exit status of a program to which trying again would give the same."""
IDLE_S = 60.0
"""A machine without requests for so long is one that the group may choose."""
SETTLE_S = 30.0
"""A gateway that leaves goes on for so long at least: a load balancer needs that to stop sending connections to it."""
SILENT_S = 30.0
"""An agent or a gateway that has not answered for so long has nothing that could be drained."""
RESTART_S = 30.0
"""Between two tries to start the programs."""
HEARTBEATS = 3
"""In the time after which the group would give up."""

Kind = Literal[
    "register",
    "deregister",
    "attach",
    "detach",
    "drain",
    "continue",
    "abandon",
    "heartbeat",
    "protect",
    "unprotect",
    "unhealthy",
    "start",
]


@dataclass(frozen=True)
class Settings:
    """What a machine knows of itself, as far as it matters here: see `facts` in watch.py."""

    role: str
    group: str | None
    launch_hook: str | None
    terminate_hook: str | None
    launch_heartbeat_s: float
    terminate_heartbeat_s: float
    boot_limit_s: float
    spot_drain_s: float
    drain_s: float
    services: Mapping[str, str]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Settings:
        """Those of the facts, which are more."""
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Unit:
    """A unit of systemd's."""

    state: str = "inactive"
    """active, activating, inactive, failed …"""
    result: str = "success"
    """success, exit-code, signal …"""
    status: int = 0
    """Exit status of its main process."""

    @property
    def refused(self) -> bool:
        """It failed, and would again."""
        return self.state == "failed" and self.status == CONFIG


@dataclass(frozen=True)
class Row:
    """An engine as the agent has it."""

    name: str
    model: str
    port: int
    state: str
    in_flight: int
    drained: bool


@dataclass(frozen=True)
class Seen:
    """What is so now."""

    now: float
    """Seconds of a clock that never jumps."""
    weights: Unit = Unit()
    apply: Unit = Unit()
    filling: bool = False
    """The cache does not have the weights yet."""
    changing: bool = False
    """Somebody is taking up another bundle."""
    expected: frozenset[str] = frozenset()
    """Engines of the bundle."""
    engines: tuple[Row, ...] | None = None
    """None: the agent does not answer."""
    answers: bool = False
    """The gateway does."""
    open: int = 0
    """Requests at the gateway."""
    target: str = ""
    """Where the group wants this machine: InService, Terminated …"""
    spot: bool = False
    """There is a notice that its time is over."""
    stopping: bool = False
    """The system is shutting down."""
    spare: bool = False
    """The group wants fewer machines, all are protected, and of these it is this one's turn."""


@dataclass(frozen=True)
class Do:
    """One thing to do."""

    kind: Kind
    name: str = ""
    """Of the engine or the hook."""
    service: str = ""
    port: int = 0
    why: str = ""


@dataclass
class Memory:
    """What was done. All but `launched` is found out anew by the next process."""

    launched: bool = False
    """The launch hook was answered."""
    left: bool = False
    """The terminate hook was answered."""
    began: float | None = None
    progress: float = 0.0
    leaving: str = ""
    leaving_since: float = 0.0
    places: dict[str, str] = field(default_factory=dict)
    """Engine to where it is registered, "" nowhere; engines that are not here have to be told once."""
    services: dict[str, str] = field(default_factory=dict)
    """Engine to the service that it may be registered at."""
    protected: bool | None = None
    busy: float = 0.0
    served: float = 0.0
    """When an engine was ready last."""
    heard: float = 0.0
    """When the agent answered last, or the gateway."""
    beat: float = 0.0
    started: float = 0.0
    given_up: bool = False
    drained: bool = False
    """Nothing is left that a shutdown would cut."""
    detached: bool = False
    """A gateway took itself from the load balancer; it outlives a reboot, as that does."""

    def done(self, action: Do, now: float) -> None:
        """Take note of what worked."""
        match action.kind:
            case "register" | "deregister":
                self.places[action.name] = f"{action.service}:{action.port}" if action.kind == "register" else ""
            case "continue" | "abandon":
                if self.leaving:
                    self.left = True
                else:
                    self.launched, self.given_up = action.kind == "continue", action.kind == "abandon"
            case "heartbeat":
                self.beat = now
            case "protect" | "unprotect":
                self.protected = action.kind == "protect"
            case "start":
                self.started = now
            case "unhealthy":
                self.given_up = True
            case "attach" | "detach":
                self.detached = action.kind == "detach"
            case "drain":
                pass


def decide(settings: Settings, memory: Memory, seen: Seen) -> list[Do]:
    """Everything that is to be done now. What fails is decided again the next time."""
    _notice(settings, memory, seen)
    if memory.leaving:
        return list(_leave(settings, memory, seen))
    return [
        *_discovery(settings, memory, seen),
        *_launch(settings, memory, seen),
        *_balancer(settings, memory, seen),
        *_protection(settings, memory, seen),
        *_health(settings, memory, seen),
        *_start(settings, memory, seen),
    ]


def _notice(settings: Settings, memory: Memory, seen: Seen) -> None:
    if memory.began is None:
        memory.began = memory.progress = memory.served = memory.heard = memory.beat = memory.started = seen.now
    if seen.filling:  # however long that takes: another machine would wait as well
        memory.progress = seen.now
    if seen.engines is not None or seen.answers:
        memory.heard = seen.now
    if any(row.state == "ready" for row in seen.engines or ()):
        memory.served = seen.now
    if any(row.in_flight for row in seen.engines or ()):
        memory.busy = seen.now
    for row in seen.engines or ():
        memory.services[row.name] = settings.services.get(row.model, "")
    reason = "spot" if seen.spot else "group" if seen.target == "Terminated" else "shutdown" if seen.stopping else ""
    if reason and not memory.leaving:
        memory.leaving, memory.leaving_since = reason, seen.now


def ready(settings: Settings, seen: Seen) -> bool:
    """Whether it does what it is for."""
    if settings.role == "gateway":
        return seen.answers
    if settings.role == "monitor":
        return seen.apply.state == "active"
    found = {row.name for row in seen.engines or () if row.state == "ready"}
    return bool(seen.expected) and seen.expected <= found


def _discovery(settings: Settings, memory: Memory, seen: Seen) -> Iterator[Do]:
    """Gateways take an engine that they find for ready: only those that are, are to be found.

    Two stay, as the gateways' own checks are quicker: one that is merely silent, which may only be busy; and one that
    another bundle is taken up for. Found anew, that would take seconds to be in rotation, and the next engine, here or
    on another machine, would be drained meanwhile.
    """
    if seen.engines is None:
        return
    for row in seen.engines:
        service = settings.services.get(row.model)
        if not service:
            continue
        if row.state == "ready":
            if memory.places.get(row.name) != f"{service}:{row.port}":
                yield Do("register", row.name, service, row.port)
        elif row.state != "silent" and not seen.changing and memory.places.get(row.name) != "":
            yield Do("deregister", row.name, service, why=row.state)
    here = {row.name for row in seen.engines}
    yield from (
        Do("deregister", name, memory.services[name], why="it is gone")
        for name, place in memory.places.items()
        if name not in here and place
    )


def _launch(settings: Settings, memory: Memory, seen: Seen) -> Iterator[Do]:
    hook = settings.launch_hook
    if memory.launched or memory.given_up:
        return
    if ready(settings, seen):
        if hook and settings.group:
            yield Do("continue", hook, why="ready")
        else:
            memory.launched = True
        return
    if not hook or not settings.group:
        return
    if why := _hopeless(settings, memory, seen):
        yield Do("abandon", hook, why=why)
    elif seen.now - memory.beat > settings.launch_heartbeat_s / HEARTBEATS:
        yield Do("heartbeat", hook)


def _hopeless(settings: Settings, memory: Memory, seen: Seen) -> str:
    """Why a machine will not get ready, or ""."""
    if seen.weights.refused:
        return "the weights cannot be had: see journalctl -u fleet-weights"
    if seen.apply.state == "failed" and seen.apply.result == "exit-code":
        return "the bundle does not run: see journalctl -u fleet-apply"
    waited = seen.now - memory.progress
    return f"not ready after {waited:.0f} s" if waited > settings.boot_limit_s else ""


def _balancer(settings: Settings, memory: Memory, seen: Seen) -> Iterator[Do]:
    """A gateway that was rebooted goes back to where it was."""
    if settings.role == "gateway" and memory.detached and seen.answers:
        yield Do("attach")


def _protection(settings: Settings, memory: Memory, seen: Seen) -> Iterator[Do]:
    """Of several machines the group had better take one that is idle; if none is, it gets one all the same."""
    if settings.role != "engine" or not settings.group or not memory.launched or seen.target != "InService":
        return
    if seen.now - memory.busy < IDLE_S and memory.busy and not seen.spare:
        if memory.protected is not True:
            yield Do("protect")
    elif memory.protected is not False:
        yield Do("unprotect")


def spare(desired: int, protected: Mapping[str, bool], own: str) -> bool:
    """Whether a machine is one that its group may have, though all are busy: each decides so by the same rule.

    Args:
        desired: How many machines the group wants.
        protected: Each that serves, and whether it is protected.
        own: This one.
    """
    surplus = len(protected) - desired
    free = sum(not it for name, it in protected.items() if name != own)
    return surplus > free and own in sorted(protected)[:surplus]


def _health(settings: Settings, memory: Memory, seen: Seen) -> Iterator[Do]:
    """A machine whose engines are all gone for longer than a boot takes is worth less than a new one."""
    if settings.role != "engine" or not settings.group or not memory.launched or memory.given_up or seen.changing:
        return
    if seen.now - memory.served > settings.boot_limit_s:
        yield Do("unhealthy", why=f"no engine was ready for {seen.now - memory.served:.0f} s")


def _start(settings: Settings, memory: Memory, seen: Seen) -> Iterator[Do]:
    """Units that were killed on the way; what refuses is left alone, to be looked at."""
    if not memory.launched and settings.group and _hopeless(settings, memory, seen):
        return
    down = seen.apply.state in {"inactive", "failed"} and seen.weights.state not in {"activating", "reloading"}
    if down and not seen.weights.refused and not memory.given_up and seen.now - memory.started > RESTART_S:
        yield Do("start", why=seen.apply.result)


def _leave(settings: Settings, memory: Memory, seen: Seen) -> Iterator[Do]:
    # A group takes its machine from the load balancer; of a shutdown that nobody asked the group for it knows nothing.
    if settings.role == "gateway" and settings.group and memory.leaving == "shutdown" and not memory.detached:
        yield Do("detach", why=memory.leaving)
    for name, service in memory.services.items():
        if service and memory.places.get(name) != "":
            yield Do("deregister", name, service, why=memory.leaving)
    for row in seen.engines or ():
        if row.state in {"ready", "silent"}:
            yield Do("drain", row.name, why=memory.leaving)
    memory.drained = _nothing_left(settings, memory, seen)
    hook = settings.terminate_hook
    if seen.target != "Terminated" or not hook or not settings.group or memory.left:
        return
    if memory.drained:
        yield Do("continue", hook, why="drained")
    elif seen.now - memory.beat > settings.terminate_heartbeat_s / HEARTBEATS:
        yield Do("heartbeat", hook)


def _nothing_left(settings: Settings, memory: Memory, seen: Seen) -> bool:
    since = seen.now - memory.leaving_since
    if since > (settings.spot_drain_s if memory.leaving == "spot" else settings.drain_s):
        return True
    if settings.role == "gateway":
        gone = not memory.launched or seen.now - memory.heard > SILENT_S
        return gone if not seen.answers else since > SETTLE_S and seen.open == 0
    if settings.role == "monitor":
        return True
    if any(memory.places.get(name) != "" for name, service in memory.services.items() if service):
        return False
    if seen.engines is None:
        return not memory.launched or seen.now - memory.heard > SILENT_S
    return all(row.drained or row.state in {"stopped", "loading", "warming"} for row in seen.engines)
