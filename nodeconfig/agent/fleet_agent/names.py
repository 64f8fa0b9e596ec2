"""Say to HAProxy which engines are registered: a nameserver on loopback that knows all that Cloud Map knows.

Cloud Map's own answers to DNS questions hold eight instances at most, others at each question; HAProxy would take
engines in and out all the time. So a gateway asks Cloud Map's API, which lists all, and answers HAProxy's questions
itself.
While Cloud Map does not answer, neither does this: HAProxy then keeps what it knows, and its checks say who is well.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import dnslib

ADDRESS, PORT = "AWS_INSTANCE_IPV4", "AWS_INSTANCE_PORT"
"""Attributes of an instance in Cloud Map."""
LOOK_S = 1.0
LATE_S = 5.0
"""After so long without an answer from Cloud Map, what it said last is not said any more."""
QUERY_BYTES = 4096
TTL_S = 1
MOST = 1000
"""Instances that Cloud Map lists at once (API reference, DiscoverInstances, 2026-11)."""

log = logging.getLogger("names")


@dataclass(frozen=True, order=True)
class Engine:
    """Where an engine listens."""

    address: str
    port: int

    @property
    def target(self) -> str:
        """The name that stands for its address: short, as hundreds must fit into one answer."""
        return self.address.replace(".", "-")


@dataclass
class Book:
    """What is registered, by name of the SRV records, and when it was heard."""

    engines: dict[str, tuple[Engine, ...]] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)

    def hear(self, name: str, engines: tuple[Engine, ...], now: float) -> None:
        """Take note."""
        if engines != self.engines.get(name):
            log.info("%s: %s", name, ", ".join(f"{it.address}:{it.port}" for it in engines) or "no engines")
        self.engines[name], self.heard[name] = engines, now

    def answer(self, query: bytes, now: float) -> bytes | None:
        """The answer to a question; None where silence is the answer: nothing fresh is known, or it was no question."""
        try:
            asked = dnslib.DNSRecord.parse(query)
            if not asked.questions:
                return None
            question = str(asked.q.qname).rstrip("."), asked.q.qtype
        except (dnslib.DNSError, IndexError):
            return None
        reply = asked.reply()
        match question:
            case name, dnslib.QTYPE.SRV if name in self.engines:
                if now - self.heard[name] > LATE_S:
                    return None
                for it in self.engines[name]:
                    reply.add_answer(_record(name, dnslib.QTYPE.SRV, dnslib.SRV(0, 1, it.port, it.target)))
                for target in dict.fromkeys(it.target for it in self.engines[name]):
                    reply.add_ar(_record(target, dnslib.QTYPE.A, dnslib.A(target.replace("-", "."))))
                if not self.engines[name]:
                    reply.header.rcode = dnslib.RCODE.NXDOMAIN
            case name, dnslib.QTYPE.A if any(it.target == name for known in self.engines.values() for it in known):
                reply.add_answer(_record(name, dnslib.QTYPE.A, dnslib.A(name.replace("-", "."))))
            case name, dnslib.QTYPE.SRV if name not in self.engines:
                return None
            case _:
                reply.header.rcode = dnslib.RCODE.NXDOMAIN
        return bytes(reply.pack())


def _record(name: str, kind: int, data: Any) -> Any:
    return dnslib.RR(name, kind, rdata=data, ttl=TTL_S)


def discover(cloud: Any, namespace: str, service: str) -> tuple[Engine, ...]:
    """All engines that are registered in a service.

    Args:
        cloud: a boto3 client of `servicediscovery`.
        namespace: as `prod.internal`.
        service: as `_chat._tcp`.
    """
    found = cloud.discover_instances(NamespaceName=namespace, ServiceName=service, MaxResults=MOST, HealthStatus="ALL")[
        "Instances"
    ]
    return tuple(sorted({Engine(it["Attributes"][ADDRESS], int(it["Attributes"][PORT])) for it in found}))


def look(book: Book, clients: Any, services: Mapping[str, tuple[str, str]]) -> None:
    """Ask Cloud Map for every service once; what fails is asked again the next time, by a new client."""
    for name, (namespace, service) in services.items():
        try:
            engines = discover(clients["servicediscovery"], namespace, service)
        except Exception as error:  # noqa: BLE001 - boto3's, of many kinds
            log.warning("Cloud Map does not say who is %s: %s", name, error)
            clients.forget()
        else:
            book.hear(name, engines, time.monotonic())


def watch(
    book: Book, clients: Any, services: Mapping[str, tuple[str, str]], sleep: Callable[[float], None]
) -> NoReturn:
    """Look for ever."""
    while True:
        look(book, clients, services)
        sleep(LOOK_S)


def respond(book: Book, listener: socket.socket) -> NoReturn:
    """Answer for ever."""
    while True:
        query, client = listener.recvfrom(QUERY_BYTES)
        if answer := book.answer(query, time.monotonic()):
            listener.sendto(answer, client)


def names(file: Path) -> NoReturn:
    """Run what `file` describes."""
    from fleet_agent.cloud import Clients  # noqa: PLC0415 - only machines of AWS have boto3

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
    settings = json.loads(file.read_text(encoding="utf-8"))
    clients = Clients(settings["region"], connect_timeout=1, read_timeout=2, retries={"total_max_attempts": 1})
    services = {name: (namespace, service) for name, (namespace, service) in settings["services"].items()}
    book = Book()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        host, _, port = settings["listen"].rpartition(":")
        listener.bind((host, int(port)))
        threading.Thread(target=watch, args=(book, clients, services, time.sleep), daemon=True).start()
        respond(book, listener)
