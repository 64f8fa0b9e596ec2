"""What the gateway promises of single requests, measured on the real proxies before fake engines.

    toolchain/run python -m bench.gateway.behaviour [--only leaves,tokens,overload,long] [--proxy haproxy,nginx]

leaves     a client goes away in mid-stream: when its engine knows of it
tokens     what the gateway adds to a token on its way, and whether tokens clump
overload   three times what the engines can do: how much of that they still do, and how the rest is refused
long       streams whose first token takes more than five minutes and whose last one comes after more than twenty

Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

if not __package__:  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.gateway.engine import Pace, chunk
from bench.gateway.gateways import KEY, Cores, Missing, Scene, end_in_order, start_engines, start_ours
from bench.gateway.load import percentile, request
from bench.gateway.report import machine, table

LEAVES = 200
LEAVES_MS = 50
"""From the end of the client's connection until the engine's is closed."""
TOKENS_S = 20
TOKEN_MS = 20
STREAMS = 16
ADDED_MS = 0.3
CLUMP_MS = 5
"""Tokens that come closer together than this, of an engine that sends one each 20 ms, have waited for each other."""
OVERLOAD_S = 30
OVERLOAD = 3
GOODPUT = 0.95
FIRST_TOKEN_S = 310
LONG_TOKENS = 1000
LONG_TOKEN_MS = 1000
LONG_STREAMS = 20
LONG_TIMINGS = {"server_s": 400, "client_s": 410, "longest_generation_s": 1400}
"""As the plan derives them for a model that may be silent for so long."""
Row = list[str]


@dataclass
class Bench:
    """Where it is measured, and what was found."""

    cores: Cores
    root: Path
    proxy: str
    rows: list[Row] = field(default_factory=list)
    missed: int = 0

    def found(self, what: str, measured: str, target: str, *, met: bool) -> None:
        """One line of the table."""
        self.missed += not met
        self.rows.append([self.proxy, what, measured, target, "met" if met else "MISSED"])

    def folder(self) -> Path:
        """A new one."""
        return self.root / f"{self.proxy}-{len(list(self.root.iterdir()))}"


class Listener:
    """An engine that says in each token when it was sent, and takes the time at which a client's connection ends."""

    def __init__(self, token_s: float) -> None:
        self.token_s = token_s
        self.ended: asyncio.Queue[float] = asyncio.Queue()
        self.port = 0

    async def start(self) -> asyncio.Server:
        """Listen on a free port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                length = next((int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
                body = json.loads(await reader.readexactly(length))
                if not body.get("stream"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                await self._stream(reader, writer)
                self.ended.put_nowait(time.perf_counter())
                return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        gone = asyncio.ensure_future(reader.read(1))  # nothing comes but the end
        while not gone.done():
            writer.write(chunk(b"data: %.6f\n\n" % time.perf_counter()))
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            await asyncio.wait([gone], timeout=self.token_s)
        with contextlib.suppress(ConnectionError):
            gone.result()


def leaves(bench: Bench) -> None:
    """When an engine knows that its client has gone."""

    async def measure() -> list[float]:
        engine = Listener(token_s=3600)
        server = await engine.start()
        running = await asyncio.to_thread(
            start_ours, Scene({"chat": [engine.port]}, engine.port), bench.cores.gateway, bench.folder(), bench.proxy
        )
        took = []
        try:
            for _ in range(LEAVES):
                reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(request("chat", key=KEY, stream=True))
                await reader.readuntil(b"data: ")
                gone = time.perf_counter()
                writer.close()
                took.append(1000 * (await asyncio.wait_for(engine.ended.get(), 30) - gone))
        finally:
            await asyncio.to_thread(running.stop)
            server.close()
        return took

    took = asyncio.run(measure())
    text = f"p50 {percentile(took, 0.5):.1f} ms, p99 {percentile(took, 0.99):.1f} ms, max {max(took):.1f} ms"
    bench.found(f"client leaves: engine knows, {LEAVES} times", text, f"≤ {LEAVES_MS} ms", met=max(took) <= LEAVES_MS)


def tokens(bench: Bench) -> None:
    """How long a token is on its way: directly and through the gateway, at the same time, from the same engine."""

    async def stream(port: int, arrived: list[float], late: list[float], begins_s: float, ends: float) -> None:
        await asyncio.sleep(begins_s)  # not in step: else each token would wait for those of all other streams
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("chat", key=KEY, stream=True))
        while time.monotonic() < ends:
            line = await reader.readuntil(b"\n\n")
            now = time.perf_counter()
            arrived.append(now)
            late.append(1000 * (now - float(line.rpartition(b"data: ")[2])))
        writer.close()

    async def measure() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        engine = Listener(token_s=TOKEN_MS / 1000)
        server = await engine.start()
        scene = Scene({"chat": [engine.port]}, engine.port)
        running = await asyncio.to_thread(start_ours, scene, bench.cores.gateway, bench.folder(), bench.proxy)
        late: dict[str, list[float]] = {"direct": [], "gateway": []}
        gaps: dict[str, list[float]] = {"direct": [], "gateway": []}
        try:
            ends = time.monotonic() + TOKENS_S
            streams = [(name, list[float]()) for name in late for _ in range(STREAMS)]
            ports = {"direct": engine.port, "gateway": running.port}
            begins = [TOKEN_MS / 1000 * number / len(streams) for number in range(len(streams))]
            random.Random(1).shuffle(begins)  # noqa: S311 - repeatable
            await asyncio.gather(
                *(
                    stream(ports[name], times, late[name], at, ends)
                    for (name, times), at in zip(streams, begins, strict=True)
                )
            )
            for name, times in streams:
                gaps[name] += [1000 * (after - before) for before, after in itertools.pairwise(times)]
        finally:
            await asyncio.to_thread(running.stop)
            server.close()
        return late, gaps

    late, gaps = asyncio.run(measure())
    medians = {name: percentile(each, 0.5) for name, each in late.items()}
    added = medians["gateway"] - medians["direct"]
    text = f"{added:+.3f} ms, to {medians['direct']:.3f} ms; {len(late['gateway'])} tokens of {STREAMS} streams"
    bench.found("a token, p50 added", text, f"≤ {ADDED_MS} ms", met=added <= ADDED_MS)
    clumps = {name: 100 * sum(gap < CLUMP_MS for gap in each) / len(each) for name, each in gaps.items()}
    text = f"{clumps['gateway']:.2f} % within {CLUMP_MS} ms, {clumps['direct']:.2f} % directly"
    bench.found("tokens that clump", text, "≤ 1 % more", met=clumps["gateway"] <= clumps["direct"] + 1)


def overload(bench: Bench) -> None:
    """Three times as much as the engines can do: they go on, and the rest is refused quickly."""
    pace = Pace(slots=8, prompt_ms=100, token_ms=10)
    answer_tokens, engines = 40, 4
    capacity = engines * pace.slots / (pace.prompt_ms + pace.token_ms * answer_tokens) * 1000

    async def ask(http: aiohttp.ClientSession, port: int, found: list[tuple[int, float, str]]) -> None:
        body = json.loads(request("chat", tokens=answer_tokens, stream=True).split(b"\r\n\r\n", 1)[1])
        since = time.perf_counter()
        url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
        async with http.post(url, json=body, headers=headers) as answer:
            await answer.read()
            found.append((answer.status, time.perf_counter() - since, answer.headers.get("Retry-After", "")))

    async def measure(port: int) -> tuple[list[tuple[int, float, str]], float]:
        found: list[tuple[int, float, str]] = []
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http,
            asyncio.TaskGroup() as tasks,
        ):
            begun = time.monotonic()
            for number in range(int(OVERLOAD * capacity * OVERLOAD_S)):
                await asyncio.sleep(max(0, begun + number / (OVERLOAD * capacity) - time.monotonic()))
                tasks.create_task(ask(http, port, found))
        return found, time.monotonic() - begun

    engine, ports = start_engines(pace, engines + 1, bench.cores.engine)
    try:
        scene = Scene({"chat": ports[:engines]}, ports[engines], concurrency=pace.slots, timings={"queue_s": 10})
        running = start_ours(scene, bench.cores.gateway, bench.folder(), bench.proxy)
        try:
            found, seconds = asyncio.run(measure(running.port))
        finally:
            running.stop()
    finally:
        engine.stop()
    statuses = Counter(status for status, _, _ in found)
    share = statuses[200] / seconds / capacity
    refused = [(took, after) for status, took, after in found if status == 503]  # noqa: PLR2004
    text = f"{100 * share:.1f} % of {capacity:.0f} a second; {dict(statuses)}"
    bench.found(f"goodput at {OVERLOAD} x capacity", text, f"≥ {100 * GOODPUT:.0f} %", met=share >= GOODPUT)
    slowest = percentile([took for took, _ in refused], 0.99)
    told = all(after for _, after in refused) and bool(refused)
    text = f"p50 {percentile([t for t, _ in refused], 0.5):.2f} s, p99 {slowest:.2f} s, Retry-After {told}"
    bench.found("refused with 503", text, "at the queue's deadline at the latest", met=told and slowest <= 11)  # noqa: PLR2004


def long(bench: Bench) -> None:
    """Streams that say nothing for five minutes, and then go on for a quarter of an hour."""
    pace = Pace(slots=2 * LONG_STREAMS, prompt_ms=1000 * FIRST_TOKEN_S, token_ms=LONG_TOKEN_MS)

    async def one(port: int) -> tuple[int, float, float]:
        body = json.loads(request("chat", tokens=LONG_TOKENS, stream=True).split(b"\r\n\r\n", 1)[1])
        since, first, count = time.monotonic(), 0.0, 0
        timeout = aiohttp.ClientTimeout(total=None)
        url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                http.post(url, json=body, headers=headers) as answer,
            ):
                async for line in answer.content:
                    first = first or time.monotonic() - since
                    count += line.startswith(b"data: {")
        except aiohttp.ClientError as error:
            print(f"a stream broke after {count} tokens: {error!r}", file=sys.stderr)
        return count, first, time.monotonic() - since

    async def measure(port: int) -> list[tuple[int, float, float]]:
        return list(await asyncio.gather(*(one(port) for _ in range(LONG_STREAMS))))

    # The engine is asked once before: with this pace that would take its time.
    quick, ports = start_engines(Pace(), 1, bench.cores.engine)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        slow_port = held.getsockname()[1]
    agent = ports[0]
    engine, _ = start_engines(Pace(), 1, bench.cores.engine, [slow_port])
    try:
        running = start_ours(
            Scene({"chat": [slow_port]}, agent, timings=LONG_TIMINGS), bench.cores.gateway, bench.folder(), bench.proxy
        )
        engine.stop()
        engine, _ = start_engines(pace, 1, bench.cores.engine, [slow_port])
        try:
            found = asyncio.run(measure(running.port))
        finally:
            running.stop()
    finally:
        engine.stop()
        quick.stop()
    whole = sum(count >= LONG_TOKENS for count, _, _ in found)
    first, last = min(first for _, first, _ in found), min(last for _, _, last in found)
    text = f"{whole} of {LONG_STREAMS} whole; first token after {first:.0f} s, last after {last / 60:.1f} min"
    bench.found("long streams", text, "all whole", met=whole == LONG_STREAMS and first > 300 and last > 1200)  # noqa: PLR2004


PARTS: dict[str, Callable[[Bench], None]] = {"leaves": leaves, "tokens": tokens, "overload": overload, "long": long}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--proxy", default="haproxy,nginx")
    args = parser.parse_args()
    end_in_order()
    facts: dict[str, Any] = machine() | {"date": time.strftime("%Y-%m-%d")}
    rows: list[Row] = []
    missed = 0
    for proxy in args.proxy.split(","):
        with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
            bench = Bench(Cores.of_this_machine(), Path(folder), proxy)
            for part in args.only.split(","):
                print(f"· {proxy}: {part}", file=sys.stderr, flush=True)
                try:
                    PARTS[part](bench)
                except Missing as reason:
                    print(f"{proxy}: {part}: {reason}", file=sys.stderr)
            rows += bench.rows
            missed += bench.missed
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(table(["proxy", "what", "measured", "target", ""], rows))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
