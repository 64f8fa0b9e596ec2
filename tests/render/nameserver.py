"""A nameserver on loopback that says of engines what a test has set."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

A, SRV, IN = 1, 33, 1
NXDOMAIN = 3


@dataclass
class Nameserver:
    """Answers over UDP: SRV records with one target name for each engine, and where that is (127.0.0.1)."""

    records: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By name: (port, weight) of each engine."""
    asked: Counter[str] = field(default_factory=Counter)
    silent: bool = False
    """Hears, and says nothing."""

    def __enter__(self) -> Self:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self.socket.getsockname())
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.socket.getsockname())
        self.thread.join(30)
        self.socket.close()

    def _serve(self) -> None:
        while True:
            query, client = self.socket.recvfrom(4096)
            if not query:
                return
            name, end = _read_name(query, 12)
            (kind,) = struct.unpack_from(">H", query, end)
            self.asked[name] += 1
            if not self.silent:
                self.socket.sendto(self._answer(query, name, end + 4, kind), client)

    def _answer(self, query: bytes, name: str, end: int, kind: int) -> bytes:
        answers, more = list(self._records(name, kind)), []
        if kind == SRV:
            more = [
                _record(f"engine-{port}.test", A, socket.inet_aton("127.0.0.1"))
                for port, _ in self.records.get(name, ())
            ]
        flags = 0x8400 | (0 if answers else NXDOMAIN)
        header = query[:2] + struct.pack(">HHHHH", flags, 1, len(answers), 0, len(more))
        return header + query[12:end] + b"".join(answers + more)

    def _records(self, name: str, kind: int) -> Iterator[bytes]:
        if kind == A and name.startswith("engine-"):
            yield _record(name, A, socket.inet_aton("127.0.0.1"))
        if kind == SRV:
            for port, weight in self.records.get(name, ()):
                yield _record(name, SRV, struct.pack(">HHH", 1, weight, port) + _name(f"engine-{port}.test"))


def _record(name: str, kind: int, data: bytes) -> bytes:
    return _name(name) + struct.pack(">HHIH", kind, IN, 1, len(data)) + data


def _name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def _read_name(message: bytes, at: int) -> tuple[str, int]:
    labels = []
    while length := message[at]:
        labels.append(message[at + 1 : at + 1 + length].decode())
        at += 1 + length
    return ".".join(labels), at + 1
