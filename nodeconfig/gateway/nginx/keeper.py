"""The keeper: does for nginx, on the gateway's machine, what nginx cannot do itself.

It listens on descriptor 0, a Unix socket that the process manager holds, and answers nginx and Prometheus:

GET /key      whether the key in Authorization is good for X-Fleet-Api and X-Fleet-Model. 204, with the key's name in
              X-Fleet-Key; 401; or 403 with the reason in X-Fleet-Verdict: `rpm` (and Retry-After) or `model`
GET /engines  run/engines.conf as it should be; 503 while there is no word of some engine yet
GET /health   200 while some engine is ready, 503 else
GET /metrics  for Prometheus

It asks the node's agent about each engine, writes run/engines.conf with those that are not ready marked as down, and
has nginx read it again. Settings: keeper.json, see infra/render/nginx.py. SIGHUP: they are read again, counts go on.
Of two such processes one works; the other waits for its lock. A key is in memory while it is looked at, nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SLOT, RUN = Path("slots/keeper"), Path("run")
ENGINES, WANTED, PID = RUN / "engines.conf", Path("slots/nginx/engines.conf"), RUN / "nginx.pid"
STARTED = "# So nginx started.\n"
"""Below the list that nginx has started with: it need not be told of it. launch.py writes it, too."""
MINUTE_S = 60.0
RELOAD_GAP_S = 0.5
"""Least time between two reloads: each leaves old workers behind until their streams have ended."""
HEAD_BYTES = 64 << 10
READY, DRAINING = 200, 404
NOT_READY = 503
NO_COUNT = "/v1/models"
"""Asking for the models is no request that a limit is about."""
BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)
SERVER = re.compile(r"^(\s*server \S+:(\d+) [^;]*?) down;", re.MULTILINE)

Answer = tuple[int, dict[str, str], str]
"""Status, headers, body."""


class Keys:
    """The keys, by SHA-256, and how often each was used in the last minute."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Any]] = {}
        self.used: dict[str, deque[float]] = {}
        self.verdicts: Counter[str] = Counter()

    def learn(self, keys: list[dict[str, Any]]) -> None:
        """Take these for the keys. What those that stay have used counts on."""
        self.known = {key["sha256"]: key for key in keys}
        names = {key["name"] for key in keys}
        self.used = {name: used for name, used in self.used.items() if name in names}

    def ask(self, authorization: str, api: str, model: str, now: float, day: str) -> Answer:
        """Whether the bearer of a key may do that. `now` is monotonic, in seconds; `day` is today in UTC."""
        verdict, answer = self._judge(authorization, api, model, now, day)
        self.verdicts[verdict] += 1
        return answer

    def _judge(self, authorization: str, api: str, model: str, now: float, day: str) -> tuple[str, Answer]:
        bearer = BEARER.fullmatch(authorization)
        key = self.known.get(hashlib.sha256(bearer[1].encode()).hexdigest()) if bearer else None
        if key is None or (key["expires"] and day > key["expires"]):
            return "unknown", (401, {"X-Fleet-Verdict": "unknown"}, "")
        own = {"X-Fleet-Key": key["name"]}
        if api == NO_COUNT:
            return "good", (204, own | {"X-Fleet-Verdict": "good"}, "")
        if key["models"] is not None and model not in key["models"]:
            return "model", (403, own | {"X-Fleet-Verdict": "model"}, "")
        if key["rpm"] is not None:
            used = self.used.setdefault(key["name"], deque())
            while used and used[0] <= now - MINUTE_S:
                used.popleft()
            if len(used) >= key["rpm"]:
                wait = math.ceil(used[len(used) - key["rpm"]] + MINUTE_S - now)
                return "rpm", (403, own | {"X-Fleet-Verdict": "rpm", "Retry-After": str(max(1, wait))}, "")
            used.append(now)
        return "good", (204, own | {"X-Fleet-Verdict": "good"}, "")


@dataclass
class Engine:
    """What the agent says of one engine."""

    name: str
    model: str
    port: int
    ready: bool = False
    asked: bool = False
    """Whether there was any word of it; before, nothing is changed about it."""
    good: int = 0
    bad: int = 0

    def heard(self, status: int, rise: int, fall: int) -> bool:
        """Take note of an answer, 0 for none. True: it changes whether requests may go there."""
        before = (self.ready, self.asked)
        self.good = self.good + 1 if status == READY else 0
        self.bad = 0 if status == READY else self.bad + 1
        if self.good >= rise:
            self.ready, self.asked = True, True
        elif status == DRAINING or self.bad >= fall:
            self.ready, self.asked = False, True
        return (self.ready, self.asked) != before


@dataclass
class Keeper:
    """The process."""

    keys: Keys = field(default_factory=Keys)
    settings: dict[str, Any] = field(default_factory=dict)
    engines: dict[int, Engine] = field(default_factory=dict)
    """By port."""
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    reloads: int = 0

    def learn(self) -> None:
        """Read the settings again. An engine that stays is known as it was."""
        self.settings = json.loads((SLOT / "keeper.json").read_text(encoding="utf-8"))
        self.keys.learn(self.settings["keys"])
        wanted = {row["port"]: Engine(row["name"], row["model"], row["port"]) for row in self.settings["engines"]}
        for port in [port for port in self.engines if self._other(port, wanted)]:
            self.tasks.pop(port).cancel()
            del self.engines[port]
        for port in wanted.keys() - self.engines.keys():
            self.engines[port] = wanted[port]
            self.tasks[port] = asyncio.create_task(self._watch(wanted[port]))
        self.changed.set()

    def _other(self, port: int, wanted: dict[int, Engine]) -> bool:
        return port not in wanted or wanted[port].name != self.engines[port].name

    # Readiness.

    async def _watch(self, engine: Engine) -> None:
        """Ask the agent about one engine, for ever."""
        agent = Agent()
        while True:
            settings = self.settings
            status = await agent.ask(settings["agent_port"], engine.port, settings["check_timeout_ms"] / 1000)
            if engine.heard(status, settings["check_rise"], settings["check_fall"]):
                self.changed.set()
            steady = engine.asked and engine.ready == (status == READY)
            await asyncio.sleep(settings["check_ms" if steady else "check_fast_ms"] / 1000)

    def rotation(self, text: str) -> str:
        """The engines for nginx, from the list in which all of them are down."""
        ready = " ".join(sorted(engine.name for engine in self.engines.values() if engine.ready))
        text = text.replace('default "";', f'default "{ready}";', 1)
        return SERVER.sub(lambda row: f"{row[1]};" if self._takes(int(row[2])) else row[0], text)

    def _knows(self) -> bool:
        return all(engine.asked for engine in self.engines.values())

    def _takes(self, port: int) -> bool:
        engine = self.engines.get(port)
        return engine is not None and engine.ready

    async def keep(self) -> None:
        """Let nginx have what is wanted, for ever: after a change, a start of nginx, a mishap with the file."""
        told: tuple[int, str] | None = None
        while True:
            self.changed.clear()
            before = told
            if self._knows():
                with contextlib.suppress(OSError):  # a slot that is being moved: it is there in a moment
                    told = self._tell(told)
            if told != before:
                await asyncio.sleep(RELOAD_GAP_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), self.settings["check_ms"] / 1000)

    def _tell(self, told: tuple[int, str] | None) -> tuple[int, str] | None:
        nginx = master()
        if nginx is None:  # one that starts asks by itself
            return told
        if told is None or told[0] != nginx.pid:
            end_leftovers(nginx)
        wanted = self.rotation(WANTED.read_text(encoding="utf-8"))
        written = ENGINES.read_text(encoding="utf-8") if ENGINES.exists() else ""
        if written == wanted + STARTED:
            return nginx.pid, wanted
        if written != wanted:
            fresh = ENGINES.with_suffix(".new")
            fresh.write_text(wanted, encoding="utf-8")
            fresh.replace(ENGINES)
        if told == (nginx.pid, wanted):
            return told
        nginx.send_signal(signal.SIGHUP)
        self.reloads += 1
        return nginx.pid, wanted

    # Answering.

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        """The answer to a request."""
        if path == "/key":
            day = time.strftime("%Y-%m-%d", time.gmtime())
            asked = [headers.get(name, "") for name in ("authorization", "x-fleet-api", "x-fleet-model")]
            return self.keys.ask(asked[0], asked[1], asked[2], time.monotonic(), day)
        if path == "/engines":
            return (
                (200, {}, self.rotation(WANTED.read_text(encoding="utf-8"))) if self._knows() else (NOT_READY, {}, "")
            )
        if path == "/health":
            return (200 if any(engine.ready for engine in self.engines.values()) else NOT_READY), {}, ""
        if path == "/metrics":
            return 200, {"Content-Type": "text/plain; version=0.0.4"}, self.metrics()
        return 404, {}, ""

    def metrics(self) -> str:
        """For Prometheus. Names of engines and models need no quoting: see infra/config/strict.py."""
        ready = [
            f'fleet_gateway_engine_ready{{engine="{engine.name}",model="{engine.model}"}} {int(engine.ready)}'
            for engine in self.engines.values()
        ]
        keys = [
            f'fleet_gateway_keys_total{{verdict="{verdict}"}} {count}'
            for verdict, count in sorted(self.keys.verdicts.items())
        ]
        return "\n".join(
            [
                "# HELP fleet_gateway_engine_ready Whether the gateway sends requests to an engine",
                "# TYPE fleet_gateway_engine_ready gauge",
                *ready,
                "# HELP fleet_gateway_keys_total Requests by what the keeper said of their key",
                "# TYPE fleet_gateway_keys_total counter",
                *keys,
                "# HELP fleet_gateway_reloads_total How often nginx was told of other engines",
                "# TYPE fleet_gateway_reloads_total counter",
                f"fleet_gateway_reloads_total {self.reloads}",
                "",
            ]
        )


def master() -> psutil.Process | None:
    """The main process of nginx on this machine, once it listens to signals."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(PID.read_text(encoding="ascii")))
        if process.name().startswith("nginx") and process.cwd() == str(Path.cwd()):
            return process
    return None


def end_leftovers(nginx: psutil.Process) -> None:
    """Have workers go that a killed main process has left behind, now that another one listens. They finish streams."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.name().startswith("nginx") and process.cwd() == str(Path.cwd())
            if ours and nginx.pid not in {process.pid, process.ppid()}:
                process.send_signal(signal.SIGQUIT)


class Agent:
    """A connection to the node's agent that is kept."""

    def __init__(self) -> None:
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, port: int, engine: int, timeout_s: float) -> int:
        """What it says of the engine on that port: 200, 404, 503; 0 if it does not answer in time."""
        kept = self.streams is not None
        try:
            async with asyncio.timeout(timeout_s):
                status = await self._ask(port, engine)
                if status == 0 and kept:  # it had closed the kept connection
                    status = await self._ask(port, engine)
        except TimeoutError:
            status = 0
        if status == 0:
            self._close()
        return status

    async def _ask(self, port: int, engine: int) -> int:
        try:
            if self.streams is None:
                self.streams = await asyncio.open_connection("127.0.0.1", port)
            reader, writer = self.streams
            writer.write(f"GET /ready?port={engine} HTTP/1.1\r\nHost: agent\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = re.search(r"\r\ncontent-length: *(\d+)\r\n", head)
            await reader.readexactly(int(length[1]) if length else 0)
            if "\r\nconnection: close" in head:
                self._close()
            return int(head.split(" ", 2)[1])
        except (OSError, ValueError, IndexError, EOFError, asyncio.LimitOverrunError):
            self._close()
            return 0

    def _close(self) -> None:
        if self.streams:
            self.streams[1].close()
        self.streams = None


class Connection(asyncio.Protocol):
    """One of nginx's connections: requests without bodies, one after the other."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.head = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where answers go."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer what has arrived whole."""
        assert self.transport  # noqa: S101 - for the type checker
        self.head += data
        while b"\r\n\r\n" in self.head:
            head, _, self.head = self.head.partition(b"\r\n\r\n")
            self.transport.write(self._answer(head.decode("latin-1")))
            if b"\r\nConnection: close" in head:
                self.transport.close()
        if len(self.head) > HEAD_BYTES:
            self.transport.close()

    def _answer(self, head: str) -> bytes:
        first, *rows = head.split("\r\n")
        pairs = (row.partition(":") for row in rows)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        status, own, body = self.keeper.answer(first.split(" ")[1] if first.count(" ") else "", headers)
        length = {} if status == 204 else {"Content-Length": str(len(body.encode()))}  # noqa: PLR2004
        lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in (own | length).items())]
        return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def own_code() -> bytes:
    """This file as it is now."""
    return Path(__file__).read_bytes()


async def work() -> None:
    """Keep until SIGTERM."""
    keeper, ended = Keeper(), asyncio.Event()
    loop = asyncio.get_running_loop()
    code = own_code()

    def again() -> None:
        if own_code() != code:
            os.set_inheritable(0, True)  # noqa: FBT003 - the standard library's own signature
            os.execv(sys.executable, [sys.executable, __file__])  # noqa: S606
        keeper.learn()

    loop.add_signal_handler(signal.SIGHUP, again)
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    keeper.learn()
    listening = socket.socket(fileno=os.dup(0))
    server = await loop.create_unix_server(lambda: Connection(keeper), sock=listening)
    keeping = asyncio.create_task(keeper.keep())
    await ended.wait()
    keeping.cancel()
    server.close()


def main() -> None:
    """Wait until this process is the one that works, and work."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # whoever waits reads the settings when its turn comes
    with (RUN / "keeper.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        asyncio.run(work())


if __name__ == "__main__":
    main()
