"""A gateway machine in a temporary folder with the real nginx and its keeper."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psutil

from infra.plan.model import FleetPlan
from infra.render.bundle import Bundle, Program
from infra.render.gateway import gateway
from tests.render.gateways import IN_TIME_S, Gateway, until, write
from tests.render.plans import a_layout

NGINX = {"proxy": "nginx"}


def nginx_bundle(plan: FleetPlan, root: Path = Path("/srv/fleet/machine"), binary: Path | None = None) -> Bundle:
    """The gateway's bundle; with programs that are there, if nginx's is given."""
    layout = a_layout(root, nginx=binary or Path("/opt/nginx/bin/nginx"))
    return gateway(plan, replace(layout, python=Path(sys.executable)) if binary else layout)


@dataclass
class NginxGateway(Gateway):
    """One nginx under test, with its keeper."""

    socket: socket.socket | None = None
    """Held as the process manager holds it."""
    keepers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def bundle(self) -> Bundle:
        return nginx_bundle(self.plan, self.root, self.binary)

    def program(self, name: str) -> Program:
        return next(program for program in self.bundle.programs if program.name == name)

    def start(self) -> None:
        write(self.bundle, self.root)
        if self.socket is None:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind(str(self.root / "run/keeper.sock"))
            self.socket.listen(128)
        if not self.keepers:
            self.start_keeper()
        self.process = self._start("nginx")
        until("nginx listens", lambda: self.rotation() is not None)

    def start_keeper(self) -> None:
        self.keepers.append(self._start("keeper"))

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        command = self.program(name).command
        stdin = self.socket.fileno() if name == "keeper" and self.socket else subprocess.DEVNULL
        with (self.root / f"log/{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.root, stdin=stdin, stdout=log, stderr=subprocess.STDOUT)

    def check(self) -> subprocess.CompletedProcess[str]:
        """What nginx says of the configuration."""
        write(self.bundle, self.root)
        command = [*self.program("nginx").command, "check"]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)

    def reload(self, plan: FleetPlan) -> None:
        """Take up another plan as the apply program does."""
        before = set(self.workers())
        self.plan = plan
        write(self.bundle, self.root)
        assert self.process
        for process in (*self.keepers, self.process):
            process.send_signal(signal.SIGHUP)
        until("all workers are new", lambda: self.settled() and not before & set(self.workers()))

    def workers(self) -> list[int]:
        """Process ids of the workers that take connections."""
        assert self.process
        found = []
        for worker in psutil.Process(self.process.pid).children():
            try:
                title = " ".join(worker.cmdline())
            except psutil.Error:
                continue
            if "worker process" in title and "shutting down" not in title:
                found.append(worker.pid)
        return found

    def settled(self) -> bool:
        """Whether the workers of one configuration alone take connections."""
        return len(self.workers()) == len(os.sched_getaffinity(0))

    def rotation(self) -> list[str] | None:
        """The engines that nginx itself says are in rotation; None while it does not answer."""
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.plan.gateway.stats_port}/rotation")
        except httpx.HTTPError:
            return None
        return answer.text.split()

    def servers(self) -> dict[str, str]:
        """In HAProxy's words. What drains and what is down is one to nginx."""
        ready = self.rotation() or []
        return {engine.name: "UP" if engine.name in ready else "DOWN" for engine in self.plan.engines}

    def await_states(self, **states: str) -> None:
        super().await_states(**states)
        until("old workers take no connections", self.settled)

    def metrics(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.plan.gateway.stats_port}/metrics").text

    def log_text(self) -> str:
        return (self.root / "log/nginx.log").read_text(encoding="utf-8")

    def stop(self) -> None:
        super().stop()
        for keeper in self.keepers:
            keeper.kill()
            keeper.wait(IN_TIME_S)
        if self.socket:
            self.socket.close()
