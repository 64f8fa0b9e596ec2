"""What stands behind the gateway in these tests: an engine that does as the client says, and a node agent."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from aiohttp import web

T = TypeVar("T")

DO = "X-Fake"
"""Request header that tells the engine what to do: `stream N`, `hold`, `die`, or a status."""


class Loop:
    """An event loop in a thread of its own, for tests that block."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.loop.close()


@dataclass
class Server:
    """An aiohttp server on a port that it keeps when it stops and starts again."""

    loop: Loop
    port: int = 0
    runner: web.AppRunner | None = None

    def handler(self) -> web.Application:
        raise NotImplementedError

    def start(self) -> Self:
        self.loop.run(self._start())
        return self

    def stop(self) -> None:
        """End as a killed process does: at once, connections and all."""
        self.loop.run(self._stop())

    async def _start(self) -> None:
        # A body that the gateway let through is never the fake's to refuse.
        self.runner = web.AppRunner(self.handler(), handler_cancellation=True, access_log=None, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _stop(self) -> None:
        if self.runner is None:
            return
        if self.runner.server is not None:
            for connection in self.runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
        await self.runner.cleanup()
        self.runner = None


@dataclass
class Seen:
    """A request as it reached an engine."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]


@dataclass
class FakeEngine(Server):
    """An engine whose answers wait for the test, never for the clock."""

    name: str = ""
    seen: list[Seen] = field(default_factory=list)
    open: int = 0
    aborted: int = 0
    most_open: int = 0
    full: bool = False
    """Refuse admission with 503, as an engine does whose own queue is full."""

    def handler(self) -> web.Application:
        self.permits = asyncio.Semaphore(0)
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{tail:.*}", self._answer)
        return app

    def permit(self, count: int = 1) -> None:
        """Let one more chunk, or one more held answer, go out."""

        def release() -> None:
            for _ in range(count):
                self.permits.release()

        self.loop.loop.call_soon_threadsafe(release)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            body = await request.read()
            headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in request.raw_headers]
            self.seen.append(Seen(request.method, request.raw_path, headers, body))
            return await self._do(request, request.headers.get(DO, ""))
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.open -= 1

    async def _do(self, request: web.Request, order: str) -> web.StreamResponse:
        if self.full:
            return web.json_response({"error": {"message": "the engine's queue is full"}}, status=503)
        if order == "die":
            assert request.transport
            request.transport.abort()
        if order == "hold":
            await self.permits.acquire()
        if order.isdecimal():
            return web.json_response({"error": {"message": f"engine {self.name}"}}, status=int(order))
        if order.startswith("stream"):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for n in range(int(order.split()[1])):
                await self.permits.acquire()
                await response.write(f"data: {n} {self.name}\n\n".encode())
            await response.write_eof()
            return response
        return web.json_response({"engine": self.name}, headers={"Server": "fake"})


@dataclass
class FakeAgent(Server):
    """A node agent: what it says of each engine is what the test has set."""

    status: dict[int, int] = field(default_factory=dict)
    """By engine port: 200 ready, 404 draining, 503 not ready."""
    asked: Counter[int] = field(default_factory=Counter)
    headers: list[str] = field(default_factory=list)

    def handler(self) -> web.Application:
        self.awake = asyncio.Event()
        self.awake.set()
        app = web.Application()
        app.router.add_get("/ready", self._ready)
        return app

    def sleep(self) -> None:
        """As after a crash: the process manager's socket takes connections, nobody answers them."""
        self.loop.loop.call_soon_threadsafe(self.awake.clear)

    def wake(self) -> None:
        self.loop.loop.call_soon_threadsafe(self.awake.set)

    async def _ready(self, request: web.Request) -> web.Response:
        # HAProxy says which engine is meant in a header, the keeper of nginx in the query.
        state = request.headers.get("X-Haproxy-Server-State") or f"; port={request.query['port']};"
        self.headers.append(state)
        match = re.search(r"; port=(\d+);", state)
        assert match, state
        port = int(match[1])
        self.asked[port] += 1
        await self.awake.wait()
        return web.Response(status=self.status.get(port, 503), text=json.dumps({"port": port}))
