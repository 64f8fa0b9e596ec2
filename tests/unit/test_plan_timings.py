"""Timings never contradict each other, whatever valid stack they are for."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from infra.config import parse
from infra.plan import make_plan
from infra.plan.model import Timings
from infra.plan.timings import AGENT_RESTART_MS, OUT_MS
from tests.unit.inputs import KEYS, a_host, a_lock, entry, plan

HUGE = a_host(1 << 20, cores=64)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    context = draw(st.integers(128, 8192))
    model: dict[str, Any] = {"weights": draw(st.sampled_from(["small", "small-w8a8", "large"])), "context": context}
    if draw(st.booleans()):
        model["max-answer"] = draw(st.integers(1, context))
    if draw(st.booleans()):
        model["concurrency"] = draw(st.integers(1, 1024))
    return model | {"engines": draw(st.integers(1, 5))}


STACKS = st.fixed_dictionaries(
    {"target": st.just("local"), "models": st.dictionaries(st.sampled_from("abcd"), models(), min_size=1)},
    optional={"slo": st.fixed_dictionaries({"ttft_p95": st.integers(50, 600_000).map(lambda ms: f"{ms}ms")})},
)


@given(STACKS)
def test_they_hang_together(raw: dict[str, Any]) -> None:
    lock = a_lock(large=entry(parameters=8_000_000_000, weights_bytes=16_000_000_000))
    made = make_plan("local", parse(raw), lock, HUGE, KEYS)
    consistent(made.timings)


def consistent(t: Timings) -> None:
    # What is promised is not cut off.
    assert t.drain_s >= t.longest_generation_s
    assert t.server_s > t.drain_s >= t.longest_generation_s
    assert t.gateway_stop_s >= t.queue_s + t.longest_generation_s
    # Each waits longer than the one behind it.
    assert t.client_s > t.server_s
    assert t.server_s > t.wedged_s
    assert t.stop_s > t.shutdown_s > 0
    assert t.start_s > t.warmup_request_s
    assert t.drain_s > t.wedged_s
    # A dead engine is out in time; a dead agent takes none with it.
    out = t.poll_ms + t.probe_timeout_ms + t.check_ms + t.check_fast_ms * (t.check_fall - 1)
    assert out < OUT_MS
    assert t.check_timeout_ms >= 2 * AGENT_RESTART_MS
    assert t.check_fast_ms <= t.check_ms
    assert t.check_fall >= 1 <= t.check_rise
    # A slow crash is seen as well as a fast one, and a wedge is told from a long prompt.
    assert t.crash_loop_window_s >= t.crash_loop_restarts * t.start_s
    assert t.warmup_request_s >= t.wedged_s
    # One lost scrape changes no alert.
    assert t.alert_window_s >= 3 * t.scrape_s
    assert all(value > 0 for _, value in t if isinstance(value, int))


def test_of_the_default_stack() -> None:
    t = plan().timings
    assert t.wedged_s <= 60
    assert t.start_s <= 300
    assert t.longest_generation_s <= 30 * 60


def test_longest_answer_shortens_what_waits_for_it() -> None:
    short = plan({"chat": {"weights": "small", "max-answer": 64}}).timings
    assert short.drain_s < plan().timings.drain_s / 3


def test_the_slowest_model_decides() -> None:
    lock = a_lock(large=entry(parameters=1_000_000_000, weights_bytes=2_000_000_000))
    both = plan({"chat": {"weights": "small"}, "large": {}}, lock=lock, host=a_host(128)).timings
    assert both == plan({"large": {}}, lock=lock, host=a_host(128)).timings
    assert both.wedged_s > plan().timings.wedged_s


def test_promised_time_to_first_token_decides_how_long_requests_wait() -> None:
    assert [plan(slo={"ttft_p95": ttft}).timings.queue_s for ttft in ("100ms", "5s", "60s")] == [10, 30, 120]
