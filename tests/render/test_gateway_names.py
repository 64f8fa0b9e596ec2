"""HAProxy and the nameserver of gateways on AWS: all engines are found, also where there are more than eight."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from fleet_agent.names import Book, Engine, respond

from infra.plan.model import DnsPlan
from tests.render.gateways import StartFleet, until

NAME = "_chat._tcp.test.internal"
ENGINES = 12


@pytest.fixture
def book() -> Iterator[tuple[Book, str]]:
    """What is registered, and where the nameserver answers."""
    book = Book()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*listener.getsockname())

        def work() -> None:
            with contextlib.suppress(OSError):  # the socket is closed: the end
                respond(book, listener)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield book, address


def test_all_are_found_and_stay(start_fleet: StartFleet, book: tuple[Book, str]) -> None:
    known, address = book
    dns = DnsPlan(nameservers=(address,), poll_ms=100, retry_ms=100)
    srv = {"discovery": "dns-srv", "srv": (("chat", NAME, ENGINES + 3),), "dns": dns}
    fleet = start_fleet(engines=ENGINES, ready=False, gateway=srv)
    fleet.mark(**{name.replace("-", "_"): 200 for name in fleet.engines})

    def up() -> int:
        known.hear(NAME, tuple(Engine("127.0.0.1", it.port) for it in fleet.engines.values()), time.monotonic())
        return sum(state.startswith("UP") for state in fleet.gateway.servers().values())

    until("all are in rotation", lambda: up() == ENGINES)
    answers = [fleet.ask() for _ in range(4 * ENGINES)]
    assert {answer.json()["engine"] for answer in answers} == set(fleet.engines)
    del known.engines[NAME]  # nothing is said any more
    assert [fleet.ask().status_code for _ in range(ENGINES)] == [200] * ENGINES
