"""Engines that are found by DNS: they come, they go, and the nameserver dies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from infra.plan.model import DnsPlan
from tests.render.gateways import Fleet, StartFleet, until
from tests.render.nameserver import Nameserver

NAME = "_chat._tcp.fleet.internal"
FEW = 0
"""Weight in a record: HAProxy makes 1 of it, of 256."""

StartFound = Callable[..., Fleet]


@pytest.fixture
def nameserver() -> Iterator[Nameserver]:
    with Nameserver() as nameserver:
        yield nameserver


@pytest.fixture
def start(start_fleet: StartFleet, nameserver: Nameserver) -> StartFound:
    """A fleet of one model whose engines are ready, but in no record yet."""

    def start(engines: int = 3, slots: int = 6, **gateway: Any) -> Fleet:
        dns = DnsPlan(nameservers=(nameserver.address,), poll_ms=200, retry_ms=100)
        srv = {"discovery": "dns-srv", "srv": (("chat", NAME, slots),), "dns": dns}
        fleet = start_fleet(engines=engines, ready=False, gateway=srv | gateway)
        fleet.mark(**{name.replace("-", "_"): 200 for name in fleet.engines})
        return fleet

    return start


def register(nameserver: Nameserver, fleet: Fleet, *names: str, weight: int = 65535) -> None:
    nameserver.records[NAME] = [(fleet.engines[name].port, weight) for name in names]


def up(fleet: Fleet) -> int:
    return sum(state.startswith("UP") for state in fleet.gateway.servers().values())


def serving(fleet: Fleet) -> set[str]:
    answers = [fleet.ask() for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.json()["engine"] for answer in answers}


def test_none_is_found_none_serves(start: StartFound) -> None:
    fleet = start()
    answer = fleet.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


def test_engines_come_and_go(start: StartFound, nameserver: Nameserver) -> None:
    fleet = start()
    register(nameserver, fleet, "chat-0", "chat-1")
    until("two are found", lambda: up(fleet) == 2)
    assert serving(fleet) == {"chat-0", "chat-1"}
    register(nameserver, fleet, "chat-0", "chat-1", "chat-2")
    until("one more is found", lambda: up(fleet) == 3)
    assert serving(fleet) == {"chat-0", "chat-1", "chat-2"}
    register(nameserver, fleet, "chat-2")
    until("two are gone", lambda: up(fleet) == 1)
    assert serving(fleet) == {"chat-2"}


def test_64_fit_into_one_answer(start: StartFound, nameserver: Nameserver) -> None:
    fleet = start(engines=2, slots=64)
    # Ports on which nobody listens; the agent says that none of them is ready.
    nameserver.records[NAME] = [(port, 65535) for port in range(40_000, 40_064)]

    def found() -> int:
        rows = fleet.gateway.command("show servers state").splitlines()
        return sum(" 127.0.0.1 " in row and " engine-" in row for row in rows)

    until("all have an address", lambda: found() == 64)


def test_the_log_says_which_engine_it_was(start: StartFound, nameserver: Nameserver) -> None:
    fleet = start()
    register(nameserver, fleet, "chat-1")
    until("it is found", lambda: up(fleet) == 1)
    fleet.ask()
    until("it is logged", lambda: len(fleet.gateway.requests()) == 1)
    assert fleet.gateway.requests()[0]["address"] == f"127.0.0.1:{fleet.engines['chat-1'].port}"


def test_what_is_found_must_be_ready_to_stay(start: StartFound, nameserver: Nameserver) -> None:
    fleet = start()
    fleet.mark(chat_0=503)
    register(nameserver, fleet, "chat-0", "chat-1")
    until("one is in, one out", lambda: up(fleet) == 1 and fleet.agent.asked[fleet.engines["chat-0"].port] > 2)
    assert serving(fleet) == {"chat-1"}


@pytest.mark.parametrize("death", ["silent", "gone"])
def test_a_dead_nameserver_takes_nobody_out(start: StartFound, nameserver: Nameserver, death: str) -> None:
    fleet = start()
    register(nameserver, fleet, "chat-0", "chat-1")
    until("two are found", lambda: up(fleet) == 2)
    if death == "gone":
        nameserver.records[NAME] = []  # NXDOMAIN: the zone has lost them
    nameserver.silent = death == "silent"
    before = nameserver.asked[NAME]
    until("it was asked ten times more", lambda: nameserver.asked[NAME] >= before + 10)
    assert serving(fleet) == {"chat-0", "chat-1"}
    # Nor does a reload, which has nobody to ask.
    plan = fleet.gateway.plan
    fleet.gateway.reload(plan.model_copy(update={"gateway": plan.gateway.model_copy(update={"queue": 65})}))
    assert serving(fleet) == {"chat-0", "chat-1"}
    nameserver.silent = False
    register(nameserver, fleet, "chat-2")
    # HAProxy 2.6 keeps the others for as long as their checks are good: it has not heard of them since the reload.
    until("the third is found", lambda: "chat-2" in serving(fleet))


def test_a_reload_keeps_the_drained_drained(start: StartFound, nameserver: Nameserver) -> None:
    fleet = start()
    register(nameserver, fleet, "chat-0", "chat-1")
    until("two are found", lambda: up(fleet) == 2)
    fleet.mark(chat_0=404)
    until("one drains", lambda: up(fleet) == 1)
    fleet.agent.sleep()  # only what is carried over can keep it out
    plan = fleet.gateway.plan
    fleet.gateway.reload(plan.model_copy(update={"gateway": plan.gateway.model_copy(update={"queue": 65})}))
    assert serving(fleet) == {"chat-1"}
    fleet.agent.wake()


def test_weights_are_those_of_the_records(start: StartFound, nameserver: Nameserver) -> None:
    fleet = start(routing="round-robin")
    canary, port = fleet.engines["chat-1"].port, fleet.engines["chat-0"].port
    nameserver.records[NAME] = [(port, 65535), (canary, 6553)]
    until("both are found", lambda: up(fleet) == 2)
    engines = [fleet.ask().json()["engine"] for _ in range(110)]
    assert 5 <= engines.count("chat-1") <= 15


@pytest.mark.parametrize("routing", ["prefix-affinity", "session"])
def test_affinity_goes_with_it(start: StartFound, nameserver: Nameserver, routing: str) -> None:
    fleet = start(routing=routing)
    register(nameserver, fleet, "chat-0", "chat-1", "chat-2")
    until("all are found", lambda: up(fleet) == 3)
    for n in range(10):
        asked = [fleet.ask(headers={"X-Session-Id": f"{n}"}).json()["engine"] for _ in range(4)]
        assert len(set(asked)) == 1


def test_the_machines_own_resolvers_are_the_default(start_fleet: StartFleet) -> None:
    if not os.path.exists("/etc/resolv.conf"):  # noqa: PTH110
        pytest.skip("this machine has no /etc/resolv.conf")
    fleet = start_fleet(ready=False, gateway={"discovery": "dns-srv", "srv": (("chat", NAME, 2),)})
    assert fleet.ask().status_code == 503
