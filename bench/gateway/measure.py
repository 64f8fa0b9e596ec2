"""The measurements. The contenders take turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gateway.engine import Pace
from bench.gateway.gateways import KEY, Cores, Missing, Running, Scene, start_engines, start_ours, start_router
from bench.gateway.load import ClosedLoop, OneByOne, OpenLoop, Streams, arrivals, percentile, request

CLIENTS = 32
"""Connections of the closed loop."""
BODY_BYTES = 1024
STREAMS = 256
TOKEN_MS = 20
"""Of each of those streams; they begin at times of their own, so their tokens do not come in step."""
NEVER_MS = 86_400_000
"""Between two tokens of an idle stream."""
IDLE_STREAMS = 10_000
IDLE_ENGINES = 10
MANY = 64
SPARE_FILES = 600
"""Descriptors that a process needs beside those of the streams."""
SKEW = Pace(slots=16, prompt_ms=100, token_ms=20, speeds=(1, 1, 1, 0.5))
SKEW_TOKENS = 40
"""Of a mean answer: 0.9 s on a good engine."""
SKEW_LOAD = 0.9
"""Of what the engines can do together; a quarter of it is more than the slow one can do. At 0.8 and below, every policy
that looks at the load is at the floor, which is the slow engine's own 0.2 s, and there is nothing to compare."""
NO_LIMIT = 1024
"""Requests at one engine: so that round robin is what its name says. With a limit the gateway passes over full ones."""
PLAIN = "round-robin without a limit"
SESSIONS = 200
OUR_ROUTINGS = (PLAIN, "round-robin", "least-loaded", "prefix-affinity", "session")
ROUTER_POLICIES = ("round_robin", "power_of_two", "cache_aware", "consistent_hash", "sticky_least_loaded")
ROUTER_DEFAULT = "cache_aware"
ROUTER_NEAREST = "power_of_two"
"""Counts what is open at two engines and takes the lesser: what our default does, for two of them."""
ROUTER_CHEAPEST = "round_robin"
DIRECT = "direct"
PRIORITY = -15
"""Of everything here, where that is allowed: so that other work on the machine counts for less."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How long everything takes."""

    rounds: int = 7
    round_s: float = 2
    pairs: int = 2000
    streams_s: float = 5
    idle: int = IDLE_STREAMS
    skew_s: float = 40


QUICK = Size(rounds=3, round_s=1, pairs=300, streams_s=2, idle=1000, skew_s=15)


@dataclass
class Lab:
    """Where it is all done."""

    cores: Cores
    root: Path
    size: Size
    skipped: dict[str, str] = field(default_factory=dict)
    """What is not measured, and why."""
    skew_load: float = SKEW_LOAD
    count: int = 0

    def say(self, text: str) -> None:
        """Tell who waits."""
        print(f"· {text}", file=sys.stderr, flush=True)

    @contextmanager
    def running(self, starts: Mapping[str, Callable[[Path], Running]]) -> Iterator[dict[str, Running]]:
        """What can be started of these; the rest goes to `skipped`."""
        with ExitStack() as stack:
            found = {}
            for name, start in starts.items():
                self.count += 1
                try:
                    found[name] = start(self.root / str(self.count))
                except Missing as reason:
                    self.skipped[name] = str(reason)
                else:
                    stack.callback(found[name].stop)
            yield found

    @contextmanager
    def engines(self, pace: Pace, count: int) -> Iterator[tuple[Running, list[int]]]:
        """Fake engines; one port more than asked for stands for the agent, and is the last."""
        running, ports = start_engines(pace, count + 1, self.cores.engine)
        try:
            yield running, ports
        finally:
            running.stop()

    def ours(self, scene: Scene, proxy: str = "haproxy") -> Callable[[Path], Running]:
        """Our gateway, to be started."""
        return lambda root: start_ours(scene, self.cores.gateway, root, proxy)

    def router(self, ports: list[int], policy: str, log: str = "warning") -> Callable[[Path], Running]:
        """vllm-router, to be started."""
        return lambda root: start_router(ports, self.cores.gateway, root, policy, log)


def contenders(lab: Lab, ports: list[int]) -> dict[str, Callable[[Path], Running]]:
    """All that are compared by cost."""
    agent = ports[-1]
    three = Scene({"chat": ports[:1], "code": ports[1:2], "embed": ports[2:3]}, agent)
    one = Scene({"chat": ports[:1]}, agent)
    many = Scene({"chat": ports[:MANY]}, agent, concurrency=64)
    ours = {
        f"{proxy}, {what}": lab.ours(scene, proxy)
        for proxy in ("haproxy", "nginx")
        for what, scene in {"3 models": three, "1 model": one, "64 engines": many}.items()
    }
    routers = {
        "vllm-router, as it comes": lab.router(ports[:1], ROUTER_DEFAULT, "info"),
        "vllm-router, nearest to ours": lab.router(ports[:2], ROUTER_NEAREST, "info"),
        "vllm-router, cheapest": lab.router(ports[:1], ROUTER_CHEAPEST),
        "vllm-router, 64 engines": lab.router(ports[:MANY], ROUTER_CHEAPEST),
    }
    return ours | routers


def cost(lab: Lab, subjects: Mapping[str, Running], engine: Running, direct: int) -> dict[str, Row]:
    """CPU time of the gateway for a request that is answered at once, and requests a second."""
    own = {DIRECT: Running(engine.process, direct), **subjects}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in own}
    failed = dict.fromkeys(own, 0)
    for number in range(lab.size.rounds):
        lab.say(f"CPU per request, round {number + 1} of {lab.size.rounds}")
        for name, subject in own.items():
            loop = ClosedLoop(subject.port, CLIENTS, subject.requests(body_bytes=BODY_BYTES))
            loop.run(lab.size.round_s / 5)
            since, before = time.monotonic(), subject.cpu_s()
            done = loop.run(lab.size.round_s)
            used, passed = subject.cpu_s() - before, time.monotonic() - since
            failed[name] += loop.failed
            loop.close()
            if done:
                found[name].append((used / done, done / passed, used / passed))
    return {
        name: {
            "us_per_request": statistics.median(round_[0] for round_ in rounds) * 1e6,
            "spread_us": (max(r[0] for r in rounds) - min(r[0] for r in rounds)) * 1e6,
            "rps": max(round_[1] for round_ in rounds),
            "core_busy": max(rounds, key=lambda round_: round_[1])[2],
            "failed": failed[name],
        }
        for name, rounds in found.items()
        if rounds
    }


def first_token(lab: Lab, subjects: Mapping[str, Running], direct: int) -> dict[str, Row]:
    """What each adds to the time to the first token: asked in turn, beside a direct request of the same moment."""
    lab.say("time to the first token")
    more: dict[str, Any] = {"tokens": 4, "stream": True, "body_bytes": BODY_BYTES}
    clients = {name: OneByOne(one.port, one.requests(**more)[0]) for name, one in subjects.items()}
    straight = OneByOne(direct, request(**more))
    added: dict[str, list[float]] = {name: [] for name in clients}
    plain: list[float] = []
    order = list(clients)
    dice = random.Random(1)  # noqa: S311 - an order
    for _ in range(lab.size.pairs):
        dice.shuffle(order)
        for name in order:
            base = straight.first_token_s()
            plain.append(base)
            added[name].append(clients[name].first_token_s() - base)
    for client in (straight, *clients.values()):
        client.close()
    rows = {DIRECT: {"p50_ms": percentile(plain, 0.5) * 1e3, "p99_ms": percentile(plain, 0.99) * 1e3}}
    return rows | {
        name: {"added_p50_ms": percentile(values, 0.5) * 1e3, "added_p99_ms": percentile(values, 0.99) * 1e3}
        for name, values in added.items()
    }


def tokens(lab: Lab, subjects: Mapping[str, Running]) -> dict[str, Row]:
    """CPU time for each token of streams that come at a pace."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    rows: dict[str, Row] = {}
    for number in range(max(lab.size.rounds // 2, 1)):
        lab.say(f"CPU per streamed token, round {number + 1}")
        for name, subject in subjects.items():
            data = subject.requests(tokens=1_000_000, stream=True, token_ms=TOKEN_MS)[0]
            streams = Streams(subject.port, data)
            for _ in range(STREAMS // 8):
                streams.add(8)
                streams.run(0.01)
            streams.run(30, STREAMS)
            streams.tokens, before = 0, subject.cpu_s()
            passed = streams.run(lab.size.streams_s)
            used = subject.cpu_s() - before
            if streams.tokens:
                found[name].append(used / streams.tokens)
                rows[name] = {"tokens_per_s": streams.tokens / passed, "broken": streams.broken}
            streams.close()
    return {
        name: {"us_per_token": statistics.median(values) * 1e6, **rows[name]}
        for name, values in found.items()
        if values
    }


def memory(lab: Lab) -> dict[str, Row]:
    """Memory of the gateway while so many streams are open that say nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * lab.size.idle + SPARE_FILES  # the gateway has two connections for each stream
    for limit in (wanted, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, soft), max(limit, hard)))
        except (ValueError, OSError):
            continue
        break
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = min(lab.size.idle, (allowed - SPARE_FILES) // 2)
    if count < IDLE_STREAMS:
        reason = f"{allowed} descriptors a process" if count < lab.size.idle else "--quick"
        lab.skipped[f"{IDLE_STREAMS} idle streams"] = f"{count} measured, and scaled: {reason}"
    rows: dict[str, Row] = {}
    each = -(-count // IDLE_ENGINES)
    with lab.engines(Pace(), IDLE_ENGINES) as (_, ports):
        agent = ports.pop()
        scene = Scene({"chat": ports}, agent, concurrency=min(each + 24, 1024), maxconn=count + SPARE_FILES // 8)
        starts = {
            "haproxy": lab.ours(scene),
            "nginx": lab.ours(scene, "nginx"),
            "vllm-router": lab.router(ports, ROUTER_CHEAPEST),
        }
        for name, start in starts.items():
            lab.say(f"memory at {count} idle streams: {name}")
            with lab.running({name: start}) as found:
                if name not in found:
                    continue
                subject = found[name]
                before = subject.memory_bytes()
                data = subject.requests(tokens=10, stream=True, token_ms=NEVER_MS, body_bytes=BODY_BYTES)[0]
                streams = Streams(subject.port, data)
                for number in range(0, count, 100):
                    streams.add(min(100, count - number))
                    streams.run(5, number + 50)
                streams.run(30, count)
                begun = len(streams.begun)
                rows[name] = {
                    "streams": begun,
                    "broken": streams.broken,
                    "idle_mib": before / 2**20,
                    "mib": subject.memory_bytes() / 2**20,
                    "kib_per_stream": (subject.memory_bytes() - before) / 1024 / max(begun, 1),
                }
                rows[name]["mib_at_10000"] = rows[name]["kib_per_stream"] * IDLE_STREAMS / 1024 + before / 2**20
                streams.close()
    return rows


def skew(lab: Lab) -> dict[str, Row]:
    """Time to the first token where one of four engines is half as fast, for each way of choosing an engine."""
    service_s = (SKEW.prompt_ms + SKEW_TOKENS * SKEW.token_ms) / 1000
    rate = lab.skew_load * sum(SKEW.speeds) * SKEW.slots / service_s
    load = arrivals(rate, lab.size.skew_s, SKEW_TOKENS, SESSIONS)
    kinds = [*((proxy, routing) for proxy in ("haproxy", "nginx") for routing in OUR_ROUTINGS)]
    kinds += [("vllm-router", policy) for policy in ROUTER_POLICIES]
    rows: dict[str, Row] = {}
    for kind, policy in kinds:
        name = f"{kind}, {policy}"
        if kind in lab.skipped:
            lab.skipped[name] = lab.skipped[kind]
            continue
        with lab.engines(SKEW, len(SKEW.speeds)) as (_, ports):
            agent = ports.pop()
            slots, routing = (NO_LIMIT, "round-robin") if policy == PLAIN else (SKEW.slots, policy)
            scene = Scene({"chat": ports}, agent, concurrency=slots, routing=routing)
            start = lab.router(ports, policy) if kind == "vllm-router" else lab.ours(scene, kind)
            lab.say(f"{lab.size.skew_s:g} s with a slow engine: {name}")
            with lab.running({name: start}) as found:
                for subject in found.values():
                    client = OpenLoop(subject.port, KEY)
                    client.run(load, 4 * lab.size.skew_s)
                    rows[name] = {
                        "p50_ms": percentile(client.first, 0.5) * 1e3,
                        "p95_ms": percentile(client.first, 0.95) * 1e3,
                        "p99_ms": percentile(client.first, 0.99) * 1e3,
                        "requests": len(load),
                        "failed": client.failed,
                    }
    return rows


PARTS = ("cost", "first-token", "tokens", "memory", "skew")


def everything(lab: Lab, wanted: Collection[str] = PARTS) -> dict[str, dict[str, Row]]:
    """All that is wanted, by measurement."""
    os.sched_setaffinity(0, {lab.cores.client})
    with suppress(PermissionError):
        os.nice(PRIORITY)  # and all that is started from here
    found: dict[str, dict[str, Row]] = {}
    if {"cost", "first-token", "tokens"} & set(wanted):
        with lab.engines(Pace(), MANY) as (engine, ports):
            lab.say("starting the contenders")
            with lab.running(contenders(lab, ports)) as subjects:
                few = {name: one for name, one in subjects.items() if "64" not in name}
                if "cost" in wanted:
                    found["cost"] = cost(lab, subjects, engine, ports[0])
                if "first-token" in wanted:
                    found["first-token"] = first_token(lab, few, ports[0])
                if "tokens" in wanted:
                    found["tokens"] = tokens(lab, few)
    if "memory" in wanted:
        found["memory"] = memory(lab)
    if "skew" in wanted:
        found["skew"] = skew(lab)
    return found
