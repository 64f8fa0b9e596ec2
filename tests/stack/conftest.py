"""Stacks whose engines start in no time: everything else about them is real."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import weights
from infra.catalog import vllm_cpu
from infra.paths import shared_dir
from tests.fleets import Fleet, a_fleet

FAKE = Path(__file__).parent.parent / "machine" / "fake_vllm.py"


@pytest.fixture(scope="session")
def shared() -> Iterator[Path]:
    """FLEET_SHARED with an engine of no substance, and weights that are of the right size and not read."""
    with tempfile.TemporaryDirectory(prefix="fleet-shared-") as folder:
        root = Path(folder)
        binaries = root / "engines" / f"vllm-{vllm_cpu().version}" / "bin"
        binaries.mkdir(parents=True)
        vllm = binaries / "vllm"
        vllm.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
        vllm.chmod(0o755)
        (root / "weights").symlink_to(shared_dir() / "weights")
        (root / "toolchain").symlink_to(shared_dir() / "toolchain")
        weights.ensure("smollm2-135m-instruct", weights.load())
        yield root


@pytest.fixture
def fleet(shared: Path) -> Iterator[Fleet]:
    with a_fleet("test", shared) as fleet:
        yield fleet


def history(fleet: Fleet) -> list[str]:
    """Types of the resources that Pulumi knows."""
    state = json.loads(fleet.run("pulumi", "stack", "export", "--stack", fleet.stack))
    return [resource["type"] for resource in state["deployment"].get("resources", [])]
