"""One engine as the agent sees it: what it is told, what follows from it. No I/O, no clock of its own.

    stopped → loading → warming → ready → draining
                                  ↕
                                silent: was ready, and does not answer

Ready is latched to one start of the process: a new process has to be warmed again, whoever restarted it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

State = Literal["stopped", "loading", "warming", "ready", "draining", "silent"]
STATES: tuple[State, ...] = get_args(State)
Probe = Literal["ok", "slow", "refused"]
Identity = tuple[int, float]
"""Process id and start time: a process id alone is used again."""

SETTLED_CHECKS = 2
"""So many checks of a gateway must have been told of the drain before it can be over."""
UNCHECKED_S = 3.0
"""If no gateway has asked for so long, none has to be told."""
EMPTY_SAMPLES = 2
"""So many samples in a row with nothing in flight end a drain: a request may be between two parts of the engine."""


@dataclass
class Sample:
    """What an engine's /metrics said. Counts."""

    running: int = 0
    waiting: int = 0
    generation_tokens: int = 0
    progress: int = 0
    """Tokens of any kind that went through: it stands still when the engine is wedged."""


@dataclass
class Engine:
    """State of one engine. Times are seconds of one monotonic clock, given by the caller."""

    name: str
    settings: dict[str, Any]
    """Its engine.json."""
    bundle: str
    """Digest of the bundle that its slot points to."""
    identity: Identity | None = None
    started: float = 0.0
    probe: Probe = "refused"
    probed_ok: float = 0.0
    stopped_process: bool = False
    """One of its processes is stopped (SIGSTOP, debugger, freezer): it cannot serve, whatever still answers."""
    latched: bool = False
    draining: bool = False
    drained_since: float = 0.0
    drain_checks: int = 0
    empty_samples: int = 0
    last_check: float = float("-inf")
    sample: Sample = field(default_factory=Sample)
    moved: float = 0.0
    """When tokens last moved, or nothing was running."""
    crashes: list[float] = field(default_factory=list)
    starts: int = 0
    wedged: int = 0
    expected: bool = False
    """The next start is on purpose."""
    warmup_s: float = 0.0
    last_error: str = ""
    since: float = 0.0
    _state: State = "stopped"

    @property
    def port(self) -> int:
        """Where it listens; also how a gateway names it."""
        return int(self.settings["port"])

    @property
    def model(self) -> str:
        """What clients call it."""
        return str(self.settings["model"])

    @property
    def in_flight(self) -> int:
        """Requests that it works on or lets wait."""
        return self.sample.running + self.sample.waiting

    def state(self, now: float) -> State:
        """The state that follows from everything known."""
        fresh = self._derive()
        if fresh != self._state:
            self._state, self.since = fresh, now
        return fresh

    def _derive(self) -> State:
        if self.identity is None:
            return "stopped"
        if not self.latched:
            return "warming" if self.probe == "ok" else "loading"
        if self.probe != "ok" or self.stopped_process:
            return "silent"
        return "draining" if self.draining else "ready"

    def sees(self, identity: Identity | None, now: float, wall: float, window_s: float) -> bool:
        """Take note of the process that runs it now; True if that is another one than before."""
        self.crashes = [at for at in self.crashes if wall - at < window_s]
        if identity == self.identity:
            return False
        if identity is not None:
            self.starts += 1
            if not self.expected:
                self.crashes.append(wall)
            self.expected = False
            self.started = self.moved = now
        self.identity = identity
        self.latched = self.draining = self.stopped_process = False
        self.probe, self.sample = "refused", Sample()
        return True

    def probed(self, probe: Probe, now: float) -> None:
        """Take note of a health check."""
        self.probe = probe
        if probe == "ok":
            self.probed_ok = now

    def sampled(self, sample: Sample, now: float) -> None:
        """Take note of its metrics."""
        if sample.running == 0 or sample.progress != self.sample.progress:
            self.moved = now
        self.sample = sample
        self.empty_samples = self.empty_samples + 1 if self.in_flight == 0 else 0

    def drain(self, now: float) -> None:
        """Let no new request in."""
        if not self.draining:
            self.draining, self.drained_since, self.drain_checks, self.empty_samples = True, now, 0, 0

    def drained(self, now: float) -> bool:
        """Whether every gateway knows of the drain and nothing is in flight."""
        told = self.drain_checks >= SETTLED_CHECKS or (
            now - self.last_check > UNCHECKED_S and now - self.drained_since > UNCHECKED_S
        )
        return self.draining and told and self.empty_samples >= EMPTY_SAMPLES

    def checked(self, now: float, *, others_ready: bool) -> int:
        """The HTTP status for a gateway that asks: 200 send requests, 404 no new ones, 503 none at all.

        An engine that is merely slow to answer, on a machine that has more to do than it can, is taken out only while
        another one can serve: else a busy moment would turn into an outage.
        """
        self.last_check = now
        state = self.state(now)
        if state == "draining":
            self.drain_checks += 1
            return 404
        if state == "ready":
            return 200
        slow = state == "silent" and self.probe == "slow" and not self.stopped_process
        return 200 if slow and not self.draining and not others_ready else 503

    def stood(self, seconds: float) -> None:
        """Take note that nobody looked for so long, as with a machine that hung: it says nothing of the engine."""
        self.started, self.moved, self.probed_ok = (at + seconds for at in (self.started, self.moved, self.probed_ok))

    def hopeless(self, now: float, wedged_s: float, start_s: float) -> str:
        """Why it must be restarted, or ""."""
        if self.identity is None:
            return ""
        if not self.latched:
            return f"not ready {start_s:.0f} s after its start" if now - self.started > start_s else ""
        if self.probe != "ok" and now - max(self.probed_ok, self.started) > wedged_s:
            return f"no answer for {wedged_s:.0f} s"
        if self.sample.running and now - self.moved > wedged_s:
            return f"{self.sample.running} requests running and no token for {wedged_s:.0f} s"
        return ""

    def crash_loop(self, limit: int) -> bool:
        """Whether it came back by itself too often of late."""
        return len(self.crashes) >= limit
