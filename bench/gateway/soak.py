"""Mixed load at 80 % of what the engines can do, while engines are killed, hang and drain and the gateway is reloaded.

    toolchain/run python -m bench.gateway.soak [--minutes 10] [--proxy haproxy]

The gateway is the real one, rendered from a plan; engines are the fake one, a process each; the node agent is a stub of
its /ready, which knows what the real one finds out: whether the process lives, is stopped, or is being drained. Exit
code 1 if anything fails but what was in flight on an engine when that was killed. Which engine a request was at is read
from the gateway's access log, by the request's id.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web

if not __package__:  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.gateway.engine import Pace
from bench.gateway.gateways import (
    KEY,
    Cores,
    Missing,
    Running,
    Scene,
    end_in_order,
    launch,
    plan_of,
    render,
    start_engines,
    write,
)
from bench.gateway.load import percentile
from bench.gateway.report import machine, table
from infra.paths import NODECONFIG
from infra.plan.model import FleetPlan

ENGINES = {"haproxy": {"chat": 6, "code": 6}, "nginx": {"chat": 12}}
"""By model. With one of six away, the load is 96 % of what the others can do: it fits, and queues are used. nginx reads
no body, so it has one model."""
PACE = Pace(slots=8, prompt_ms=60, token_ms=10)
LOAD = 0.8
EVENT_S = 5
"""Between two events: the fleet recovers from one before the next."""
RESTART_S = 2
"""From the death of an engine until it is back: vLLM takes longer, but then there are more engines too."""
HANG_S = 4
OUT_S = 2
"""An engine that the agent calls draining gets nothing new after so long."""
PATIENCE_S = 120
IN_TIME_S = 30
NOWHERE = "nowhere"
DISCONNECTED = "ServerDisconnectedError"
NOTICED_S = 0.5
"""From the death of an engine until its clients know."""
SLACK_S = 0.05
"""Clocks of two processes, and a request that the gateway passes on while the engine dies."""


@dataclass(frozen=True)
class Kind:
    """Requests of one kind."""

    name: str
    share: float
    tokens: int
    body_bytes: int = 1000
    stream: bool = True
    leaves: bool = False
    """The client goes away after the third token."""

    @property
    def slot_s(self) -> float:
        """How long it takes a slot of an engine."""
        tokens = 3 if self.leaves else self.tokens
        return (PACE.prompt_ms + tokens * PACE.token_ms) / 1000


KINDS = (
    Kind("stream", 0.5, 40),
    Kind("long stream", 0.05, 600),
    Kind("JSON", 0.25, 30, stream=False),
    Kind("large prompt", 0.15, 20, body_bytes=200_000),
    Kind("client leaves", 0.05, 200, leaves=True),
)


@dataclass
class Engine:
    """A process that is one engine, and what the agent says of it."""

    name: str
    core: int
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    draining: bool = False
    stopped: bool = False

    async def start(self) -> None:
        """Start, on the port that it had before."""
        running, ports = await asyncio.to_thread(start_engines, PACE, 1, self.core, [self.port] if self.port else [])
        self.process, self.port = running.process, ports[0]
        self.ready, self.draining, self.stopped = True, False, False

    def kill(self) -> None:
        """As kill -9 does."""
        assert self.process  # noqa: S101
        self.ready = False
        self.process.kill()
        self.process.wait(IN_TIME_S)

    def signal(self, number: signal.Signals) -> None:
        """Stop or continue it."""
        assert self.process  # noqa: S101
        self.stopped = number == signal.SIGSTOP
        self.process.send_signal(number)

    @property
    def status(self) -> int:
        """What the agent answers."""
        if not self.ready or self.stopped:
            return 503
        return 404 if self.draining else 200


@dataclass
class Outcome:
    """What became of one request."""

    number: int
    kind: Kind
    begun: float
    ended: float = 0
    first_s: float | None = None
    error: str = ""

    @property
    def request_id(self) -> str:
        """The header that is also in the access log."""
        return f"soak-{self.number}"


@dataclass
class Event:
    """Something that was done to the fleet."""

    kind: str
    at: float
    engine: str = ""
    until: float = 0


@dataclass
class Soak:
    """One run."""

    root: Path
    proxy: str
    cores: Cores
    dice: random.Random = field(default_factory=lambda: random.Random(1))  # noqa: S311 - a load, repeatable
    engines: dict[str, list[Engine]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    kills: list[tuple[Engine, float]] = field(default_factory=list)
    plan: FleetPlan | None = None
    gateway: Running | None = None
    problems: list[str] = field(default_factory=list)
    late_s: float = 0
    """By how much a request was sent too late at most. Then as many come at once as had been due meanwhile."""

    # The fleet.

    async def start(self) -> None:
        """Engines, agent, gateway."""
        self.engines = {
            model: [Engine(f"{model}-{number}", self.cores.engine) for number in range(count)]
            for model, count in ENGINES[self.proxy].items()
        }
        for engine in self.all():
            await engine.start()
        agent = web.Application()
        agent.router.add_get("/ready", self._ready)
        runner = web.AppRunner(agent, access_log=None)
        await runner.setup()
        site = web.SockSite(runner, listener := socket.create_server(("127.0.0.1", 0)))
        await site.start()
        ports = {model: [engine.port for engine in engines] for model, engines in self.engines.items()}
        scene = Scene(ports, listener.getsockname()[1], concurrency=PACE.slots)
        self.plan = plan_of(scene, self.proxy)
        self.gateway = await asyncio.to_thread(launch, self.plan, self.cores.gateway, self.root)

    def all(self) -> list[Engine]:
        """Every engine."""
        return list(itertools.chain(*self.engines.values()))

    async def _ready(self, request: web.Request) -> web.Response:
        found = re.search(r"port=(\d+)", request.headers.get("X-Haproxy-Server-State", ""))
        port = int(found[1]) if found else int(request.query.get("port", 0))
        return web.Response(status=next((e.status for e in self.all() if e.port == port), 503))

    def stop(self) -> None:
        """End everything."""
        for engine in self.all():
            if engine.process and engine.process.poll() is None:
                engine.kill()
        if self.gateway:
            self.gateway.stop()

    # The load.

    async def load(self, until: float) -> None:
        """Requests as they come, until then; then wait for the last."""
        mean = sum(kind.share * kind.slot_s for kind in KINDS)
        rates = {model: LOAD * count * PACE.slots / mean for model, count in ENGINES[self.proxy].items()}
        total = sum(rates.values())
        asking: set[asyncio.Task[None]] = set()
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            due = time.monotonic()
            while (due := due + self.dice.expovariate(total)) < until:
                await asyncio.sleep(max(due - time.monotonic(), 0))
                self.late_s = max(self.late_s, time.monotonic() - due)
                kind = self.dice.choices(KINDS, [kind.share for kind in KINDS])[0]
                model = self.dice.choices(list(rates), list(rates.values()))[0]
                outcome = Outcome(len(self.outcomes), kind, time.time())
                self.outcomes.append(outcome)
                task = asyncio.create_task(self._ask(session, model, outcome))
                asking.add(task)
                task.add_done_callback(asking.discard)
            await asyncio.gather(*asking)

    async def _ask(self, session: aiohttp.ClientSession, model: str, outcome: Outcome) -> None:
        kind = outcome.kind
        body = {
            "messages": [{"role": "user", "content": "word " * (kind.body_bytes // 5)}],
            "model": model,
            "max_tokens": kind.tokens,
        } | ({"stream": True} if kind.stream else {})
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": outcome.request_id}
        assert self.gateway  # noqa: S101
        url = f"http://127.0.0.1:{self.gateway.port}/v1/chat/completions"
        try:
            async with session.post(url, json=body, headers=headers) as answer:
                if answer.status != web.HTTPOk.status_code:
                    outcome.error = f"{answer.status} {(await answer.text())[:120]}"
                elif not kind.stream:
                    outcome.error = "" if "choices" in await answer.json() else "no answer"
                else:
                    await self._tokens(answer, outcome)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome.error = repr(error)[:120]
        outcome.ended = time.time()

    async def _tokens(self, answer: aiohttp.ClientResponse, outcome: Outcome) -> None:
        """Each token must come, and the end after them."""
        tokens, last = 0, b""
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            outcome.first_s = outcome.first_s or time.time() - outcome.begun
            tokens, last = tokens + line.startswith(b"data: {"), line
            if outcome.kind.leaves and tokens == 3:  # noqa: PLR2004 - see Kind.leaves
                answer.close()
                return
        if tokens != outcome.kind.tokens or not last.startswith(b"data: [DONE]"):
            outcome.error = f"{tokens} of {outcome.kind.tokens} tokens"

    # What happens to it.

    async def disturb(self, until: float) -> None:
        """One thing after the other, until then."""
        doings: list[Callable[[Event], Awaitable[None]]] = [
            self._kill,
            self._reload,
            self._hang,
            self._drain,
            self._reload,
            self._hang_and_kill,
        ]
        for doing in itertools.cycle(doings):
            await asyncio.sleep(EVENT_S)
            if time.monotonic() > until - EVENT_S:
                return
            engine = self.dice.choice(self.all())
            event = Event(doing.__name__.strip("_").replace("_", " "), time.time(), engine.name)
            self.events.append(event)
            await doing(event)
            event.until = time.time()
            print(f"· {event.kind} {event.engine}: {event.until - event.at:.1f} s", file=sys.stderr, flush=True)

    def _of(self, event: Event) -> Engine:
        return next(engine for engine in self.all() if engine.name == event.engine)

    async def _kill(self, event: Event) -> None:
        engine = self._of(event)
        self.kills.append((engine, time.time()))
        engine.kill()
        await asyncio.sleep(RESTART_S)
        await engine.start()

    async def _hang(self, event: Event) -> None:
        engine = self._of(event)
        engine.signal(signal.SIGSTOP)
        await asyncio.sleep(HANG_S)
        engine.signal(signal.SIGCONT)

    async def _hang_and_kill(self, event: Event) -> None:
        engine = self._of(event)
        engine.signal(signal.SIGSTOP)
        await asyncio.sleep(HANG_S)
        await self._kill(event)

    async def _drain(self, event: Event) -> None:
        """As an update does: nothing new, wait, stop, start."""
        engine = self._of(event)
        engine.draining = True
        await asyncio.sleep(OUT_S)
        deadline = time.monotonic() + IN_TIME_S
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"http://127.0.0.1:{engine.port}/running") as answer:
                    if await answer.json() == 0:
                        break
                if time.monotonic() > deadline:
                    self.problems.append(f"{engine.name} did not drain")
                    break
                await asyncio.sleep(0.2)
        engine.kill()
        await asyncio.sleep(RESTART_S)
        await engine.start()

    async def _reload(self, event: Event) -> None:
        """Another deadline for the queue, and another key."""
        event.engine = ""
        assert self.plan  # noqa: S101
        plan, number = self.plan, len(self.events)
        keys = (*(key for key in plan.gateway.keys if key[0] != "new"), ("new", f"{number:064x}"))
        self.plan = plan.model_copy(
            update={
                "gateway": plan.gateway.model_copy(update={"keys": keys}),
                "timings": plan.timings.model_copy(update={"queue_s": plan.timings.queue_s + (-1) ** number}),
            }
        )
        await asyncio.to_thread(self._take_up)

    def _take_up(self) -> None:
        """What the node's apply program does."""
        assert self.plan  # noqa: S101
        assert self.gateway  # noqa: S101
        write(render(self.plan, self.root), self.root)
        if self.proxy != "haproxy":
            for process in (*self.gateway.others, self.gateway.process):
                process.send_signal(signal.SIGHUP)
            return
        sys.path.append(str(NODECONFIG / "agent"))
        from fleet_agent import balancer  # noqa: PLC0415 - the agent's package is not on the path before

        run = self.root / "run"
        before = _worker(run)
        states = balancer.command(run, "show servers state")
        initial = (self.root / "slots/haproxy/servers.state").read_text(encoding="ascii")
        (run / balancer.STATE).write_text(balancer.merge_states(states, initial), encoding="ascii")
        for _ in range(3):
            self.gateway.process.send_signal(signal.SIGUSR2)
            deadline = time.monotonic() + IN_TIME_S / 3
            while time.monotonic() < deadline:
                if _worker(run) not in {"", before}:
                    return
                time.sleep(0.02)
        self.problems.append("a reload was not taken up")

    # What came of it.

    def judge(self) -> tuple[Counter[str], list[tuple[Outcome, str]]]:
        """How many of each kind were in flight on a killed engine when they failed, and what else failed, and where."""
        places: dict[str, str] = {}
        for line in (self.root / f"log/{self.proxy}.log").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                places[entry["id"]] = entry["engine"]
        excused: Counter[str] = Counter()
        lost: Counter[float] = Counter()
        others = []
        for outcome in self.outcomes:
            if not outcome.error:
                continue
            place = places.get(outcome.request_id, NOWHERE)
            at = next((at for engine, at in self.kills if _was_there(outcome, place, engine, at)), None)
            if at is None:
                others.append((outcome, place))
            else:
                excused[outcome.kind.name] += 1
                lost[at] += 1
        for engine, at in self.kills:
            if lost[at] > self._most(engine):
                self.problems.append(
                    f"{lost[at]} failed when {engine.name} was killed, which had at most {self._most(engine)}"
                )
        return excused, others

    def _most(self, engine: Engine) -> int:
        """Requests that the gateway has open there at most: twice what it gives, as a reload leaves an old worker."""
        assert self.plan  # noqa: S101
        model = self.plan.model(engine.name.rpartition("-")[0])
        slots = dict(self.plan.gateway.server_maxconn)[model.name]
        return 2 * (slots if self.proxy == "haproxy" else slots + model.queued)


def _was_there(outcome: Outcome, place: str, engine: Engine, at: float) -> bool:
    """Was it at this engine when that was killed?

    Where an engine dies that has not begun to answer, and the connection had been used before, HAProxy closes the
    client's connection too, so that the client may ask again, and logs nothing. Those are known by the moment.
    """
    if place == NOWHERE:
        return DISCONNECTED in outcome.error and outcome.begun <= at <= outcome.ended <= at + NOTICED_S
    here = place == engine.name or place.endswith(f":{engine.port}")
    return here and outcome.begun - SLACK_S <= at <= outcome.ended + SLACK_S


def _worker(run: Path) -> str:
    from fleet_agent import balancer  # noqa: PLC0415

    try:
        answer = balancer.command(run, "show info")
    except OSError:
        return ""
    return next((line.split()[1] for line in answer.splitlines() if line.startswith("Pid:")), "")


async def soak(run: Soak, minutes: float) -> None:
    """The whole of it."""
    try:
        await run.start()
        until = time.monotonic() + 60 * minutes
        await asyncio.gather(run.load(until), run.disturb(until))
    finally:
        run.stop()


def report(run: Soak) -> tuple[str, bool]:
    """The table, and whether all is well."""
    excused, others = run.judge()
    rows = []
    for kind in KINDS:
        mine = [outcome for outcome in run.outcomes if outcome.kind is kind]
        first = [outcome.first_s * 1000 for outcome in mine if outcome.first_s is not None]
        wrong = sum(outcome.kind is kind for outcome, _ in others)
        shares = [f"{percentile(first, share):,.0f}" if first else "-" for share in (0.5, 0.95, 0.99)]
        rows.append([kind.name, f"{len(mine):,}", *shares, str(excused[kind.name]), str(wrong)])
    total = [f"{len(run.outcomes):,}", "", "", "", str(excused.total()), str(len(others))]
    rows.append(["together", *total])
    head = ["requests", "", "first token ms, p50", "p95", "p99", "in flight on a killed engine", "failed otherwise"]
    happened = Counter(event.kind for event in run.events)
    lines = [
        ", ".join(f"{name} {value}" for name, value in machine().items()),
        table(head, rows),
        "events: " + ", ".join(f"{count} {kind}" for kind, count in happened.items()),
        f"the clients were late by {run.late_s:.2f} s at most",
    ]
    lines += [
        f"failed: {outcome.kind.name} at {place}, {outcome.begun - run.outcomes[0].begun:.2f} s after the start, "
        f"within {outcome.ended - outcome.begun:.2f} s: {outcome.error}"
        for outcome, place in others[:20]
    ]
    lines += run.problems
    return "\n\n".join(lines), not others and not run.problems and bool(run.outcomes)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--proxy", choices=("haproxy", "nginx"), default="haproxy")
    args = parser.parse_args()
    end_in_order()
    with tempfile.TemporaryDirectory(prefix="fleet-soak-") as folder:
        run = Soak(Path(folder), args.proxy, Cores.of_this_machine())
        try:
            asyncio.run(soak(run, args.minutes))
        except Missing as reason:
            print(f"{args.proxy}: {reason}")
            return 1
        said, well = report(run)
    print(said)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
