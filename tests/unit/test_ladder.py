"""Which rung of a pool's ladder is to have how many nodes."""

from __future__ import annotations

from typing import Any

from fleet_agent.ladder import Rung, wanted
from hypothesis import given
from hypothesis import strategies as st

NODES = 4


def rung(name: str = "next", **has: Any) -> Rung:
    values = {"most": NODES, "desired": 0, "ready": 0, "coming": 0, "failed": False}
    return Rung(name=name, **{**values, **has})


def first(**has: Any) -> Rung:
    return rung("first", **{"desired": NODES, **has})


def test_a_rung_that_boots_its_nodes_asks_nobody() -> None:
    assert wanted([first(coming=NODES), rung()]) == {"next": 0}


def test_a_rung_that_has_not_tried_yet_asks_nobody() -> None:
    assert wanted([first(), rung()]) == {"next": 0}


def test_what_a_rung_cannot_get_the_next_one_is_asked_for() -> None:
    assert wanted([first(ready=1, failed=True), rung()]) == {"next": 3}


def test_what_two_rungs_cannot_get_the_third_is_asked_for() -> None:
    second = rung("second", desired=3, coming=1, failed=True)
    assert wanted([first(ready=1, failed=True), second, rung()]) == {"second": 3, "next": 2}


def test_a_stand_in_serves_until_the_first_has_the_node_and_not_just_boots_it() -> None:
    standing_in = rung(desired=3, ready=3)
    assert wanted([first(ready=1, coming=3), standing_in]) == {"next": 3}
    assert wanted([first(ready=3, coming=1), standing_in]) == {"next": 1}
    assert wanted([first(ready=4), standing_in]) == {"next": 0}


def test_a_node_that_is_being_replaced_on_the_first_rung_asks_nobody() -> None:
    assert wanted([first(ready=3), rung()]) == {"next": 0}


counts = st.integers(0, NODES)
rungs = st.builds(
    lambda desired, ready, coming, failed: rung(
        desired=desired, ready=min(ready, desired), coming=coming, failed=failed
    ),
    *(counts, counts, counts, st.booleans()),
)


@given(counts, counts, st.integers(0, 1), rungs)
def test_never_more_nodes_are_wanted_than_the_pool_has_and_never_is_one_taken_that_serves_for_a_missing_one(
    ready: int, coming: int, failed: int, then: Rung
) -> None:
    before = first(ready=ready, coming=min(coming, NODES - ready), failed=bool(failed))
    nodes = wanted([before, then])["next"]
    assert 0 <= nodes <= NODES
    assert nodes + ready <= max(NODES, ready)
    assert nodes >= min(then.desired, NODES - ready)
