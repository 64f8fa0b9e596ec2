"""A gateway machine in a temporary folder with the real HAProxy, and the fleet behind it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet_agent.balancer import merge_states, revoke

from infra.paths import toolchain_dir
from infra.plan.model import FleetPlan
from infra.render.bundle import Bundle
from infra.render.gateway import gateway
from tests.render.fakes import FakeAgent, FakeEngine
from tests.render.plans import KEY, a_layout

IN_TIME_S = 30
AUTH = {"Authorization": f"Bearer {KEY}"}


def tool(name: str) -> Path:
    """A program from PATH or the toolchain; the test is skipped where there is none."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(toolchain_dir() / "bin")])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor in {toolchain_dir() / 'bin'}: run `make setup`")
    return Path(found).resolve()


def until(what: str, condition: Callable[[], bool], seconds: float = IN_TIME_S) -> None:
    """Poll until the condition holds; the deadline only ends a test that has failed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


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
        link.symlink_to(Path("..", "bundles", bundle.digest, "programs", program.name))
        link.rename(root / "slots" / program.name)


@dataclass
class Ports:
    """Ports that stay ours: bound, not listened on, and shared only with who also asks to share, as HAProxy does."""

    stack: ExitStack = field(default_factory=ExitStack)

    def __call__(self) -> int:
        held = self.stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@dataclass
class Gateway:
    """One HAProxy under test."""

    root: Path
    plan: FleetPlan
    binary: Path
    process: subprocess.Popen[bytes] | None = None
    run_peers: str = ""
    """Where other gateways are, as the machine has found it."""

    @property
    def url(self) -> str:
        return self.plan.gateway.url

    @property
    def bundle(self) -> Bundle:
        return gateway(self.plan, a_layout(self.root, haproxy=self.binary))

    def start(self) -> None:
        write(self.bundle, self.root)
        if self.run_peers:
            (self.root / "run/peers.cfg").write_text(self.run_peers)
        command = self.bundle.programs[0].command
        with (self.root / "log/haproxy.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.root, stdout=log, stderr=subprocess.STDOUT)
        until("HAProxy listens", lambda: self.worker() != "")

    @property
    def peers(self) -> tuple[str, ...]:
        """The file that says where other gateways are, as an argument."""
        files = self.bundle.files
        return ("-f", "slots/haproxy/peers.cfg") if "programs/haproxy/peers.cfg" in files else ()

    def check(self) -> subprocess.CompletedProcess[str]:
        """What HAProxy says of the configuration."""
        write(self.bundle, self.root)
        (self.root / "run/haproxy.state").write_text("1\n")
        return subprocess.run(
            [self.binary, "-c", *self.peers, "-f", "slots/haproxy/haproxy.cfg"],
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )

    def reload(self, plan: FleetPlan) -> None:
        """Take up another plan as the apply program does: keys revoked, states saved, master told, worker there."""
        before = self.worker()
        self.plan = plan
        write(self.bundle, self.root)
        revoke(self.root / "run", (self.root / "slots/haproxy/keys.map").read_text())
        (self.root / "run/haproxy.state").write_text(
            merge_states(self.command("show servers state"), (self.root / "slots/haproxy/servers.state").read_text())
        )
        assert self.process
        for last in (False, False, True):
            # A master that has only just started its worker may not listen to signals yet: then the signal is lost.
            self.process.send_signal(signal.SIGUSR2)
            try:
                until("a new worker answers", lambda: self.worker() not in {"", before}, IN_TIME_S / 3)
            except AssertionError:
                if last:
                    raise
            else:
                return

    def command(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(IN_TIME_S)
            connection.connect(str(self.root / "run/haproxy.sock"))
            connection.sendall(line.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def worker(self) -> str:
        try:
            answer = self.command("show info")
        except OSError:
            return ""
        return next((line.split()[1] for line in answer.splitlines() if line.startswith("Pid:")), "")

    def servers(self) -> dict[str, str]:
        """Server name to HAProxy's word for its state: UP, DOWN, NOLB …"""
        rows = [line.split(",") for line in self.command("show stat").removeprefix("# ").splitlines() if line]
        column = rows[0].index
        return {
            row[column("svname")]: row[column("status")]
            for row in rows[1:]
            if row[column("svname")] not in {"FRONTEND", "BACKEND"}
        }

    def queued(self, model: str) -> int:
        rows = [line.split(",") for line in self.command("show stat").removeprefix("# ").splitlines() if line]
        names = {(row[0], row[1]): row for row in rows[1:]}
        return int(names[f"model-{model}", "BACKEND"][rows[0].index("qcur")])

    def await_states(self, **states: str) -> None:
        wanted = {name.replace("_", "-"): state for name, state in states.items()}
        until(f"servers are {wanted}", lambda: {n: self.servers()[n].split()[0] for n in wanted} == wanted)

    def log_text(self) -> str:
        return (self.root / "log/haproxy.log").read_text(encoding="utf-8")

    def requests(self) -> list[dict[str, Any]]:
        """The access log; every line of it must be JSON."""
        return [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]

    def stop(self) -> None:
        """End it at once, streams and all."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(IN_TIME_S / 3)
            except subprocess.TimeoutExpired:  # the signal may have come while the master did not listen
                self.process.kill()
                self.process.wait(IN_TIME_S)


@dataclass
class Fleet:
    """A gateway with everything behind it."""

    gateway: Gateway
    engines: dict[str, FakeEngine]
    agent: FakeAgent
    client: httpx.Client

    def mark(self, **status: int) -> None:
        """Set what the agent says, by engine name with `_` for `-`."""
        for name, code in status.items():
            self.agent.status[self.engines[name.replace("_", "-")].port] = code

    def ask(self, path: str = "/v1/completions", *, do: str = "", **more: Any) -> httpx.Response:
        headers = {**AUTH, **({"X-Fake": do} if do else {}), **more.pop("headers", {})}
        return self.client.post(path, headers=headers, json={"model": "chat"}, **more)


StartFleet = Callable[..., Fleet]
