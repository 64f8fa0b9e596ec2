"""The front of the fleet: the load balancer that carries bytes, and clients that come through it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self
from unittest import mock

from hosts.balancer import Balancers

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LOCAL = SIGNATURE + b"\x20\x00\x00\x00"
"""PROXY, version 2, of a connection that the balancer makes for itself: a check."""
PATIENCE_S = 60
"""Of a client."""
Place = tuple[str, int]


class Front(Balancers):  # type: ignore[misc]  # hosts has no types
    """The load balancer with the PROXY header, which that of `hosts` does not write: its one target group wants it."""

    def __enter__(self) -> Self:
        self._changed = mock.patch.multiple("hosts.balancer", relay_to=relay_to, HTTPConnection=Check)
        self._changed.start()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._changed.stop()


class Check(http.client.HTTPConnection):
    """A health check."""

    def connect(self) -> None:
        super().connect()
        self.sock.sendall(LOCAL)


def header(client: Place, balancer: Place) -> bytes:
    """PROXY, version 2, of a client's connection over IPv4."""
    addresses = b"".join(ipaddress.IPv4Address(host).packed for host, _ in (client, balancer))
    ports = b"".join(port.to_bytes(2, "big") for _, port in (client, balancer))
    return SIGNATURE + b"\x21\x11\x00\x0c" + addresses + ports


def relay_to(target: Callable[[], Place | None]) -> Callable[..., Any]:
    """As that of `hosts`, with the header first."""

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 18):
            sink.write(data)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            if place := target():
                there, back = await asyncio.open_connection(*place)
                with contextlib.closing(back):
                    back.write(header(writer.get_extra_info("peername")[:2], writer.get_extra_info("sockname")[:2]))
                    await asyncio.gather(pump(reader, back), pump(there, writer))

    return relay


@dataclass
class Answer:
    """What a client got."""

    status: int
    body: bytes

    @property
    def whole(self) -> bool:
        """A stream that ended as it should."""
        return self.status == http.HTTPStatus.OK and self.body.rstrip().endswith(b"data: [DONE]")


def ask(host: str, key: str, body: dict[str, Any], patience_s: float = PATIENCE_S) -> Answer:
    """One request, over a connection of its own."""
    connection = http.client.HTTPConnection(host, 80, timeout=patience_s)
    sent = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "Connection": "close"}
    got, status = bytearray(), 0
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), sent)
        answer = connection.getresponse()
        status = answer.status
        for part in parts(answer):
            got += part
    except (OSError, http.client.HTTPException) as error:
        return Answer(status, bytes(got) + f"\n{error!r}".encode())
    finally:
        connection.close()
    return Answer(status, bytes(got))


def parts(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """What comes, as it comes."""
    while part := answer.read1(65536):
        yield part


@dataclass
class Load:
    """Clients that ask all the time; what each got."""

    ask: Callable[[], Answer]
    clients: int = 2
    answers: list[Answer] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def _run(self) -> None:
        while not self._over.is_set():
            self.answers.append(self.ask())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.whole]
