"""The real fleet: two vLLM engines, brought up once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from infra.catalog import vllm_cpu
from infra.paths import engine_dir
from tests.fleets import Fleet, a_fleet

CALIBRATION = "4x48"
"""Enough for a model that serves; the recipe's own calibration makes a better one and takes minutes longer."""


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    if not (engine_dir(f"vllm-{vllm_cpu().version}") / "bin" / "vllm").is_file():
        pytest.skip("vLLM is not installed: `make test` installs it")
    os.environ["FLEET_CALIBRATION"] = CALIBRATION
    with a_fleet("real") as fleet:
        fleet.up()
        yield fleet
        fleet.destroy()
        assert fleet.processes() == []


@pytest.fixture(autouse=True)
def whole(fleet: Fleet) -> None:
    """Every test starts with both engines in rotation."""
    fleet.until("both engines are in rotation", lambda: fleet.in_rotation() == {"chat-1", "chat-2"})
