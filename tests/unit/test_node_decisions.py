"""What a machine of a group does next: pure, on every side of each threshold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fleet_agent.node import (
    CONFIG,
    IDLE_S,
    RESTART_S,
    SETTLE_S,
    SILENT_S,
    Do,
    Memory,
    Row,
    Seen,
    Settings,
    Unit,
    decide,
    spare,
)

SETTINGS = Settings(
    role="engine",
    group="g",
    launch_hook="ready",
    terminate_hook="drain",
    launch_heartbeat_s=300,
    terminate_heartbeat_s=90,
    boot_limit_s=600,
    spot_drain_s=100,
    drain_s=400,
    services={"chat": "srv-1"},
)
GATEWAY = replace(SETTINGS, role="gateway", services={})
READY = Row("chat-1", "chat", 8000, "ready", 0, drained=False)
ACTIVE = Unit("active")
REGISTER = Do("register", "chat-1", "srv-1", 8000)


def seen(now: float = 1000, *rows: Row, **more: Any) -> Seen:
    defaults: dict[str, Any] = {"weights": ACTIVE, "apply": ACTIVE, "expected": frozenset({"chat-1"}), "engines": rows}
    return Seen(now, **{**defaults, **more})


def kinds(actions: list[Do]) -> list[str]:
    return [action.kind for action in actions]


def do(settings: Settings, memory: Memory, what: Seen) -> list[Do]:
    """Decide, and let everything work."""
    actions = decide(settings, memory, what)
    for action in actions:
        memory.done(action, what.now)
    return actions


def serving() -> Memory:
    memory = Memory(launched=True)
    do(SETTINGS, memory, seen(1000, READY, target="InService"))
    assert decide(SETTINGS, memory, seen(1001, READY, target="InService")) == []
    return memory


# Launch


def test_the_group_goes_on_once_every_engine_is_ready() -> None:
    memory = Memory()
    loading = replace(READY, name="chat-2", state="loading")
    both = frozenset({"chat-1", "chat-2"})
    assert kinds(do(SETTINGS, memory, seen(1000, READY, loading, expected=both))) == ["register", "deregister"]
    ready = replace(loading, state="ready")
    assert kinds(do(SETTINGS, memory, seen(1001, READY, ready, expected=both))) == ["register", "continue"]
    assert memory.launched
    assert "continue" not in kinds(do(SETTINGS, memory, seen(1002, READY, ready, expected=both)))


def test_a_machine_of_which_nothing_is_known_is_not_ready() -> None:
    assert "continue" not in kinds(do(SETTINGS, Memory(), seen(1000, READY, expected=frozenset())))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"weights": Unit("failed", "exit-code", CONFIG)}, "fleet-weights"),
        ({"apply": Unit("failed", "exit-code", 1)}, "fleet-apply"),
    ],
)
def test_what_refuses_is_given_up_and_not_started_again(more: dict[str, Unit], why: str) -> None:
    memory = Memory()
    (action,) = do(SETTINGS, memory, seen(1000, **more))
    assert (action.kind, action.name) == ("abandon", "ready")
    assert why in action.why
    assert do(SETTINGS, memory, seen(2000, **more)) == []


def test_a_boot_has_a_limit() -> None:
    memory = Memory()
    activating = Unit("activating")
    do(SETTINGS, memory, seen(1000, apply=activating))
    assert kinds(do(SETTINGS, memory, seen(1600, apply=activating))) == ["heartbeat"]
    assert kinds(do(SETTINGS, memory, seen(1601, apply=activating))) == ["abandon"]


def test_a_cache_that_is_being_filled_is_waited_for() -> None:
    memory = Memory()
    waiting: dict[str, Any] = {"weights": Unit("activating"), "apply": Unit("inactive")}
    for now in range(1000, 9000, 90):
        assert set(kinds(do(SETTINGS, memory, seen(now, filling=True, **waiting)))) <= {"heartbeat"}
    assert kinds(do(SETTINGS, memory, seen(9700, **waiting))) == ["abandon"]


def test_heartbeats_come_before_the_group_loses_patience() -> None:
    memory, activating = Memory(), Unit("activating")
    beats = [
        now for now in range(1000, 1500, 10) if "heartbeat" in kinds(do(SETTINGS, memory, seen(now, apply=activating)))
    ]
    assert beats
    assert all(
        later - before < SETTINGS.launch_heartbeat_s for before, later in zip([1000, *beats], beats, strict=False)
    )


def test_a_machine_without_a_group_asks_nobody() -> None:
    memory = Memory()
    assert do(replace(GATEWAY, group=None), memory, seen(1000, answers=True)) == []
    assert memory.launched


def test_a_gateway_is_ready_when_it_answers() -> None:
    memory = Memory()
    assert "continue" not in kinds(do(GATEWAY, memory, seen(1000)))
    assert "continue" in kinds(do(GATEWAY, memory, seen(1001, answers=True)))


# Discovery


@pytest.mark.parametrize("state", ["loading", "warming", "stopped", "draining"])
def test_an_engine_that_is_not_ready_is_not_to_be_found(state: str) -> None:
    memory = serving()
    assert kinds(do(SETTINGS, memory, seen(1001, replace(READY, state=state)))) == ["deregister"]
    assert do(SETTINGS, memory, seen(1002, replace(READY, state=state))) == []
    assert REGISTER in do(SETTINGS, memory, seen(1003, READY))


@pytest.mark.parametrize("state", ["loading", "warming", "stopped", "draining"])
def test_one_that_takes_up_another_bundle_stays(state: str) -> None:
    memory = serving()
    assert do(SETTINGS, memory, seen(1001, replace(READY, state=state), changing=True)) == []
    assert do(SETTINGS, memory, seen(1002, READY, changing=True)) == []


def test_one_that_is_merely_silent_stays() -> None:
    assert do(SETTINGS, serving(), seen(1001, replace(READY, state="silent"))) == []


def test_an_engine_that_is_gone_is_taken_out() -> None:
    assert kinds(do(SETTINGS, serving(), seen(1001, expected=frozenset()))) == ["deregister"]


def test_another_port_is_registered_anew() -> None:
    assert do(SETTINGS, serving(), seen(1001, replace(READY, port=8001))) == [Do("register", "chat-1", "srv-1", 8001)]


def test_the_next_process_says_everything_again() -> None:
    """What the last one did is not known: it may have been killed between two calls."""
    assert REGISTER in decide(SETTINGS, Memory(launched=True), seen(1000, READY))
    down = replace(READY, state="loading")
    assert "deregister" in kinds(decide(SETTINGS, Memory(launched=True), seen(1000, down)))


def test_an_agent_that_does_not_answer_changes_nothing() -> None:
    assert do(SETTINGS, serving(), seen(1001, engines=None)) == []


def test_what_failed_is_decided_again() -> None:
    memory = Memory(launched=True)
    assert REGISTER in decide(SETTINGS, memory, seen(1000, READY))
    assert REGISTER in decide(SETTINGS, memory, seen(1001, READY))


# In service


def test_a_busy_machine_is_not_one_to_take() -> None:
    memory = serving()
    busy = seen(1001, replace(READY, in_flight=3), target="InService")
    assert kinds(do(SETTINGS, memory, busy)) == ["protect"]
    assert do(SETTINGS, memory, seen(1000 + IDLE_S, READY, target="InService")) == []
    assert kinds(do(SETTINGS, memory, seen(1002 + IDLE_S, READY, target="InService"))) == ["unprotect"]


def test_a_group_that_wants_fewer_gets_one_though_all_are_busy() -> None:
    memory = serving()
    busy = replace(READY, in_flight=3)
    do(SETTINGS, memory, seen(1001, busy, target="InService"))
    assert kinds(do(SETTINGS, memory, seen(1002, busy, target="InService", spare=True))) == ["unprotect"]
    assert do(SETTINGS, memory, seen(1003, busy, target="InService", spare=True)) == []


@pytest.mark.parametrize(
    ("desired", "protected", "whose"),
    [
        (2, {"a": True, "b": True}, set()),
        (1, {"a": True, "b": True}, {"a"}),
        (1, {"a": True, "b": True, "c": True}, {"a", "b"}),
        (1, {"a": True, "b": False}, set()),  # the group takes the one that is free
        (1, {"a": False, "b": True}, {"a"}),  # it stays free
        (0, {"a": True}, {"a"}),
    ],
)
def test_whose_turn_it_is(desired: int, protected: dict[str, bool], whose: set[str]) -> None:
    assert {name for name in protected if spare(desired, protected, name)} == whose


def test_a_machine_without_engines_is_replaced_after_a_while() -> None:
    memory = serving()
    down = replace(READY, state="loading")
    assert "unhealthy" not in kinds(do(SETTINGS, memory, seen(1600, down)))
    assert "unhealthy" not in kinds(do(SETTINGS, memory, seen(1700, down, changing=True)))
    assert "unhealthy" in kinds(do(SETTINGS, memory, seen(1701, down)))
    assert "unhealthy" not in kinds(do(SETTINGS, memory, seen(1702, down)))


def test_programs_that_were_killed_on_the_way_are_started() -> None:
    memory = serving()
    killed = Unit("failed", "signal")
    assert kinds(do(SETTINGS, memory, seen(2000, READY, apply=killed))) == ["start"]
    assert do(SETTINGS, memory, seen(2000 + RESTART_S, READY, apply=killed)) == []
    assert kinds(do(SETTINGS, memory, seen(2001 + RESTART_S, READY, apply=killed))) == ["start"]


# Leaving


@pytest.mark.parametrize(
    ("more", "limit"), [({"spot": True}, 100), ({"target": "Terminated"}, 400), ({"stopping": True}, 400)]
)
def test_a_machine_that_leaves_drains_and_then_lets_go(more: dict[str, Any], limit: float) -> None:
    memory = serving()
    busy = replace(READY, in_flight=2)
    assert kinds(do(SETTINGS, memory, seen(1010, busy, **more)))[:2] == ["deregister", "drain"]
    draining = replace(busy, state="draining")
    do(SETTINGS, memory, seen(1010 + limit, draining, **more))
    assert not memory.drained
    do(SETTINGS, memory, seen(1011 + limit, draining, **more))
    assert memory.drained, "the deadline is over"


def test_the_group_is_told_when_nothing_is_left() -> None:
    memory = serving()
    do(SETTINGS, memory, seen(1010, replace(READY, in_flight=1), target="Terminated"))
    draining = replace(READY, state="draining", in_flight=1)
    assert "continue" not in kinds(do(SETTINGS, memory, seen(1011, draining, target="Terminated")))
    drained = replace(draining, in_flight=0, drained=True)
    assert do(SETTINGS, memory, seen(1012, drained, target="Terminated")) == [Do("continue", "drain", why="drained")]
    assert do(SETTINGS, memory, seen(1013, drained, target="Terminated")) == []


def test_nothing_is_told_while_discovery_still_has_an_engine() -> None:
    memory = serving()
    drained = replace(READY, state="draining", drained=True)
    actions = decide(SETTINGS, memory, seen(1010, drained, target="Terminated"))  # and nothing of it works
    assert kinds(actions) == ["deregister"]
    assert kinds(decide(SETTINGS, memory, seen(1011, drained, target="Terminated"))) == ["deregister"]


def test_a_machine_that_leaves_takes_nothing_up_again() -> None:
    memory = serving()
    do(SETTINGS, memory, seen(1010, READY, spot=True))
    assert "register" not in kinds(do(SETTINGS, memory, seen(1020, READY)))


def test_an_agent_that_is_gone_has_nothing_to_drain() -> None:
    memory = serving()
    gone: dict[str, Any] = {"engines": None, "target": "Terminated"}
    assert "continue" not in kinds(do(SETTINGS, memory, seen(1000 + SILENT_S, **gone)))
    assert "continue" in kinds(do(SETTINGS, memory, seen(1002 + SILENT_S, **gone)))


def test_a_machine_that_never_served_has_nothing_to_drain() -> None:
    memory = Memory()
    do(SETTINGS, memory, seen(1000, engines=None, stopping=True))
    assert memory.drained


def test_a_gateway_waits_for_the_load_balancer_and_for_its_requests() -> None:
    memory = Memory(launched=True)
    leaving: dict[str, Any] = {"answers": True, "target": "Terminated"}
    do(GATEWAY, memory, seen(1000, **leaving))
    assert "continue" not in kinds(do(GATEWAY, memory, seen(1000 + SETTLE_S, **leaving)))
    assert "continue" not in kinds(do(GATEWAY, memory, seen(1001 + SETTLE_S, open=1, **leaving)))
    assert "continue" in kinds(do(GATEWAY, memory, seen(1002 + SETTLE_S, **leaving)))


def test_a_gateway_that_shuts_down_leaves_the_load_balancer_first() -> None:
    memory = Memory(launched=True)
    down: dict[str, Any] = {"answers": True, "stopping": True}
    assert kinds(decide(GATEWAY, memory, seen(1000, **down))) == ["detach"]
    assert kinds(do(GATEWAY, memory, seen(1001, **down))) == ["detach"], "what failed is tried again"
    assert do(GATEWAY, memory, seen(1002, open=1, **down)) == []
    do(GATEWAY, memory, seen(1002 + SETTLE_S, open=1, **down))
    assert not memory.drained
    do(GATEWAY, memory, seen(1003 + SETTLE_S, **down))
    assert memory.drained


def test_a_gateway_that_was_rebooted_goes_back_to_the_load_balancer() -> None:
    memory = Memory(launched=True, detached=True)
    assert do(GATEWAY, memory, seen(1000, answers=False)) == []
    assert do(GATEWAY, memory, seen(1001, answers=True)) == [Do("attach")]
    assert do(GATEWAY, memory, seen(1002, answers=True)) == []


def test_a_gateway_that_its_group_takes_away_leaves_the_load_balancer_to_it() -> None:
    memory = Memory(launched=True)
    assert "detach" not in kinds(do(GATEWAY, memory, seen(1000, answers=True, target="Terminated")))


def test_a_gateway_that_is_merely_late_with_an_answer_is_not_gone() -> None:
    memory = Memory(launched=True)
    leaving: dict[str, Any] = {"target": "Terminated"}
    do(GATEWAY, memory, seen(1000, answers=True, engines=None, **leaving))
    assert "continue" not in kinds(do(GATEWAY, memory, seen(1000 + SILENT_S, answers=False, engines=None, **leaving)))
    assert "continue" in kinds(do(GATEWAY, memory, seen(1001 + SILENT_S, answers=False, engines=None, **leaving)))
