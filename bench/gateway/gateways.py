"""What is compared: our gateway, rendered from a plan; vllm-router; and the fake engines behind them.

Every one is pinned to one core. What it costs is read from /proc: CPU time is its own whatever else runs meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.gateway.engine import Pace
from bench.gateway.load import request
from infra.api_key import digest
from infra.config import parse
from infra.findings import ConfigError
from infra.paths import ROOT, fleet_dir, toolchain_dir
from infra.plan import make_plan
from infra.plan.model import EnginePlan, FleetPlan, HostFacts
from infra.render.bundle import Bundle, Layout, Program
from infra.render.gateway import gateway
from infra.weights.lock import load as load_lock

KEY = "sk-fleet-bench"
OTHER_KEYS = 50
"""Beside the one that is used."""
START_S = 120
HOST = HostFacts(ram_bytes=1 << 50, cores=4096, cpu_flags=frozenset({"avx512f"}), platform="linux-x86_64")
"""So that a plan with many engines is not refused: none of them is started."""
PLANNED_ENGINES = 9
"""The planner is asked for no more a model, as a stack's ports are few; the rest is added."""


class Missing(Exception):  # noqa: N818 - a reason, printed in the table
    """Something cannot be measured here, and why."""


@dataclass(frozen=True)
class Cores:
    """Which core runs what."""

    gateway: int
    engine: int
    client: int

    @classmethod
    def of_this_machine(cls) -> Cores:
        """The gateway has one of its own; engine and client share where there are two."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(usable[0], usable[min(1, len(usable) - 1)], usable[-1])


def end_in_order() -> None:
    """Let SIGTERM and SIGINT end what was started here too, also where a shell has had SIGINT ignored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def free_port() -> int:
    """A port below those that Linux gives to outgoing connections."""
    while True:
        port = random.randint(20000, 32000)  # noqa: S311
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


@dataclass
class Running:
    """A process, or several, that was started here."""

    process: subprocess.Popen[bytes]
    port: int = 0
    models: tuple[str, ...] = ("chat",)
    others: tuple[subprocess.Popen[bytes], ...] = ()
    """What works beside it, and is its cost too: nginx's keeper."""

    def _all(self) -> list[psutil.Process]:
        found = []
        for one in (self.process, *self.others):
            with contextlib.suppress(psutil.NoSuchProcess):
                first = psutil.Process(one.pid)
                found += [first, *first.children(recursive=True)]
        return found

    def cpu_s(self) -> float:
        """User and system time of all its processes."""
        return sum(sum(process.cpu_times()[:2]) for process in self._all())

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes."""
        return sum(process.memory_full_info().pss for process in self._all())

    def alive(self) -> bool:
        """Does it run?"""
        return self.process.poll() is None

    def stop(self) -> None:
        """End it and what it started."""
        for process in reversed(self._all()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for one in (self.process, *self.others):
            one.wait(30)

    def requests(self, **more: Any) -> list[bytes]:
        """One request for each of its models."""
        return [request(model, key=KEY, **more) for model in self.models]


def pinned(core: int, command: Sequence[str | Path]) -> list[str]:
    """The command, on one core."""
    return ["taskset", "-c", str(core), *map(str, command)]


def start_engines(pace: Pace, count: int, core: int, ports: Sequence[int] = ()) -> tuple[Running, list[int]]:
    """A process of fake engines, and the ports of its engines."""
    settings = json.dumps({"ports": list(ports) or [0] * count, **asdict(pace)})
    command = pinned(core, [sys.executable, "-S", str(Path(__file__).with_name("engine.py")), settings])
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout  # noqa: S101
    found: list[int] = json.loads(process.stdout.readline())
    return Running(process), found


@dataclass(frozen=True)
class Scene:
    """What a gateway has behind it."""

    engines: Mapping[str, Sequence[int]]
    """Ports of each model's engines."""
    agent: int
    """Port where the node agent answers."""
    concurrency: int = 256
    """Requests that one engine runs at once."""
    routing: str = "least-loaded"
    maxconn: int | None = None
    """Instead of the planned one."""
    timings: Mapping[str, int] = field(default_factory=dict)
    """Instead of the planned ones."""


def plan_of(scene: Scene, proxy: str = "haproxy") -> FleetPlan:
    """The plan for a scene: the planner's own, with the fake engines' ports.

    Raises:
        Missing: This proxy cannot do it: the reason is the planner's.
    """
    counts = {model: min(len(ports), PLANNED_ENGINES) for model, ports in scene.engines.items()}
    raw = {
        "target": "local",
        "models": {
            model: {"weights": "smollm2-135m-instruct", "engines": count, "concurrency": scene.concurrency}
            for model, count in counts.items()
        },
        "gateway": {"proxy": proxy, "routing": scene.routing},
    }
    config = parse(raw)
    if config.findings:
        raise Missing("; ".join(f"{finding.path}: {finding.problem}" for finding in config.findings))
    try:
        plan = make_plan("bench", config, load_lock(ROOT / "stacks/models.lock.yaml"), HOST, {})
    except ConfigError as error:
        raise Missing("; ".join(finding.problem for finding in error.findings)) from None
    more = sum(len(ports) - counts[model] for model, ports in scene.engines.items())
    keys = {"bench": KEY} | {f"team-{n:02}": f"sk-other-{n}" for n in range(OTHER_KEYS)}
    changed = {
        "port": free_port(),
        "stats_port": free_port(),
        "keys": tuple((name, digest(key)) for name, key in sorted(keys.items())),
        "maxconn": scene.maxconn or plan.gateway.maxconn + more * scene.concurrency,
    }
    return plan.model_copy(
        update={
            "gateway": plan.gateway.model_copy(update=changed),
            "agent": plan.agent.model_copy(update={"port": scene.agent}),
            "timings": plan.timings.model_copy(update=dict(scene.timings)),
            "engines": tuple(
                EnginePlan(name=f"{model}-{number}", model=model, port=port, flags=(), environment=())
                for model, ports in scene.engines.items()
                for number, port in enumerate(ports)
            ),
        }
    )


def tool(name: str) -> Path:
    """A program from PATH or the tool chain.

    Raises:
        Missing: There is none.
    """
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(toolchain_dir() / "bin")]))
    if found is None:
        raise Missing(f"{name} is not installed: run `make setup`")
    return Path(found).resolve()


def write(bundle: Bundle, root: Path) -> None:
    """Put a bundle on a machine, as its slots want it."""
    folder = root / "bundles" / bundle.digest
    for path, text in bundle.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    for name in ("slots", "run", "log", "data"):
        (root / name).mkdir(exist_ok=True)
    for program in bundle.programs:
        link = root / "slots" / f".{program.name}"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", "bundles", bundle.digest, "programs", program.name))
        link.rename(root / "slots" / program.name)


def render(plan: FleetPlan, root: Path) -> Bundle:
    """The gateway's bundle for a machine in `root`."""
    program: dict[str, Any] = {plan.gateway.proxy: tool(plan.gateway.proxy)}
    return gateway(plan, Layout(root=root, python=Path(sys.executable), **program))


def start_ours(scene: Scene, core: int, root: Path, proxy: str = "haproxy") -> Running:
    """Our gateway with its access log, ready to be asked.

    Raises:
        Missing: It cannot be had here.
    """
    return launch(plan_of(scene, proxy), core, root)


def launch(plan: FleetPlan, core: int, root: Path) -> Running:
    """Start the programs of a plan's gateway in their folder, and wait until it answers for every model."""
    bundle = render(plan, root)
    root.mkdir(parents=True, exist_ok=True)
    write(bundle, root)
    processes = {program.name: _start(program, core, root) for program in bundle.programs}
    proxy, models = plan.gateway.proxy, tuple(model.name for model in plan.models)
    running = Running(processes.pop(proxy), plan.gateway.port, models, tuple(processes.values()))
    return await_ready(running, root / f"log/{proxy}.log")


def _start(program: Program, core: int, root: Path) -> subprocess.Popen[bytes]:
    """As the process manager does."""
    with (root / f"log/{program.name}.log").open("ab") as log, contextlib.ExitStack() as stack:
        stdin = subprocess.DEVNULL
        if program.listen:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(program.listen.removeprefix("unix://"))
            listener.listen(128)
            stdin = listener.fileno()
        return subprocess.Popen(
            pinned(core, program.command),
            cwd=root,
            stdin=stdin,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(program.environment),
        )


def await_ready(running: Running, log: Path) -> Running:
    """Wait until it answers.

    Raises:
        Missing: It ended, or took too long.
    """
    deadline = time.monotonic() + START_S
    try:
        for model in running.models:
            while not _answers(running.port, model):
                if not running.alive() or time.monotonic() > deadline:
                    raise Missing(  # noqa: TRY301
                        f"does not start: {log.read_text(errors='replace')[-300:].strip()}"
                    )
                time.sleep(0.05)
    except BaseException:
        running.stop()
        raise
    return running


def _answers(port: int, model: str) -> bool:
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "model": model, "max_tokens": 1})
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        body.encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return bool(answer.status == 200)  # noqa: PLR2004
    except (OSError, urllib.error.HTTPError):
        return False


def install_router() -> Path:
    """The `vllm-router` of requirements/bench.txt, in a virtual environment of its own.

    Raises:
        Missing: It cannot be installed.
    """
    locked = ROOT / "requirements/bench.txt"
    folder = fleet_dir() / "bench" / f"router-{digest(locked.read_text())[:12]}"
    command = folder / "bin/vllm-router"
    if command.exists():
        return command
    uv = tool("uv")
    python = folder / "bin/python"
    steps: list[list[str | Path]] = [
        [uv, "venv", "--quiet", "--clear", "--python", "3.11", folder],
        [uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "--no-deps", "-r", locked],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Missing(f"vllm-router cannot be installed: {reason}")
    return command


def start_router(ports: Sequence[int], core: int, root: Path, policy: str, log_level: str) -> Running:
    """vllm-router in front of the engines of one model. It has no keys and writes no access log."""
    command = install_router()
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    urls = [f"http://127.0.0.1:{one}" for one in ports]
    arguments: list[str | Path] = [command, "--host", "127.0.0.1", "--port", str(port), "--policy", policy]
    arguments += ["--prometheus-port", str(free_port()), "--log-level", log_level, "--worker-urls", *urls]
    with (root / "router.log").open("ab") as log:
        process = subprocess.Popen(pinned(core, arguments), cwd=root, stdout=log, stderr=subprocess.STDOUT)
    return await_ready(Running(process, port), root / "router.log")
