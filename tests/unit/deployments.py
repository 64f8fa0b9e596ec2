"""A stack that looks deployed: the real rendered files in a folder, and servers that answer as they are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fleet_agent.machine import Machine

from infra.paths import machine_dir
from infra.plan.model import AgentPlan, FleetPlan
from infra.render.bundle import Layout
from infra.render.engine import engine_node
from infra.render.gateway import gateway
from infra.render.monitor import monitor
from infra.weights.cache import Place
from tests.unit.inputs import plan

HEADER = "# pxname,svname,qcur,qmax,scur,smax,slim,stot,status,weight"
Answer = tuple[int, str]


@dataclass
class Deployment:
    """What the servers of the stack `local` say. A server that is not in `up` refuses connections."""

    plan: FleetPlan
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    servers: dict[str, str] = field(default_factory=dict)
    monitoring: int = 200
    tokens: int = 0
    """How many each engine in flight generates between two looks."""
    finishing: int = 0
    """How many requests each draining engine finishes between two looks."""
    orders: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for engine in self.plan.engines:
            self.servers[engine.name] = "UP"
            self.rows[engine.name] = {
                "engine": engine.name,
                "model": engine.model,
                "weights": "small",
                "format": "bf16",
                "port": engine.port,
                "bundle": "b" * 64,
                "state": "ready",
                "since_s": 61.5,
                "in_flight": 0,
                "generation_tokens": 1000,
                "drained": False,
                "starts": 1,
                "crash_loop": False,
                "last_error": "",
            }

    def machine(self, role: str) -> Machine:
        return Machine(machine_dir("local", role))

    def agent(self, method: str, url: str) -> Answer:
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        if method == "GET" and path == "/engines":
            for row in self.rows.values():
                row["generation_tokens"] += self.tokens if row["in_flight"] else 0
                if row["state"] == "draining":
                    row["in_flight"] = max(0, row["in_flight"] - self.finishing)
                    row["drained"] = row["in_flight"] == 0
            return 200, json.dumps(list(self.rows.values()))
        if method == "POST" and path in {"/drain", "/undrain"}:
            row = self.rows[query["engine"][0]]
            row["state"] = "draining" if path == "/drain" else "ready"
            self.orders.append(url)
            return 200, json.dumps(row)
        return 404, "no such thing\n"

    def statistics(self, _method: str, url: str) -> Answer:
        rows = [f"model-chat,{name},0,0,1,4,8,99,{status},1" for name, status in self.servers.items()]
        table = [HEADER, "clients,FRONTEND,,,1,2,2000,99,OPEN,", *rows, "model-chat,BACKEND,0,0,1,8,200,99,UP,2"]
        return (200, "\n".join(table) + "\n\n") if url == "/;csv" else (404, "")

    def monitor(self, _method: str, url: str) -> Answer:
        return (self.monitoring, "Ready.\n") if url == "/-/ready" else (404, "")


@contextmanager
def deployment(tmp_path: Path, *up: str) -> Iterator[Deployment]:
    """The stack's folders; of its servers those that are named run: agent, gateway, prometheus, alertmanager."""
    with ExitStack() as stack:
        servers = {name: stack.enter_context(_Server()) for name in ("agent", "gateway", "prometheus", "alertmanager")}
        planned = _with_ports(plan(), {name: server.server_port for name, server in servers.items()})
        deployed = Deployment(planned)
        _write(tmp_path, planned)
        servers["agent"].answer = deployed.agent
        servers["gateway"].answer = deployed.statistics
        servers["prometheus"].answer = servers["alertmanager"].answer = deployed.monitor
        for name in up:
            stack.enter_context(servers[name].running())
        yield deployed


def _with_ports(planned: FleetPlan, ports: dict[str, int]) -> FleetPlan:
    """The same plan with servers elsewhere: on ports that the system chose, of which a stack file can name none."""
    monitoring = {"prometheus_port": ports["prometheus"], "alertmanager_port": ports["alertmanager"]}
    changes = {
        "agent": AgentPlan(port=ports["agent"]),
        "gateway": planned.gateway.model_copy(update={"stats_port": ports["gateway"]}),
        "monitor": planned.monitor.model_copy(update=monitoring),
    }
    return planned.model_copy(update=changes)


def _write(tmp_path: Path, planned: FleetPlan) -> None:
    """What `pulumi up` leaves in the machines' folders, and logs."""
    layout = Layout(
        root=tmp_path,
        python=Path("/usr/bin/python3"),
        vllm=Path("/opt/vllm"),
        weights={"small": Place(tmp_path, {}, None)},
        haproxy=Path("/usr/sbin/haproxy"),
        prometheus=Path("/usr/bin/prometheus"),
        alertmanager=Path("/usr/bin/alertmanager"),
    )
    for bundle in (gateway(planned, layout), monitor(planned, layout), engine_node(planned, layout)):
        machine = Machine(machine_dir("local", bundle.role))
        folder = machine.store(bundle.files)
        for program in bundle.programs:
            machine.point(program.name, folder / "programs" / program.name)
            (machine.log / f"{program.name}.log").write_text(
                "".join(f"{program.name} line {number}\n" for number in range(1, 101))
            )


class _Server(ThreadingHTTPServer):
    """Holds its port from the beginning, and refuses connections until it runs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self.server_bind()
        self.answer: Callable[[str, str], Answer] = lambda _method, _url: (500, "")

    @contextmanager
    def running(self) -> Iterator[None]:
        self.server_activate()
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def _answer(self) -> None:
        status, text = self.server.answer(self.command, self.path)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = _answer  # noqa: N815 - the standard library's names

    def log_message(self, *_: Any) -> None:
        pass
