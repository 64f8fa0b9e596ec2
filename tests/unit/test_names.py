"""The gateway's own nameserver: what Cloud Map lists, all of it, or silence."""

from __future__ import annotations

from typing import Any

import dnslib
import pytest
from fleet_agent.names import LATE_S, Book, Engine, look

NAME = "_chat._tcp.prod.internal"
SERVICES = {NAME: ("prod.internal", "_chat._tcp")}


def ask(book: Book, name: str, kind: str = "SRV", now: float = 0) -> Any:
    answer = book.answer(bytes(dnslib.DNSRecord.question(name, kind).pack()), now)
    return None if answer is None else dnslib.DNSRecord.parse(answer)


def engines(count: int) -> tuple[Engine, ...]:
    return tuple(Engine(f"10.0.{n // 200}.{n % 200}", 8000 + n % 8) for n in range(count))


@pytest.mark.parametrize("count", [1, 9, 200, 800])
def test_all_engines_are_in_one_answer(count: int) -> None:
    book = Book()
    book.hear(NAME, engines(count), 0)
    answer = ask(book, NAME)
    where = {str(it.rname).rstrip("."): str(it.rdata) for it in answer.ar}
    found = {Engine(where[str(it.rdata.target).rstrip(".")], it.rdata.port) for it in answer.rr}
    assert found == set(engines(count))
    assert len(answer.pack()) < 65_000, "what a datagram holds"


def test_targets_have_addresses() -> None:
    book = Book()
    book.hear(NAME, (Engine("10.1.2.3", 8000),), 0)
    assert [str(it.rdata) for it in ask(book, "10-1-2-3", "A").rr] == ["10.1.2.3"]
    assert ask(book, "10-9-9-9", "A").header.rcode == dnslib.RCODE.NXDOMAIN


def test_nothing_registered_is_an_answer_and_nothing_heard_is_none() -> None:
    book = Book()
    assert ask(book, NAME) is None
    book.hear(NAME, (), 0)
    assert ask(book, NAME).header.rcode == dnslib.RCODE.NXDOMAIN


def test_what_was_heard_long_ago_is_not_said() -> None:
    book = Book()
    book.hear(NAME, engines(2), 0)
    assert ask(book, NAME, now=LATE_S) is not None
    assert ask(book, NAME, now=LATE_S + 0.1) is None


@pytest.mark.parametrize("query", [b"", b"\x00" * 12, b"nonsense", b"\xff" * 40])
def test_what_is_no_question_gets_no_answer(query: bytes) -> None:
    assert Book().answer(query, 0) is None


class CloudMap:
    """As much of it as is asked."""

    def __init__(self) -> None:
        self.dead = False
        self.made = 0

    def __getitem__(self, service: str) -> CloudMap:
        assert service == "servicediscovery"
        return self

    def forget(self) -> None:
        self.made += 1

    def discover_instances(self, **asked: Any) -> dict[str, Any]:
        assert asked == {
            "NamespaceName": "prod.internal",
            "ServiceName": "_chat._tcp",
            "MaxResults": 1000,
            "HealthStatus": "ALL",
        }
        if self.dead:
            raise ConnectionError("throttled")
        return {"Instances": [{"Attributes": {"AWS_INSTANCE_IPV4": "10.0.0.1", "AWS_INSTANCE_PORT": "8000"}}]}


def test_while_cloud_map_is_silent_what_it_said_holds_for_a_moment() -> None:
    book, cloud = Book(), CloudMap()
    look(book, cloud, SERVICES)
    cloud.dead = True
    heard = book.heard[NAME]
    look(book, cloud, SERVICES)
    assert (book.engines[NAME], book.heard[NAME]) == ((Engine("10.0.0.1", 8000),), heard)
    assert cloud.made == 1, "a client that was made without credentials never gets any"
