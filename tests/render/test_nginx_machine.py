"""The gateway with nginx as the machine runs it: real process manager, real apply program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fleet_agent.apply import apply, differences
from fleet_agent.machine import AgentError, Machine
from fleet_agent.machine import Bundle as StoredBundle
from fleet_agent.supervise import Supervisor, machine_processes

from infra.plan.model import FleetPlan
from infra.render.bundle import Bundle
from infra.render.gateway import gateway
from tests.render.fakes import FakeAgent, FakeEngine, Loop
from tests.render.gateways import AUTH, IN_TIME_S, Ports, tool, until
from tests.render.nginx_gateways import NGINX, nginx_bundle
from tests.render.plans import KEYS, a_layout, a_plan


@dataclass
class GatewayMachine:
    """A gateway machine with two engines behind it."""

    machine: Machine
    plan: FleetPlan
    engines: list[FakeEngine]
    said: list[str] = field(default_factory=list)

    @property
    def supervisor(self) -> Supervisor:
        return Supervisor(self.machine)

    def bundle(self, **changes: Any) -> Bundle:
        balancer = self.plan.gateway.model_copy(update=changes)
        plan = self.plan.model_copy(update={"gateway": balancer})
        if balancer.proxy == "haproxy":
            return gateway(plan, a_layout(self.machine.root, haproxy=tool("haproxy")))
        return nginx_bundle(plan, self.machine.root, tool("nginx"))

    def apply(self, bundle: Bundle) -> None:
        apply(self.machine, StoredBundle(self.machine.store(bundle.files)), self.said.append)

    def ask(self, **headers: str) -> httpx.Response:
        url = f"http://127.0.0.1:{self.plan.gateway.port}/v1/completions"
        return httpx.post(url, headers=AUTH | headers, json={}, timeout=IN_TIME_S)

    def pids(self) -> dict[str, list[int]]:
        names = ("keeper", "nginx")
        return {name: [process.pid for process in self.supervisor.of(name)] for name in names}


@pytest.fixture
def node(loop: Loop, ports: Ports, root: Path) -> Iterator[GatewayMachine]:
    agent = FakeAgent(loop).start()
    engines = [FakeEngine(loop, name=f"chat-{n}").start() for n in range(2)]
    plan = a_plan(port=ports, gateway=NGINX, timings={"gateway_stop_s": 5})
    plan = plan.model_copy(
        update={
            "agent": plan.agent.model_copy(update={"port": agent.port}),
            "engines": tuple(
                e.model_copy(update={"port": fake.port}) for e, fake in zip(plan.engines, engines, strict=True)
            ),
        }
    )
    agent.status = {engine.port: 200 for engine in engines}
    node = GatewayMachine(Machine(root / "m"), plan, engines)
    yield node
    node.supervisor.halt(IN_TIME_S, node.said.append)
    for server in (agent, *engines):
        server.stop()


@contextmanager
def asking(node: GatewayMachine) -> Iterator[Callable[[int], None]]:
    """A client that asks without pause; in the block, `more(n)` waits for n more answers. Every one must be good.

    A connection that the kernel has for a process which closes its listener is reset, unread: clients try again.
    """
    stop, statuses = threading.Event(), list[int]()

    def ask() -> None:
        while not stop.is_set():
            with suppress(httpx.NetworkError):
                statuses.append(node.ask().status_code)

    def more(count: int) -> None:
        before = len(statuses)
        until(f"{count} more answers", lambda: len(statuses) >= before + count)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield more
    finally:
        stop.set()
        thread.join()
    assert set(statuses) == {200}


def test_it_serves_and_takes_up_a_key_without_a_restart(node: GatewayMachine) -> None:
    bundle = node.bundle(keys=())
    node.apply(bundle)
    until("an engine is in rotation", lambda: node.ask().status_code == 401)
    assert differences(node.machine, StoredBundle(node.machine.bundles / bundle.digest)) == []
    before = node.pids()
    assert len(before["keeper"]) == 2

    node.apply(node.bundle(keys=KEYS))

    until("the key is good", lambda: node.ask().status_code == 200)
    assert node.pids() == before
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(node.ask, **{"X-Fake": "hold"})
        until("an engine has it", lambda: sum(engine.open for engine in node.engines) == 1)
        node.apply(node.bundle(keys=(), routing="round-robin"))
        until("the key is not good any more", lambda: node.ask().status_code == 401)
        for engine in node.engines:
            engine.permit()
        assert held.result(IN_TIME_S).status_code == 200
    assert node.pids() == before


def test_what_nginx_refuses_changes_nothing(node: GatewayMachine) -> None:
    node.apply(node.bundle())
    until("an engine is in rotation", lambda: node.ask().status_code == 200)
    before = node.pids()
    with pytest.raises(AgentError, match=r"nginx refuses the new configuration(.|\n)*300\.0\.0\.1"):
        node.apply(node.bundle(bind="300.0.0.1"))
    assert node.ask().status_code == 200
    assert node.pids() == before
    assert list(node.machine.run.glob("check.*")) == []


def test_a_running_fleet_can_change_from_haproxy_to_nginx_and_back(node: GatewayMachine) -> None:
    node.apply(node.bundle(proxy="haproxy"))
    until("an engine is in rotation", lambda: node.ask().status_code == 200)
    with asking(node) as more:
        more(10)
        node.apply(node.bundle())
        more(10)
    assert node.machine.occupied() == ["keeper", "nginx"]
    node.apply(node.bundle(proxy="haproxy"))
    assert node.machine.occupied() == ["haproxy"]
    until("HAProxy has an engine in rotation", lambda: node.ask().status_code == 200)


def test_nothing_outlives_the_machine(node: GatewayMachine) -> None:
    node.apply(node.bundle())
    until("an engine is in rotation", lambda: node.ask().status_code == 200)
    workers = [p for (pid,) in [node.pids()["nginx"]] for p in psutil.Process(pid).children()]
    psutil.Process(int((node.machine.run / "supervisord.pid").read_text())).kill()
    node.supervisor.halt(IN_TIME_S, node.said.append)
    assert machine_processes(node.machine.root) == []
    assert not any(worker.is_running() for worker in workers)
