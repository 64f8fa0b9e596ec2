"""The real programs, machines in temporary folders, and fakes behind them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.render.fakes import FakeAgent, FakeEngine, Loop
from tests.render.gateways import Fleet, Gateway, Ports, StartFleet, tool
from tests.render.nginx_gateways import NginxGateway
from tests.render.plans import a_plan


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def ports() -> Iterator[Ports]:
    ports = Ports()
    with ports.stack:
        yield ports


@pytest.fixture
def root() -> Iterator[Path]:
    # Not pytest's own folder: its path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        yield Path(folder)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def start_fleet(loop: Loop, ports: Ports, root: Path, pool: ThreadPoolExecutor) -> Iterator[StartFleet]:
    """Start a fleet; its engines are ready unless told otherwise."""
    del pool  # it must outlive the fleet: with the engines, what waits for them ends
    started: list[Fleet] = []

    def start(
        models: Sequence[str] = ("chat",), engines: int = 2, *, ready: bool = True, run_peers: str = "", **plan: Any
    ) -> Fleet:
        made = a_plan(models, engines, port=ports, **plan)
        agent = FakeAgent(loop).start()
        fakes = {engine.name: FakeEngine(loop, name=engine.name).start() for engine in made.engines}
        made = made.model_copy(
            update={
                "agent": made.agent.model_copy(update={"port": agent.port}),
                "engines": tuple(e.model_copy(update={"port": fakes[e.name].port}) for e in made.engines),
            }
        )
        agent.status = {engine.port: 200 if ready else 503 for engine in fakes.values()}
        proxy = made.gateway.proxy
        gateway = (NginxGateway if proxy == "nginx" else Gateway)(root, made, tool(proxy))
        gateway.run_peers = run_peers
        fleet = Fleet(gateway, fakes, agent, httpx.Client(base_url=gateway.url, timeout=60))
        started.append(fleet)
        gateway.start()
        if ready:
            gateway.await_states(**{name.replace("-", "_"): "UP" for name in fakes})
        return fleet

    yield start
    for fleet in started:
        fleet.client.close()
        fleet.gateway.stop()
        for server in (*fleet.engines.values(), fleet.agent):
            server.stop()


@pytest.fixture
def fleet(start_fleet: StartFleet) -> Fleet:
    """One model, two ready engines."""
    return start_fleet()
