"""An engine's state, as it follows from what the agent was told."""

from __future__ import annotations

import pytest
from fleet_agent.engine import Engine, Sample

WINDOW_S = 60.0


def engine() -> Engine:
    one = Engine("chat-1", {"port": 9001, "model": "chat"}, "bundle")
    one.expected = True
    one.sees((10, 1.0), 0.0, 0.0, WINDOW_S)
    return one


def ready() -> Engine:
    one = engine()
    one.probed("ok", 1.0)
    one.latched = True
    return one


def test_states_in_their_order() -> None:
    one = Engine("chat-1", {"port": 9001, "model": "chat"}, "bundle")
    assert one.state(0.0) == "stopped"
    one.sees((10, 1.0), 0.0, 0.0, WINDOW_S)
    assert one.state(0.0) == "loading"
    one.probed("ok", 1.0)
    assert one.state(1.0) == "warming"
    one.latched = True
    assert one.state(2.0) == "ready"
    one.drain(3.0)
    assert one.state(3.0) == "draining"


def test_healthy_is_not_ready_before_the_warm_up() -> None:
    one = engine()
    one.probed("ok", 1.0)
    assert one.checked(1.0, others_ready=True) == 503


def test_another_process_must_be_warmed_again_and_is_not_draining() -> None:
    one = ready()
    one.drain(2.0)
    one.sees((11, 5.0), 5.0, 5.0, WINDOW_S)
    one.probed("ok", 6.0)
    assert one.state(6.0) == "warming"
    assert not one.draining


def test_the_same_process_id_with_another_start_is_another_process() -> None:
    one = ready()
    assert one.sees((10, 99.0), 5.0, 5.0, WINDOW_S)
    assert not one.latched


@pytest.mark.parametrize(("others", "status"), [(True, 503), (False, 200)])
def test_a_slow_engine_is_taken_out_only_while_another_can_serve(others: bool, status: int) -> None:  # noqa: FBT001
    one = ready()
    one.probed("slow", 2.0)
    assert one.checked(2.0, others_ready=others) == status


def test_a_stopped_or_dead_engine_is_out_even_if_it_is_the_only_one() -> None:
    one = ready()
    one.stopped_process = True
    one.probed("slow", 2.0)
    assert one.checked(2.0, others_ready=False) == 503
    other = ready()
    other.probed("refused", 2.0)
    assert other.checked(2.0, others_ready=False) == 503


def test_a_drain_is_over_when_gateways_know_and_nothing_is_in_flight() -> None:
    one = ready()
    one.checked(1.5, others_ready=True)
    one.drain(2.0)
    one.sampled(Sample(running=0), 2.1)
    one.sampled(Sample(running=0), 2.2)
    assert not one.drained(2.3), "no gateway has been told yet"
    one.checked(2.3, others_ready=True)
    one.checked(2.6, others_ready=True)
    assert one.drained(2.7)
    one.sampled(Sample(running=1), 2.8)
    assert not one.drained(2.9)


def test_where_no_gateway_asks_none_has_to_be_told() -> None:
    one = ready()
    one.drain(2.0)
    one.sampled(Sample(), 2.1)
    one.sampled(Sample(), 2.2)
    assert not one.drained(4.0)
    assert one.drained(5.5)


def test_wedged_is_running_without_progress() -> None:
    one = ready()
    one.sampled(Sample(running=2, progress=5), 10.0)
    one.probed("ok", 70.0)
    one.sampled(Sample(running=2, progress=5), 70.0)
    assert "no token for 30 s" in one.hopeless(70.0, 30, 300)
    one.sampled(Sample(running=2, progress=6), 71.0)
    assert one.hopeless(72.0, 30, 300) == ""


def test_idle_is_not_wedged() -> None:
    one = ready()
    one.sampled(Sample(running=0, progress=5), 10.0)
    one.sampled(Sample(running=0, progress=5), 99.0)
    one.probed("ok", 99.0)
    assert one.hopeless(99.0, 30, 300) == ""


def test_no_answer_for_long_is_hopeless_too() -> None:
    one = ready()
    one.probed("slow", 40.0)
    assert one.hopeless(40.0, 30, 300) == "no answer for 30 s"


def test_three_crashes_are_a_loop_and_starts_on_purpose_are_none() -> None:
    one = engine()
    for n in range(3):
        one.sees((20 + n, float(n)), float(n), float(n), WINDOW_S)
    assert one.crash_loop(3)
    one.sees((20 + 2, 2.0), 100.0, 100.0, WINDOW_S)
    assert not one.crash_loop(3), "crashes outside the window are forgotten"
    one.expected = True
    one.sees((50, 101.0), 101.0, 101.0, WINDOW_S)
    assert one.crashes == []
