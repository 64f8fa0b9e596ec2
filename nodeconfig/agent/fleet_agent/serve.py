"""The agent's process: watches the engines of one machine and answers gateways, Prometheus and `fleet`.

GET  /ready             for gateways; the engine is named by the port in HAProxy's X-Haproxy-Server-State header
GET  /engines           everything known, as JSON
POST /drain?engine=N    no new requests; `drained` in /engines tells when nothing is left
POST /undrain?engine=N
POST /expect?engine=N   a start on purpose follows: it is no crash, and earlier crashes are forgotten
GET  /metrics           for Prometheus
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import psutil
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from fleet_agent.engine import STATES, Engine, Identity, Probe, Sample
from fleet_agent.machine import Machine
from fleet_agent.supervise import LIVE, Supervisor, running

LOOK_S = 0.5
"""How often the process manager and the slots are looked at."""
SAMPLE_S = 0.5
GUARD_S = 0.05
"""How often it is looked whether all of an engine's own processes live."""
OWN_PROCESS = "VLLM::"
"""How vLLM names the processes that it cannot do without; it starts passing ones, too."""
RETRY_S = 1.0
STOOD_S = 5.0
"""Between two looks: then this process, and most likely the machine, stood still meanwhile."""
log = logging.getLogger("fleet_agent")

SAMPLES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:generation_tokens_total": "generation",
    "vllm:prompt_tokens_total": "prompt",
}
SAMPLE_LINE = re.compile(r"^(vllm:\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", re.MULTILINE)


def read_sample(text: str) -> Sample:
    """Sum up, over an engine's own labels, the few metrics that matter here."""
    totals = dict.fromkeys(SAMPLES.values(), 0.0)
    for name, value in SAMPLE_LINE.findall(text):
        if name in SAMPLES:
            totals[SAMPLES[name]] += float(value)
    return Sample(
        running=int(totals["running"]),
        waiting=int(totals["waiting"]),
        generation_tokens=int(totals["generation"]),
        progress=int(totals["generation"] + totals["prompt"]),
    )


class Agent:
    """The agent of one machine. `settings` is agent.json: see infra/render/engine.py."""

    def __init__(self, machine: Machine, settings: dict[str, Any], http: aiohttp.ClientSession) -> None:
        self.machine = machine
        self.settings = settings
        self.supervisor = Supervisor(machine)
        self.engines: dict[str, Engine] = {}
        self.looked = time.monotonic()
        self.tasks: dict[str, list[asyncio.Task[None]]] = {}
        self.family: dict[str, list[psutil.Process]] = {}
        self.parts: dict[str, set[psutil.Process]] = {}
        self.http = http

    # Watching.

    async def watch(self) -> None:
        """Follow the slots and the process manager for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except Exception:  # the agent must outlive whatever it looks at
                log.exception("looking at the machine failed")

    async def look(self) -> None:
        """See which engines there are, and which processes run them; restart the hopeless."""
        self._find_engines()
        identities = await asyncio.to_thread(self._identities)
        if identities is None:  # no word from the process manager: what was known stays true
            return
        now, wall = time.monotonic(), time.time()
        stood, self.looked = now - self.looked, now
        for engine in self.engines.values():
            if stood > STOOD_S:
                engine.stood(stood)
            if engine.sees(identities.get(engine.name), now, wall, self.settings["crash_loop_window_s"]):
                log.info("%s: process %s", engine.name, engine.identity and engine.identity[0])
                self.parts.pop(engine.name, None)
                self._remember(engine)
            elif engine.latched:
                own = [process for process in self.family.get(engine.name, []) if _is_part(process)]
                self.parts.setdefault(engine.name, set()).update(own)
            reason = engine.hopeless(now, self.settings["wedged_s"], self.settings["start_s"])
            if reason and engine.identity:
                engine.wedged += 1
                engine.started = engine.moved = engine.probed_ok = now  # once is enough until the new process is seen
                self._end(engine, reason)

    def _end(self, engine: Engine, reason: str) -> None:
        """Kill every process of an engine; the process manager starts it again."""
        engine.last_error = reason
        log.error("%s: %s: restarting it", engine.name, reason)
        if engine.identity:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.identity[0], signal.SIGKILL)

    async def guard(self) -> None:
        """End an engine of which a part has died, for ever.

        Its server would answer 500 for a second before it gives up; one that is gone is a refused connection, and the
        gateway sends the request to another engine.
        """
        while True:
            await asyncio.sleep(GUARD_S)
            for engine in list(self.engines.values()):
                if any(not running(process) for process in self.parts.get(engine.name, ())):
                    self.parts.pop(engine.name)
                    states = {row.state for row in await asyncio.to_thread(self.supervisor.of, engine.name)}
                    # One that is told to stop ends its parts itself, and may be gone by now.
                    if states & {"STARTING", "RUNNING"}:
                        engine.probed("refused", time.monotonic())
                        self._end(engine, "one of its processes died")

    def _find_engines(self) -> None:
        found = {
            name: file
            for name in self.machine.occupied()
            if (file := self.machine.slots / name / "engine.json").is_file()
        }
        for name in self.engines.keys() - found.keys():
            for task in self.tasks.pop(name):
                task.cancel()
            del self.engines[name]
        for name, file in found.items():
            bundle = file.resolve().parents[2].name
            if name not in self.engines:
                settings = json.loads(file.read_text(encoding="utf-8"))
                self.engines[name] = self._recall(Engine(name, settings, bundle, expected=True))
                self.tasks[name] = [
                    asyncio.create_task(work(self.engines[name])) for work in (self._probe, self._sample, self._warm)
                ]
            elif self.engines[name].bundle != bundle:
                engine = self.engines[name]
                engine.settings, engine.bundle = json.loads(file.read_text(encoding="utf-8")), bundle

    def _identities(self) -> dict[str, Identity] | None:
        """Who runs each engine now; also looks up each engine's family of processes when it is a new one."""
        processes = self.supervisor.processes()
        if not processes:
            return None
        found: dict[str, Identity] = {}
        for row in processes:
            if row.state in (*LIVE, "STOPPING") and row.pid and row.program in self.engines:
                with contextlib.suppress(psutil.Error):
                    leader = psutil.Process(row.pid)
                    found[row.program] = (row.pid, leader.create_time())
                    self.family[row.program] = [leader, *leader.children(recursive=True)]
        return found

    def _frozen(self, name: str) -> bool:
        for process in self.family.get(name, []):
            with contextlib.suppress(psutil.Error):
                if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                    return True
        return False

    async def _probe(self, engine: Engine) -> None:
        while True:
            probe: Probe = "refused"
            if engine.identity:
                try:
                    async with self.http.get(f"http://127.0.0.1:{engine.port}/health") as answer:
                        probe = "ok" if answer.status == web.HTTPOk.status_code else "refused"
                except TimeoutError:
                    probe = "slow"
                except aiohttp.ClientError:
                    pass
            engine.stopped_process = self._frozen(engine.name)
            engine.probed(probe, time.monotonic())
            await asyncio.sleep(self.settings["poll_ms"] / 1000)

    async def _sample(self, engine: Engine) -> None:
        while True:
            if engine.probe == "ok":
                with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                    async with self.http.get(f"http://127.0.0.1:{engine.port}/metrics") as answer:
                        engine.sampled(read_sample(await answer.text()), time.monotonic())
            await asyncio.sleep(SAMPLE_S)

    # Warming.

    async def _warm(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(self.settings["poll_ms"] / 1000)
            if engine.latched or engine.probe != "ok" or engine.identity is None:
                continue
            identity, begun = engine.identity, time.monotonic()
            try:
                for step in engine.settings["warmup"]:
                    await asyncio.gather(*(self._complete(engine, step) for _ in range(step["parallel"])))
            except (TimeoutError, aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
                engine.last_error = f"warm-up: {error or type(error).__name__}"
                log.warning("%s: %s", engine.name, engine.last_error)
                await asyncio.sleep(RETRY_S)
                continue
            if engine.identity == identity:
                now = time.monotonic()
                engine.warmup_s = now - begun
                engine.latched, engine.last_error, engine.moved = True, "", now
                log.info("%s: ready, warmed in %.1f s", engine.name, engine.warmup_s)
                self._remember(engine)

    async def _complete(self, engine: Engine, step: dict[str, Any]) -> None:
        """One real completion; anything but text that was generated raises."""
        url = f"http://127.0.0.1:{engine.port}{step['path']}"
        timeout = aiohttp.ClientTimeout(total=self.settings["warmup_request_s"])
        async with self.http.post(url, json=step["body"], timeout=timeout) as answer:
            body = await answer.text()
            if answer.status != web.HTTPOk.status_code:
                raise ValueError(f"{step['path']} answered {answer.status}: {body[:200]}")
            if json.loads(body)["usage"]["completion_tokens"] < 1:
                raise ValueError(f"{step['path']} generated nothing")

    # What outlives a restart of the agent.

    def _file(self, engine: Engine) -> Path:
        return self.machine.run / f"{engine.name}.state.json"

    def _remember(self, engine: Engine) -> None:
        kept = {
            "identity": engine.identity,
            "latched": engine.latched,
            "draining": engine.draining,
            "crashes": engine.crashes,
            "starts": engine.starts,
            "wedged": engine.wedged,
            "warmup_s": engine.warmup_s,
            "expected": engine.expected,
        }
        file = self._file(engine)
        fresh = file.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(kept), encoding="utf-8")
            fresh.replace(file)
        except OSError as error:  # a full disk must not take a serving engine out
            log.warning("cannot keep the state of %s: %s", engine.name, error)

    def _recall(self, engine: Engine) -> Engine:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._file(engine).read_text(encoding="utf-8"))
            engine.identity = tuple(kept["identity"]) if kept["identity"] else None
            engine.latched, engine.crashes = kept["latched"], kept["crashes"]
            engine.starts, engine.wedged, engine.warmup_s = kept["starts"], kept["wedged"], kept["warmup_s"]
            engine.expected = kept["expected"]
            engine.started = engine.moved = engine.probed_ok = time.monotonic()
            if engine.latched and engine.identity and _lives(engine.identity):
                engine.probe = "ok"  # as far as anyone knows: a gateway may ask before the first probe is back
            if kept["draining"]:
                engine.drain(time.monotonic())
        return engine

    # Answering.

    def routes(self) -> list[web.RouteDef]:
        """What the agent answers."""
        return [
            web.get("/ready", self._ready),
            web.get("/engines", self._engines),
            web.post("/drain", self._drain),
            web.post("/undrain", self._undrain),
            web.post("/expect", self._expect),
            web.get("/metrics", self._metrics),
        ]

    async def _ready(self, request: web.Request) -> web.Response:
        found = re.search(r"port=(\d+)", request.headers.get("X-Haproxy-Server-State", ""))
        port = int(found[1]) if found else int(request.query.get("port", 0))
        now = time.monotonic()
        ready = [engine for engine in self.engines.values() if engine.state(now) == "ready"]
        if not port:  # someone who asks for the machine as a whole
            return web.Response(status=200 if ready else 503, text=f"{len(ready)} engines ready\n")
        engine = next((engine for engine in self.engines.values() if engine.port == port), None)
        if engine is None:
            return web.Response(status=503, text=f"no engine on port {port}\n")
        others = any(other is not engine and other.model == engine.model for other in ready)
        return web.Response(status=engine.checked(now, others_ready=others), text=engine.state(now) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Everything known of every engine."""
        now = time.monotonic()
        return [
            {
                "engine": engine.name,
                "model": engine.model,
                "weights": engine.settings["weights"]["name"],
                "format": engine.settings["weights"]["format"],
                "port": engine.port,
                "bundle": engine.bundle,
                "state": engine.state(now),
                "since_s": round(now - engine.since, 1),
                "pid": engine.identity[0] if engine.identity else None,
                "in_flight": engine.in_flight,
                "running": engine.sample.running,
                "waiting": engine.sample.waiting,
                "generation_tokens": engine.sample.generation_tokens,
                "drained": engine.drained(now),
                "starts": engine.starts,
                "crash_loop": engine.crash_loop(self.settings["crash_loop_restarts"]),
                "warmup_s": round(engine.warmup_s, 2),
                "last_error": engine.last_error,
            }
            for engine in self.engines.values()
        ]

    async def _engines(self, _: web.Request) -> web.Response:
        return web.json_response(self.rows())

    def _named(self, request: web.Request) -> Engine:
        name = request.query.get("engine", "")
        if name not in self.engines:
            raise web.HTTPNotFound(text=f"no engine {name!r}; there are: {', '.join(self.engines)}\n")
        return self.engines[name]

    async def _drain(self, request: web.Request) -> web.Response:
        engine = self._named(request)
        engine.drain(time.monotonic())
        return self._done(engine)

    async def _undrain(self, request: web.Request) -> web.Response:
        engine = self._named(request)
        engine.draining = False
        return self._done(engine)

    async def _expect(self, request: web.Request) -> web.Response:
        engine = self._named(request)
        engine.expected, engine.crashes, engine.last_error = True, [], ""
        return self._done(engine)

    def _done(self, engine: Engine) -> web.Response:
        self._remember(engine)
        return web.json_response(next(row for row in self.rows() if row["engine"] == engine.name))

    async def _metrics(self, _: web.Request) -> web.Response:
        registry = CollectorRegistry()
        registry.register(_Collector(self.engines.values(), self.settings["crash_loop_restarts"]))
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


@web.middleware
async def loopback_changes(request: web.Request, handler: Any) -> web.StreamResponse:
    """Anybody who reaches the agent may ask; only the machine itself may change something."""
    if request.method not in {"GET", "HEAD"} and not ipaddress.ip_address(request.remote or "").is_loopback:
        raise web.HTTPForbidden(text="only from the machine itself\n")
    answer: web.StreamResponse = await handler(request)
    return answer


def _is_part(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name().startswith(OWN_PROCESS) and running(process)
    return False


def _lives(identity: Identity) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(identity[0]).create_time() == identity[1]
    return False


class _Collector:
    """The engines as Prometheus metrics."""

    def __init__(self, engines: Iterable[Engine], crash_loop_restarts: int) -> None:
        self.engines = list(engines)
        self.limit = crash_loop_restarts

    def collect(self) -> Iterable[Metric]:
        """Every metric of the agent."""
        now = time.monotonic()
        labels = ["engine", "model"]
        state = GaugeMetricFamily(
            "fleet_engine_state", "1 for the state that an engine is in", labels=[*labels, "state"]
        )
        single: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            "ready": GaugeMetricFamily(
                "fleet_engine_ready", "Whether gateways send requests to an engine", labels=labels
            ),
            "starts": CounterMetricFamily("fleet_engine_starts", "Processes that an engine has had", labels=labels),
            "wedged": CounterMetricFamily(
                "fleet_engine_wedged", "Restarts of an engine that did not move", labels=labels
            ),
            "loop": GaugeMetricFamily(
                "fleet_engine_crash_loop", "Whether an engine crashes again and again", labels=labels
            ),
            "warmup": GaugeMetricFamily("fleet_engine_warmup_seconds", "How long the last warm-up took", labels=labels),
            "flight": GaugeMetricFamily(
                "fleet_engine_in_flight", "Requests running or waiting in an engine", labels=labels
            ),
        }
        for engine in self.engines:
            own = [engine.name, engine.model]
            for name in STATES:
                state.add_metric([*own, name], engine.state(now) == name)
            values: dict[str, float] = {
                "ready": engine.state(now) == "ready",
                "starts": engine.starts,
                "wedged": engine.wedged,
                "loop": engine.crash_loop(self.limit),
                "warmup": engine.warmup_s,
                "flight": engine.in_flight,
            }
            for key, value in values.items():
                single[key].add_metric(own, value)
        yield state
        yield from single.values()


def serve(file: Path) -> NoReturn:
    """Run the agent that `file` describes, on the listening socket that is descriptor 0.

    Of two such processes one works and the other waits for the lock, to take over at once when the first one ends.
    SIGHUP makes the process start afresh with the code and settings that its slot holds by then; the socket stays open
    all the while.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)

    def afresh() -> None:
        os.set_inheritable(0, True)  # noqa: FBT003 - the standard library's own signature
        os.execv(sys.executable, [sys.executable, "-m", "fleet_agent", "serve", str(file)])  # noqa: S606

    signal.signal(signal.SIGHUP, lambda *_: afresh())
    settings = json.loads(file.read_text(encoding="utf-8"))
    machine = Machine(Path.cwd())
    with (machine.run / "agent.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log.info("watching %s", machine.root)
        asyncio.run(_work(machine, settings, afresh))
    raise SystemExit(0)


async def _work(machine: Machine, settings: dict[str, Any], afresh: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, afresh)
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    timeout = aiohttp.ClientTimeout(total=settings["probe_timeout_ms"] / 1000)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        agent = Agent(machine, settings, http)
        await agent.look()  # before the first question comes
        application = web.Application(middlewares=[loopback_changes])
        application.add_routes(agent.routes())
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.SockSite(runner, socket.socket(fileno=os.dup(0))).start()
        watching = [asyncio.create_task(work) for work in (agent.watch(), agent.guard())]
        await ended.wait()
        for task in watching:
            task.cancel()
        await runner.cleanup()
