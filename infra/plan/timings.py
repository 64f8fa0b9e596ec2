"""Every duration and count that more than one part depends on. Each is derived here, once, with its reason.

They hang together: an engine that dies must be out of rotation in `OUT_MS`; nothing may be cut off that is still in its
right; nobody may wait for longer than the one behind him. tests/unit/test_plan_timings.py has these as properties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.plan.model import Timings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infra.catalog import EngineCatalog
    from infra.plan.memory import Sizing

OUT_MS = 1500
"""An engine that is dead or stopped is out of rotation after so long."""
SLACK_MS = 100
"""What none of the parts of `OUT_MS` accounts for: processes that wake late."""
AGENT_RESTART_MS = 2000
"""From the death of the agent until another process answers on its socket, which stays open meanwhile."""
WARMUP_TOKENS = 16
"""Longest answer of a warm-up request, rounded up."""
LEAST_WARMUP_S = 30
LEAST_WEDGED_S = 20
READ_BYTES_S = 50_000_000
"""Slowest disk that weights are read from."""


@dataclass(frozen=True)
class Work:
    """The largest honest request of one model on a slow machine. All in seconds, or tokens where it says so."""

    sizing: Sizing
    max_answer: int
    """Tokens."""
    step: int
    """Tokens that one step of the engine computes at most."""
    catalog: EngineCatalog

    def _rate(self, measured: float) -> float:
        """Tokens a second at worst: as measured, less for a larger model, and less by the margin."""
        speed = self.catalog.speed
        return measured * speed.parameters.value / self.sizing.entry.facts.parameters / speed.margin.value

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts that one engine reads in a second."""
        return self._rate(self.catalog.speed.prefill_tokens_s.value)

    @property
    def stream_rate(self) -> float:
        """Tokens that one stream gets in a second: all streams share what the engine makes."""
        speed = self.catalog.speed
        shared = speed.decode_tokens_s.value / self.sizing.concurrency
        return self._rate(min(shared, speed.stream_tokens_s.value))

    @property
    def silence(self) -> float:
        """No token moves for so long: a prompt of a full context is read, and the step that was under way before it."""
        return (self.sizing.context + self.step) / self.prefill_rate

    @property
    def generation(self) -> float:
        """All prompts of a full batch are read, and then the longest answer is written."""
        prompts = self.sizing.concurrency * self.sizing.context
        return prompts / self.prefill_rate + self.max_answer / self.stream_rate

    @property
    def warmup(self) -> float:
        """One warm-up request, as many at once as the engine takes."""
        return self.silence + WARMUP_TOKENS / self.stream_rate

    @property
    def start(self) -> float:
        """Processes start, twice as slowly as the slowest that was measured, and weights are read."""
        return 2 * self.catalog.speed.start_s.value + self.sizing.entry.facts.weights_bytes / READ_BYTES_S


Explained = tuple[int | str, str]
"""A value and the reason for it."""


def explain(works: Sequence[Work], ttft_p95_s: float) -> dict[str, Explained]:
    """Every timing of a fleet, and why: for each the value that its slowest model needs."""
    return _generation(works, ttft_p95_s) | _starting(works) | _rotation() | _rest()


def timings(explained: Mapping[str, Explained]) -> Timings:
    """The timings without the reasons."""
    return Timings.model_validate({name: value for name, (value, _) in explained.items()})


def _generation(works: Sequence[Work], ttft_p95_s: float) -> dict[str, Explained]:
    longest = math.ceil(max(work.generation for work in works))
    drain = max(longest, _wedged(works)) + 10
    server = drain + 10
    shutdown = 30
    queue = round(min(120, max(10, 6 * ttft_p95_s)))
    return {
        "longest_generation_s": (
            longest,
            "a slow machine reads a full batch of full prompts and writes the longest answer, nothing new coming in",
        ),
        "drain_s": (
            drain,
            "longest generation, or the time to see that an engine is wedged; and 10 s to hear of beginning and end",
        ),
        "shutdown_s": (
            shutdown,
            "after a drain, time for what was on its way; without one, the limit of what may finish",
        ),
        "stop_s": (shutdown + 15, "shutdown, and 15 s for the engine's processes to end (7 to 10 measured)"),
        "server_s": (
            server,
            "an answer that is not streamed is silent until it is whole: drain and 10 s; the agent ends wedged ones",
        ),
        "client_s": (server + 10, "more than server_s: else the gateway takes its own waiting for the client's"),
        "queue_s": (
            queue,
            "six times the promised time to the first token, 10 to 120 s: clients give up after minutes",
        ),
        "gateway_stop_s": (queue + drain, "what waits in an old gateway process gets its place and finishes"),
    }


def _wedged(works: Sequence[Work]) -> int:
    return max(LEAST_WEDGED_S, math.ceil(max(work.silence for work in works)))


def _starting(works: Sequence[Work]) -> dict[str, Explained]:
    warmup = max(LEAST_WARMUP_S, math.ceil(max(work.warmup for work in works)))
    start = math.ceil(max(work.start for work in works)) + 2 * warmup
    wedged = _wedged(works)
    restarts = 3
    return {
        "warmup_request_s": (warmup, f"the longest prompt and a short answer, {LEAST_WARMUP_S} s at least"),
        "start_s": (start, "twice the slowest start that was measured, reading the weights, two warm-up requests"),
        "wedged_s": (
            wedged,
            f"the longest time without a token that a slow machine needs, {LEAST_WEDGED_S} s at least",
        ),
        "crash_loop_restarts": (restarts, "starts that nobody asked for"),
        "crash_loop_window_s": (restarts * start, "the time that so many of the slowest starts take"),
    }


def _rotation() -> dict[str, Explained]:
    poll, check, fast, fall = 200, 200, 100, 2
    probe = OUT_MS - SLACK_MS - poll - check - fast * (fall - 1)
    return {
        "poll_ms": (poll, f"part of the {OUT_MS} ms in which a dead engine is out of rotation"),
        "probe_timeout_ms": (
            probe,
            f"what is left of those {OUT_MS} ms: an engine on a busy machine is slow to answer",
        ),
        "check_ms": (check, f"part of those {OUT_MS} ms"),
        "check_fast_ms": (fast, f"part of those {OUT_MS} ms, once for each further check that must fail"),
        "check_fall": (fall, "one lost check is no failure"),
        "check_rise": (1, "the agent has made sure"),
        "check_timeout_ms": (
            AGENT_RESTART_MS * 5 // 2,
            "a restart of the agent, two and a half times: engines stay in",
        ),
        "connect_ms": (1000, "an engine on the same network accepts at once, or is not there"),
    }


def _rest() -> dict[str, Explained]:
    scrape = 5
    return {
        "request_s": (30, "for a client to send a request"),
        "keep_alive_s": (75, "more than the 60 s of common clients: it is they who close"),
        "scrape_s": (scrape, "alerts within half a minute, at next to no load"),
        "alert_window_s": (6 * scrape, "six scrapes: one that is lost starts no alert and ends none"),
        "retention": ("7d", "a week to look back on one machine"),
    }
