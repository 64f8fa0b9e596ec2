"""Clients that cost little themselves: raw epoll, requests made beforehand, no more parsing than is needed."""

from __future__ import annotations

import contextlib
import json
import random
import re
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
READ_BYTES = 1 << 18
PATIENCE_S = 30


def request(  # noqa: PLR0913 - what a request is made of
    model: str = "chat",
    *,
    key: str = "",
    body_bytes: int = 1024,
    tokens: int = 16,
    stream: bool = False,
    session: str = "",
    token_ms: int | None = None,
) -> bytes:
    """A chat completion, in the order in which the OpenAI SDK writes it: `messages` before `model`.

    `token_ms` goes to the fake engine, in the field `seed`.
    """
    head = f"Conversation {session}. " if session else ""
    body: dict[str, object] = {
        "messages": [{"role": "user", "content": ""}],
        "model": model,
        "max_tokens": tokens,
        "temperature": 0.7,
    }
    body |= {"stream": True} if stream else {}
    body |= {} if token_ms is None else {"seed": token_ms}
    text = (head + "word " * (body_bytes // 5 + 1))[: max(body_bytes - len(json.dumps(body)), len(head))]
    body["messages"] = [{"role": "user", "content": text}]
    data = json.dumps(body)
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: llm.example.com",
        "Accept: application/json",
        "Content-Type: application/json",
        "User-Agent: AsyncOpenAI/Python 2.8.1",
        f"Content-Length: {len(data)}",
        *([f"Authorization: Bearer {key}"] if key else []),
        *([f"X-Session-Id: {session}"] if session else []),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n" + data).encode()


def complete(data: bytes) -> bool:
    """Is this a whole answer?"""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return False
    length = LENGTH.search(data, 0, head + 2)
    if length:
        return len(data) >= head + 4 + int(length[1])
    return data.endswith(b"0\r\n\r\n")


def closes(data: bytes) -> bool:
    """Is the connection at its end with this answer?"""
    return CLOSES.search(data, 0, data.find(b"\r\n\r\n") + 2) is not None


def good(data: bytes) -> bool:
    """Is it a 200?"""
    return data[9:12] == b"200"


def connect(port: int) -> socket.socket:
    """A connection to loopback that does not wait."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(0)
    return connection


class ClosedLoop:
    """Connections of which each asks again as soon as it is answered."""

    def __init__(self, port: int, connections: int, requests: Sequence[bytes]) -> None:
        self.poll = select.epoll()
        self.port = port
        self.open: dict[int, tuple[socket.socket, bytes]] = {}
        self.buffers: dict[int, bytes] = {}
        self.failed = 0
        for number in range(connections):
            self._add(requests[number % len(requests)])

    def _add(self, data: bytes) -> None:
        connection = connect(self.port)
        self.open[connection.fileno()] = connection, data
        self.poll.register(connection.fileno(), select.EPOLLIN)
        connection.send(data)

    def run(self, seconds: float) -> int:
        """Answers within so many seconds. May be called again: the connections stay."""
        done = 0
        deadline = time.monotonic() + seconds
        is_open, buffers, poll = self.open, self.buffers, self.poll.poll
        while time.monotonic() < deadline:
            for descriptor, _ in poll(0.1):
                connection, data = is_open[descriptor]
                try:
                    answer = connection.recv(READ_BYTES)
                except OSError:
                    answer = b""
                if not answer:
                    self.failed += 1
                    self._again(descriptor)
                    continue
                if descriptor in buffers:
                    answer = buffers.pop(descriptor) + answer
                if not complete(answer):
                    buffers[descriptor] = answer
                    continue
                if good(answer):
                    done += 1
                else:
                    self.failed += 1
                if closes(answer):
                    self._again(descriptor)
                    continue
                try:
                    connection.send(data)
                except OSError:
                    self.failed += 1
                    self._again(descriptor)
        return done

    def _again(self, descriptor: int) -> None:
        """Ask on a new connection."""
        connection, data = self.open.pop(descriptor)
        self.buffers.pop(descriptor, None)
        connection.close()
        self._add(data)

    def close(self) -> None:
        """End all of them."""
        for connection, _ in self.open.values():
            connection.close()
        self.poll.close()


class Streams:
    """Streams that stay open. Counts their tokens."""

    def __init__(self, port: int, data: bytes) -> None:
        self.poll = select.epoll()
        self.port = port
        self.data = data
        self.open: dict[int, socket.socket] = {}
        self.begun: set[int] = set()
        self.tokens = 0
        self.broken = 0

    def add(self, count: int) -> None:
        """Open more."""
        for _ in range(count):
            connection = connect(self.port)
            self.open[connection.fileno()] = connection
            self.poll.register(connection.fileno(), select.EPOLLIN)
            connection.send(self.data)

    def run(self, seconds: float, until_begun: int | None = None) -> float:
        """Read for so long, or until so many streams have had a token. Returns how long it was."""
        since = time.monotonic()
        while (now := time.monotonic()) < since + seconds:
            if until_begun is not None and len(self.begun) >= until_begun:
                break
            for descriptor, _ in self.poll.poll(0.05):
                try:
                    data = self.open[descriptor].recv(READ_BYTES)
                except OSError:
                    data = b""
                if not data:
                    self.broken += 1
                    self.open.pop(descriptor).close()
                    continue
                if tokens := data.count(b"data: "):
                    self.tokens += tokens
                    self.begun.add(descriptor)
        return now - since

    def close(self) -> None:
        """End all of them."""
        for connection in self.open.values():
            connection.close()
        self.poll.close()


class OneByOne:
    """One request at a time, on one connection while it lasts: for the time to the first token."""

    def __init__(self, port: int, data: bytes) -> None:
        self.port, self.data = port, data
        self.connection: socket.socket | None = None
        self.first_token_s()

    def first_token_s(self) -> float:
        """Seconds to the first token, with a new connection if the last answer ended the old one.

        Raises:
            ConnectionError: There was no stream.
        """
        begun = time.perf_counter()
        if self.connection is None:
            self.connection = connect(self.port)
            self.connection.settimeout(PATIENCE_S)
        self.connection.sendall(self.data)
        answer = self._until(self.connection, b"data: ", b"")
        first = time.perf_counter() - begun
        answer = self._until(self.connection, b"\r\n0\r\n\r\n", answer)
        if closes(answer):
            self.close()
        return first

    def _until(self, connection: socket.socket, mark: bytes, answer: bytes) -> bytes:
        while mark not in answer:
            data = connection.recv(READ_BYTES)
            if not data:
                raise ConnectionResetError(f"port {self.port} gives no stream: {answer[:200]!r}")
            answer += data
        return answer

    def close(self) -> None:
        """End the connection."""
        if self.connection:
            self.connection.close()
        self.connection = None


@dataclass(frozen=True)
class Arrival:
    """A request of an open loop."""

    at_s: float
    session: int
    tokens: int


def arrivals(rate: float, seconds: float, tokens: int, sessions: int, seed: int = 1) -> list[Arrival]:
    """Poisson arrivals; answers of 10 to `2 * tokens - 10` tokens; sessions by Zipf's law, exponent 1."""
    dice = random.Random(seed)  # noqa: S311 - a load, repeatable
    weights = [1 / (rank + 1) for rank in range(sessions)]
    at, found = 0.0, []
    while (at := at + dice.expovariate(rate)) < seconds:
        session = dice.choices(range(sessions), weights)[0]
        found.append(Arrival(at, session, dice.randint(10, 2 * tokens - 10)))
    return found


@dataclass
class OpenLoop:
    """Requests that come when they come, each on a connection that is free or on a new one."""

    port: int
    key: str
    model: str = "chat"
    first: list[float] = field(default_factory=list)
    """Seconds from when a request was due to its first token."""
    failed: int = 0

    def run(self, load: Sequence[Arrival], patience_s: float) -> None:
        """Send all, and wait for the answers."""
        bodies = [
            request(self.model, key=self.key, tokens=one.tokens, stream=True, session=f"session-{one.session:04}")
            for one in load
        ]
        poll, idle = select.epoll(), list[socket.socket]()
        busy: dict[int, tuple[socket.socket, float, bool, bytes]] = {}
        start, number = time.monotonic(), 0
        while (number < len(load) or busy) and time.monotonic() - start < load[-1].at_s + patience_s:
            now = time.monotonic() - start
            while number < len(load) and load[number].at_s <= now:
                connection = self._free(idle, poll)
                connection.send(bodies[number])
                busy[connection.fileno()] = connection, load[number].at_s, False, b""
                number += 1
            pause = load[number].at_s - now if number < len(load) else 0.1
            for descriptor, _ in poll.poll(max(pause, 0)):
                self._read(descriptor, busy, idle, start)
        self.failed += len(busy) + len(load) - number
        for connection in [*idle, *(one[0] for one in busy.values())]:
            connection.close()
        poll.close()

    def _free(self, idle: list[socket.socket], poll: select.epoll) -> socket.socket:
        while idle:
            connection = idle.pop()
            with contextlib.suppress(BlockingIOError):
                connection.recv(1)  # something or the end: not to be used again
                connection.close()
                continue
            return connection
        connection = connect(self.port)
        poll.register(connection.fileno(), select.EPOLLIN)
        return connection

    def _read(
        self,
        descriptor: int,
        busy: dict[int, tuple[socket.socket, float, bool, bytes]],
        idle: list[socket.socket],
        start: float,
    ) -> None:
        if descriptor not in busy:
            return  # an idle one was closed: seen when it is taken
        connection, due, begun, answer = busy[descriptor]
        try:
            data = connection.recv(READ_BYTES)
        except OSError:
            data = b""
        answer += data
        if not data or (answer.find(b"\r\n\r\n") > 0 and not good(answer)):
            del busy[descriptor]
            connection.close()
            self.failed += 1
            return
        if not begun and b"data: " in answer:
            begun = True
            self.first.append(time.monotonic() - start - due)
        if complete(answer):
            del busy[descriptor]
            if closes(answer):
                connection.close()
            else:
                idle.append(connection)
        else:
            busy[descriptor] = connection, due, begun, answer


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share is not above."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")
