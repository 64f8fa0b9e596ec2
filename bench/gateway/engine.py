"""A fast fake engine: one process, raw epoll, answers made beforehand; vLLM's manners where asked for.

    python bench/gateway/engine.py '{"ports": [0, 0], "slots": 16, "prompt_ms": 100, "speeds": [1, 0.5]}'

It prints the ports that it listens on as a JSON list, then serves until it is killed. It needs nothing but Python. Any
GET is answered 200, so that one of its ports can stand for the node agent too; `/running` with the number of requests.
A POST is answered at once where `slots` is 0, else as an engine with so many slots does: what does not fit waits in
order, the first token comes `prompt_ms` after the request began to run, each further one `token_ms` later, all divided
by the port's own speed. A request may ask for another `token_ms` by its `seed`, a field that every router passes on.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import re
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
TOKENS = re.compile(rb'"max_tokens": ?(\d+)')
SEED = re.compile(rb'"seed": ?(\d+)')
STREAM = re.compile(rb'"stream": ?true')
REQUEST_BYTES = 1 << 20
BACKLOG = 4096


def http(body: bytes, kind: str = "application/json") -> bytes:
    """A whole answer."""
    head = f"HTTP/1.1 200 OK\r\nServer: uvicorn\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    """One piece of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


ANSWER = http(
    json.dumps(
        {
            "id": "chatcmpl-0123456789abcdef0123456789abcdef",
            "object": "chat.completion",
            "created": 1764000000,
            "model": "chat",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "word " * 60},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 1155, "total_tokens": 1215, "completion_tokens": 60},
        }
    ).encode()
)
NOTHING = http(b'{"object":"list","data":[{"id":"chat","object":"model","created":0,"owned_by":"vllm"}]}')
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: uvicorn\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
TOKEN = chunk(
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1764000000,'
    b'"model":"chat","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
STREAM_END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@dataclass
class Pace:
    """How the engine behaves. Milliseconds."""

    slots: int = 0
    """Requests that one port runs at once; 0: any number, at once."""
    prompt_ms: float = 0
    token_ms: float = 0
    speeds: Sequence[float] = ()
    """By port; 1 where there is none."""


class Port:
    """What is one engine to the gateway."""

    def __init__(self, slots: int, speed: float) -> None:
        self.slots = slots
        self.speed = speed
        self.running = 0
        self.waiting: deque[Connection] = deque()


@dataclass(eq=False)
class Connection:
    """A client's connection, and the request that runs on it."""

    socket: socket.socket
    port: Port
    buffer: bytes = b""
    tokens: int = 0
    """That are still to come."""
    token_ms: float = 0
    stream: bool = False
    begun: bool = False
    """Its headers are sent."""
    busy: bool = False
    """It takes a slot."""
    closed: bool = False
    run: int = 0
    """Counts its requests, so that timers of an earlier one are known."""


@dataclass
class Engine:
    """All ports of one process."""

    pace: Pace
    poll: select.epoll = field(default_factory=select.epoll)
    listeners: dict[int, tuple[socket.socket, Port]] = field(default_factory=dict)
    connections: dict[int, Connection] = field(default_factory=dict)
    timers: list[tuple[float, int, Connection, int]] = field(default_factory=list)
    count: int = 0
    lost: int = 0
    """Connections that were closed because their reader did not keep up."""

    def listen(self, port: int) -> int:
        """Add a port, 0 for a free one. The number that it got."""
        number = len(self.listeners)
        speed = self.pace.speeds[number] if number < len(self.pace.speeds) else 1
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(BACKLOG)
        listener.settimeout(0)
        self.listeners[listener.fileno()] = listener, Port(self.pace.slots, speed)
        self.poll.register(listener.fileno(), select.EPOLLIN)
        return int(listener.getsockname()[1])

    def serve(self) -> None:
        """Until the process is killed."""
        while True:
            self._due()
            timeout = max(self.timers[0][0] - time.monotonic(), 0) if self.timers else -1
            for descriptor, _ in self.poll.poll(timeout):
                connection = self.connections.get(descriptor)
                if connection is not None:
                    self._read(connection)
                elif descriptor in self.listeners:
                    self._accept(*self.listeners[descriptor])

    def _accept(self, listener: socket.socket, port: Port) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                connection.settimeout(0)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections[connection.fileno()] = Connection(connection, port)
                self.poll.register(connection.fileno(), select.EPOLLIN)

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        data = connection.buffer + data if connection.buffer else data
        head = data.find(b"\r\n\r\n") + 4
        length = LENGTH.search(data, 0, head) if head > 4 else None  # noqa: PLR2004 - the blank line itself
        end = head + int(length[1]) if length else head
        if head < 4 or len(data) < end:  # noqa: PLR2004
            connection.buffer = data
            return
        connection.buffer = data[end:]
        self._answer(connection, data)

    def _answer(self, connection: Connection, request: bytes) -> None:
        if not request.startswith(b"POST"):
            port = connection.port
            running = request.startswith(b"GET /running")
            self._send(connection, http(b"%d" % (port.running + len(port.waiting))) if running else NOTHING)
            return
        connection.stream = STREAM.search(request) is not None
        if not self.pace.slots and not connection.stream:
            self._send(connection, ANSWER)
            return
        tokens = TOKENS.search(request)
        connection.tokens = int(tokens[1]) if tokens else 16
        seed = SEED.search(request)
        connection.token_ms = int(seed[1]) if seed else self.pace.token_ms
        connection.begun = False
        connection.run += 1
        if self.pace.slots and connection.port.running >= self.pace.slots:
            connection.port.waiting.append(connection)
        else:
            self._start(connection)

    def _start(self, connection: Connection) -> None:
        connection.busy = True
        connection.port.running += 1
        if not self.pace.prompt_ms:
            self._token(connection, time.monotonic())
            return
        tokens = 0 if connection.stream else connection.tokens
        self._later(connection, time.monotonic(), self.pace.prompt_ms + tokens * connection.token_ms)

    def _later(self, connection: Connection, since: float, delay_ms: float) -> None:
        self.count += 1
        due = since + delay_ms / 1000 / connection.port.speed
        heapq.heappush(self.timers, (due, self.count, connection, connection.run))

    def _due(self) -> None:
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            due, _, connection, run = heapq.heappop(self.timers)
            if not connection.closed and connection.run == run:
                self._token(connection, due)

    def _token(self, connection: Connection, due: float) -> None:
        if not connection.stream:
            self._send(connection, ANSWER)
            self._finish(connection)
            return
        if not connection.begun:
            connection.begun = True
            self._send(connection, STREAM_HEAD)  # by itself, as vLLM's does
        self._send(connection, TOKEN)
        connection.tokens -= 1
        if connection.tokens <= 0:
            self._send(connection, STREAM_END)
            self._finish(connection)
        elif connection.token_ms:
            self._later(connection, due, connection.token_ms)
        else:
            self._token(connection, due)

    def _send(self, connection: Connection, data: bytes) -> None:
        if connection.closed:
            return
        try:
            sent = connection.socket.send(data)
        except OSError:
            sent = 0
        if sent != len(data):
            self.lost += 1
            self._close(connection)

    def _finish(self, connection: Connection) -> None:
        if not connection.busy:
            return
        connection.busy = False
        port = connection.port
        port.running -= 1
        while port.waiting and port.running < port.slots:
            following = port.waiting.popleft()
            if not following.closed:
                self._start(following)

    def _close(self, connection: Connection) -> None:
        connection.closed = True
        self.connections.pop(connection.socket.fileno(), None)
        connection.socket.close()
        self._finish(connection)


def main() -> None:
    """Serve what the first argument says."""
    settings = json.loads(sys.argv[1])
    engine = Engine(Pace(**{name: value for name, value in settings.items() if name != "ports"}))
    print(json.dumps([engine.listen(port) for port in settings["ports"]]), flush=True)
    engine.serve()


if __name__ == "__main__":
    main()
