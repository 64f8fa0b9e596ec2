"""Machines that boot from the fleet's own user data: starts a world, runs inside_*.py in it, says what became of each.

The stand-in, the follower that boots machines and the machines themselves are in that world; what runs there reports
through a file. Needs ../shared/hosts, root, and Debian's systemd-container mmdebstrap openssl iproute2.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.catalog import vllm_cpu
from infra.paths import ROOT, fleet_dir, toolchain_dir
from tests.aws.standin import moto_python
from tests.shared import shared

HERE = Path(__file__).parent
NEEDED = {"systemd-nspawn": "systemd-container", "mmdebstrap": "mmdebstrap", "openssl": "openssl", "ip": "iproute2"}
PYTHON = "/usr/bin/python3"
"""The image is of this machine's own release, so that what is made with its Python runs there."""
LIMIT_S = 1500
FILES = sorted(HERE.glob("inside_*.py"))
CASES = [(file.stem, name) for file in FILES for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)]


@dataclass(frozen=True)
class Ran:
    """What ran inside a world."""

    results: dict[str, str]
    """What became of each test: "" where it passed."""
    figures: dict[str, list[tuple[str, str]]]
    """What each measured."""
    said: str


def node_python() -> Path:
    """What is at /opt/fleet/venv on a machine: made on the first use from its lock, then kept."""
    locked = ROOT / "requirements" / "node.txt"
    folder = fleet_dir() / "aws" / f"node-{hashlib.sha256(locked.read_bytes()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    uv = str(Path(sys.prefix, "bin", "uv"))
    with (folder.parent / "node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            install = ["pip", "install", "--quiet", "--python", str(folder / "bin/python"), "--require-hashes"]
            for step in (
                [uv, "venv", "--quiet", "--clear", "--python", PYTHON, str(folder)],
                [uv, *install, "--no-deps", "-r", str(locked)],
            ):
                done = subprocess.run(step, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"the node's Python cannot be made: {done.stderr.strip()}")
            (folder / "complete").touch()
    return folder


def fake_engine(folder: Path) -> Path:
    """A `vllm` that starts in no time, as a machine sees it."""
    (folder / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "tests/machine/fake_vllm.py", folder / "fake_vllm.py")
    command = folder / "bin/vllm"
    command.write_text(
        f'#!/bin/sh\nexec /opt/fleet/venv/bin/python /opt/fleet/vllm-{vllm_cpu().version}/fake_vllm.py "$@"\n'
    )
    command.chmod(0o755)
    return folder


def tool(name: str, folder: Path) -> dict[str, str]:
    """A program of this machine where images have it; what lies beside it may belong to it."""
    found = shutil.which(name) or shutil.which(name, path=str(toolchain_dir() / "bin"))
    if found is None:
        pytest.skip(f"needs {name}: `make up` or `make test` gets it")
    home, seen = Path(found).resolve().parent, f"/opt/fleet/tools/{name}"
    command = folder / name
    command.write_text(f'#!/bin/sh\nexec {seen}/{Path(found).resolve().name} "$@"\n')
    command.chmod(0o755)
    return {str(home): seen, str(command): f"/opt/fleet/bin/{name}"}


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    """Runs a file inside a world; each once."""
    return functools.cache(lambda file: run(file, tmp_path_factory.mktemp("world")))


def run(file: str, folder: Path) -> Ran:
    """What became of the tests in a file, each in the same world."""
    hosts, standin = shared("hosts"), shared("aws/motoplus.py")
    if os.geteuid():
        pytest.skip("needs root: only root may make namespaces and mounts")
    missing = sorted({package for tool, package in NEEDED.items() if not shutil.which(tool)})
    if missing:
        pytest.skip(f"needs Debian's {' '.join(missing)}")
    version = vllm_cpu().version
    binds = {
        str(node_python()): "/opt/fleet/venv",
        str(fake_engine(folder / "vllm")): f"/opt/fleet/vllm-{version}",
        **tool("prometheus", folder),
        **tool("alertmanager", folder),
    }
    report = folder / "report.xml"
    inner = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    inner += ["-o", "junit_family=xunit1", f"--junitxml={report}"]  # the newer form has no place for figures
    inner.append(str(HERE / f"{file}.py"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(hosts.parent), str(ROOT), str(ROOT / "nodeconfig/agent")]),
        "FLEET_TEST_BINDS": json.dumps(binds),
        "FLEET_TEST_MOTO": str(moto_python()),
        "FLEET_TEST_STANDIN": str(standin),
    }
    command = [sys.executable, "-m", "hosts", "run", "--", *inner]
    log = folder / "said.txt"
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as it,
    ):
        try:
            it.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            it.terminate()  # the world ends with it, and everything in it
    said = log.read_text(errors="replace")
    if not report.exists():
        return Ran({}, {}, said)
    results: dict[str, str] = {}
    figures: dict[str, list[tuple[str, str]]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest's own
        bad = next((found for kind in ("failure", "error", "skipped") if (found := case.find(kind)) is not None), None)
        results[str(case.get("name"))] = "" if bad is None else f"{bad.get('message')}\n{bad.text}"
        for one in case.iter("property"):
            figures.setdefault(str(case.get("name")), []).append((str(one.get("name")), str(one.get("value"))))
    return Ran(results, figures, said)


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(("file", "name"), CASES)
def test_on_booted_hosts(worlds: Callable[[str], Ran], file: str, name: str, request: pytest.FixtureRequest) -> None:
    world = worlds(file)
    for figure, value in world.figures.get(name, ()):
        request.node.user_properties.append((figure, value))
        sys.stdout.write(f"{name}: {figure}: {value}\n")
    assert name in world.results, f"did not run:\n{world.said}"
    assert not world.results[name], f"{world.results[name]}\n{world.said[-4000:]}"
