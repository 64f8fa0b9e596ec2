"""A machine with the real process manager, the real agent and engines that start in no time."""

from __future__ import annotations

import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_agent.apply import apply
from fleet_agent.machine import Bundle as StoredBundle
from fleet_agent.machine import Machine
from fleet_agent.supervise import Supervisor, wait_for

from infra.render.bundle import Bundle, Program
from infra.render.engine import AGENT

FAKE = Path(__file__).with_name("fake_vllm.py")
SETTINGS = {
    "poll_ms": 50,
    "probe_timeout_ms": 500,
    "warmup_request_s": 5,
    "wedged_s": 3,
    "start_s": 20,
    "drain_s": 20,
    "crash_loop_restarts": 3,
    "crash_loop_window_s": 60,
}
IN_TIME_S = 30


def free_ports(count: int) -> list[int]:
    """Ports that are free now; held together while they are chosen, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class EngineNode:
    """An engine node in a temporary folder."""

    machine: Machine
    weights_root: Path
    ports: list[int]
    said: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))

    def weights(self, name: str, behaviour: str = "") -> Path:
        folder = self.weights_root / name
        folder.mkdir(exist_ok=True)
        (folder / "behaviour").write_text(behaviour)
        return folder

    def bundle(self, weights: str, engines: int = 2, **settings: Any) -> Bundle:
        """An agent and some engines that serve `weights`."""
        agent = Program(
            name="agent",
            command=(sys.executable, "-m", "fleet_agent", "serve", "slots/agent/agent.json"),
            environment={"PYTHONPATH": "slots/agent"},
            files={
                "agent.json": json.dumps({**self.settings, "port": self.ports[0], **settings}),
                **{f"fleet_agent/{file.name}": file.read_text() for file in AGENT.glob("*.py")},
            },
            listen=f"127.0.0.1:{self.ports[0]}",
            standby=True,
            reload="SIGHUP",
        )
        return Bundle(
            "engine", (agent, *(self._engine(f"chat-{n}", self.ports[n], weights) for n in range(1, engines + 1)))
        )

    def _engine(self, name: str, port: int, weights: str) -> Program:
        folder = self.weights_root / weights
        step = {"path": "/v1/completions", "parallel": 2, "body": {"model": "chat"}}
        settings = {
            "name": name,
            "model": "chat",
            "port": port,
            "command": [sys.executable, str(FAKE), "serve", str(folder), "--port", str(port)],
            "weights": {"name": weights, "format": "bf16", "folder": str(folder), "files": {}, "record": None},
            "warmup": [step],
        }
        return Program(
            name=name,
            command=(sys.executable, "-m", "fleet_agent", "start", f"slots/{name}/engine.json"),
            environment={"PYTHONPATH": "slots/agent"},
            files={"engine.json": json.dumps(settings)},
            engine=True,
            stop_s=10,
        )

    def apply(self, bundle: Bundle) -> None:
        folder = self.machine.store(bundle.files)
        apply(self.machine, StoredBundle(folder), self.said.append)

    @property
    def supervisor(self) -> Supervisor:
        return Supervisor(self.machine)

    def ask(self, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
        url = f"http://127.0.0.1:{self.ports[0]}{path}"
        request = urllib.request.Request(url, method=method, headers=headers or {})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def ready_status(self, engine: int) -> int:
        """What a gateway is told of an engine."""
        state = f"UP; address=127.0.0.1; port={self.ports[engine]}; name=chat/chat-{engine}"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[0]}/ready", headers={"X-Haproxy-Server-State": state}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return int(error.code)

    def engines(self) -> dict[str, dict[str, Any]]:
        return {row["engine"]: row for row in self.ask("/engines")}

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        assert wait_for(condition, IN_TIME_S, 0.05), what
