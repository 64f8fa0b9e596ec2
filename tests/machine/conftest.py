from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_agent.machine import Machine

from tests.machine.nodes import EngineNode, free_ports


@pytest.fixture
def node() -> Iterator[EngineNode]:
    # Not pytest's own folder: its path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        root = Path(folder)
        (root / "weights").mkdir()
        node = EngineNode(Machine(root / "m"), root / "weights", free_ports(5))
        node.weights("good")
        node.weights("better")
        try:
            yield node
        finally:
            node.supervisor.halt(30, node.said.append)
