"""Timings never contradict each other, whatever valid stack they are for."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.catalog.gpu_start import gpu_start
from infra.config import parse
from infra.plan import make_plan
from infra.plan.capacity import check_drain, note_spot
from infra.plan.ledger import Ledger
from infra.plan.model import AwsTimings, KubernetesTimings, SpeedPlan, Timings
from infra.plan.timings import (
    AGENT_RESTART_MS,
    DRAIN_LIMIT_S,
    OUT_MS,
    explain,
    explain_aws,
    explain_kubernetes,
    min_healthy_percent,
    queue_length,
    timings,
    values,
)
from infra.plan.work import Largest, Work, on_gpu
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


# GPUs

FACTS = gpu_start()


def a_speed(prefill: float = 10_000, tpot: float = 0.02, error: int = 30) -> SpeedPlan:
    return SpeedPlan(
        ttft_s=0.5,
        ttft_p95_s=1.0,
        tpot_s=tpot,
        tpot_p95_s=tpot,
        output_tokens_s=64 / tpot,
        prefill_tokens_s=prefill,
        requests_s=2.0,
        measured=False,
        error_percent=error,
        basis="a test",
    )


def a_work(
    largest: Largest, speed: SpeedPlan | None = None, weights_bytes: int = 16 * 10**9, *, eager: bool = False
) -> Work:
    return on_gpu(largest, speed or a_speed(), weights_bytes, FACTS, eager=eager)


@st.composite
def gpu_works(draw: st.DrawFn) -> Work:
    context = draw(st.integers(128, 1 << 20))
    batch = max(context, draw(st.integers(1, 1024)) * draw(st.integers(16, context)))
    largest = Largest(context, batch, draw(st.integers(1, context)), draw(st.integers(1, 32_768)))
    speed = a_speed(draw(st.floats(100, 1e6)), draw(st.floats(1e-4, 1)), draw(st.integers(0, 100)))
    return a_work(largest, speed, draw(st.integers(10**8, 10**12)), eager=draw(st.booleans()))


FLEETS = st.lists(gpu_works(), min_size=1, max_size=3)
TTFT = st.floats(0.05, 600)
NODE_BYTES = st.integers(10**8, 10**12)


@given(FLEETS, TTFT)
def test_they_hang_together_on_gpus(works: list[Work], ttft: float) -> None:
    t = timings(explain(works, ttft))
    consistent(t)
    for work in works:
        assert t.longest_generation_s >= work.generation
        assert t.wedged_s >= work.silence
        assert t.start_s > work.start


@given(FLEETS, TTFT, NODE_BYTES)
def test_they_hang_together_on_aws(works: list[Work], ttft: float, node_bytes: int) -> None:
    t = timings(explain(works, ttft))
    aws = AwsTimings.model_validate(values(explain_aws(t, node_bytes, FACTS)))
    # What AWS takes.
    assert min(aws.drain_hook_s, aws.gateway_hook_s, aws.launch_hook_s) >= 30
    assert max(aws.drain_hook_s, aws.gateway_hook_s, aws.launch_hook_s) <= 7200
    assert 0 <= aws.deregistration_s <= 3600
    assert 60 <= aws.idle_s <= 6000
    assert all(value > 0 for _, value in aws)
    # A spot node is gone 120 s after the notice, which is not seen at once.
    assert aws.spot_drain_s + aws.metadata_poll_s < 120
    assert aws.spot_drain_s <= t.drain_s
    # The next node leaves when the gateway has found the new one.
    assert aws.instance_warmup_s * 1000 > aws.dns_ttl_s * 1000 + t.check_ms * t.check_rise
    ledger = Ledger([])
    for number, work in enumerate(works):
        check_drain(f"m{number}", work, ledger)
    if ledger.findings:  # then there is no fleet
        return
    # Nothing is ended that may still finish, and each waits longer than the one behind it.
    assert aws.drain_hook_s > t.drain_s + t.stop_s
    assert aws.gateway_hook_s > t.gateway_stop_s
    assert aws.deregistration_s >= t.gateway_stop_s >= t.drain_s
    assert aws.idle_s > t.client_s > t.server_s > t.drain_s
    # A node that is starting is not taken for a broken one.
    assert aws.health_grace_s >= aws.launch_hook_s > min(t.start_s, 7199)


@given(FLEETS, TTFT, NODE_BYTES)
def test_they_hang_together_on_kubernetes(works: list[Work], ttft: float, node_bytes: int) -> None:
    t = timings(explain(works, ttft))
    k = KubernetesTimings.model_validate(values(explain_kubernetes(t, node_bytes, FACTS)))
    assert k.grace_s > t.drain_s + t.stop_s
    assert k.gateway_grace_s > t.gateway_stop_s
    assert k.startup_period_s * k.startup_failures > t.start_s
    assert k.progress_s > k.grace_s + t.start_s
    assert k.readiness_timeout_s * 1000 >= t.check_timeout_ms
    assert k.readiness_period_s >= 1


@given(FLEETS, TTFT, NODE_BYTES)
def test_every_timing_has_a_reason(works: list[Work], ttft: float, node_bytes: int) -> None:
    explained = explain(works, ttft)
    t = timings(explained)
    for every in (explained, explain_aws(t, node_bytes, FACTS), explain_kubernetes(t, node_bytes, FACTS)):
        assert all(reason for _, reason in every.values())


@given(st.floats(0.01, 1e4), TTFT)
def test_who_comes_last_in_the_queue_is_served_in_time(requests_s: float, ttft: float) -> None:
    queue_s = timings(explain([a_work(Largest(1, 1, 1, 1))], ttft)).queue_s
    length = queue_length(requests_s, queue_s)
    assert length == 1 or length / requests_s <= queue_s
    assert (length + 1) / requests_s > queue_s


@given(st.integers(1, 1000))
def test_an_update_takes_one_node_and_needs_no_spare_one(nodes: int) -> None:
    percent = min_healthy_percent(nodes)
    assert 0 <= percent < 100
    away = nodes - math.ceil(nodes * percent / 100)
    assert away == 1 if nodes < 200 else 1 < away <= nodes // 100


@given(gpu_works())
def test_what_cannot_drain_is_refused_with_an_answer_that_can(work: Work) -> None:
    ledger = Ledger([])
    check_drain("chat", work, ledger)
    longest = work.answer_within(DRAIN_LIMIT_S)
    if not ledger.findings:
        assert work.generation <= DRAIN_LIMIT_S
        assert work.largest.answer <= longest + 1
        return
    (finding,) = ledger.findings
    assert finding.path == "models.chat.max-answer"
    assert longest == 0 or str(longest) in finding.fix
    if longest:
        largest = Largest(work.largest.context, work.largest.batch, longest, work.largest.step)
        assert Work(largest, work.prefill_rate, work.stream_rate, work.start).generation <= DRAIN_LIMIT_S * (1 + 1e-9)


def test_the_longest_that_may_drain_still_drains_where_requests_wait_longest() -> None:
    work = Work(Largest(1, 1, DRAIN_LIMIT_S - 1, 1), prefill_rate=1.0, stream_rate=1.0, start=1.0)
    ledger = Ledger([])
    check_drain("chat", work, ledger)
    assert not ledger.findings
    t = timings(explain([work], 600))
    aws = AwsTimings.model_validate(values(explain_aws(t, 1, FACTS)))
    assert 3600 >= aws.deregistration_s >= t.gateway_stop_s


def test_what_spot_cuts_is_said() -> None:
    speed = a_speed(tpot=0.02, error=0)
    t = timings(explain([a_work(Largest(8192, 8192, 8192, 2048), speed)], 1))
    aws = AwsTimings.model_validate(values(explain_aws(t, 1, FACTS)))
    ledger = Ledger([])
    note_spot("short", a_work(Largest(8192, 8192, 512, 2048), speed), aws, ledger)
    assert not ledger.notices
    note_spot("long", a_work(Largest(8192, 8192, 8192, 2048), speed), aws, ledger)
    (notice,) = ledger.notices
    assert aws.spot_drain_s == 105
    # 105 s less the prompt, 8192 tokens at 10,000 / 1.5 a second; then a token every 30 ms.
    assert f"more than {int((105 - 8192 * 1.5 / 10_000) / 0.03)} tokens" in notice.message


def test_of_an_8b_on_one_h100() -> None:
    work = a_work(Largest(16_384, 64 * 4096, 4096, 8192), a_speed(prefill=25_000, tpot=0.015))
    t = timings(explain([work], 1.0))
    assert t.drain_s <= 5 * 60
    assert t.wedged_s == 20
    assert t.start_s <= 12 * 60


@pytest.mark.parametrize("slower", [{"prefill": 5000.0}, {"tpot": 0.04}, {"error": 60}])
def test_a_slower_engine_gets_more_time(slower: dict[str, Any]) -> None:
    largest = Largest(16_384, 64 * 4096, 4096, 8192)
    fast, slow = (timings(explain([a_work(largest, speed)], 1.0)) for speed in (a_speed(), a_speed(**slower)))
    assert slow.drain_s > fast.drain_s


def test_without_compilation_an_engine_is_sooner_ready() -> None:
    largest = Largest(1024, 1024, 64, 2048)
    compiled, eager = (a_work(largest, weights_bytes=10**9, eager=eager) for eager in (False, True))
    assert compiled.start > 2 * eager.start
