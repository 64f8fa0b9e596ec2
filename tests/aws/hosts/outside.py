"""Machines of a stack that `pulumi up` made: starts a world, runs inside_*.py in it, hears what became of each test.

The stand-in, Pulumi, the machines and their clients are in that world; what runs there reports through a
file. Needs ../shared/hosts, root, and Debian's systemd-container mmdebstrap openssl iproute2.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.catalog import vllm_cpu
from infra.paths import ROOT, engine_dir, fleet_dir, toolchain_dir, weights_dir
from infra.planning import plan_config
from infra.stack_file import load_stack_file
from infra.weights.lock import load
from tests.aws.hosts import baking
from tests.aws.standin import moto_python
from tests.shared import shared

HERE = Path(__file__).parent
LIMIT_S = 2400
ENTRY = "smollm2-135m-instruct"
"""What the real engine serves."""
SKIPPED = "skipped: "
FILES = [HERE / f"inside_{part}.py" for part in ("refusals", "fleet", "faults", "api", "end")]
"""In this order: one stack for all, from its first machine to its destroy."""
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
                [uv, "venv", "--quiet", "--clear", "--python", baking.PYTHON, str(folder)],
                [uv, *install, "--no-deps", "-r", str(locked)],
            ):
                done = subprocess.run(step, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"the node's Python cannot be made: {done.stderr.strip()}")
            (folder / "complete").touch()
    return folder


@dataclass(frozen=True)
class Real:
    """The real engine and its weights, as they are on this machine."""

    venv: Path
    python: Path
    """What its interpreter belongs to, which links lead to."""
    weights: Path
    flags: tuple[str, ...]
    """In the place of those that a GPU wants."""
    environment: tuple[tuple[str, str], ...]


def real_engine() -> Real | None:
    """vLLM for the CPU and what it serves there, if both are installed; as the target `local` runs it."""
    venv, lock = engine_dir(f"vllm-{vllm_cpu().version}"), load()
    weights = weights_dir() / lock.folder(ENTRY)
    if not (venv / "bin/vllm").exists() or not weights.is_dir():
        return None
    config = load_stack_file(ROOT / "stacks/Pulumi.local.yaml")
    first, *_ = plan_config("local", config, lock, {}).engines
    flags = list(first.flags)
    pairs = [(flag, flags[flags.index(flag) + 1]) for flag in ("--dtype", "--kv-cache-memory-bytes")]
    python = (venv / "bin/python").resolve().parents[1]
    return Real(venv, python, weights, (*sum(pairs, ()), "--enforce-eager"), first.environment)


def engines(folder: Path, real: Real | None) -> Path:
    """The `vllm` of a machine: one that starts in no time, or for the real model's weights the real one."""
    (folder / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "tests/machine/fake_vllm.py", folder / "fake_vllm.py")
    command = folder / "bin/vllm"
    lines = ["#!/bin/sh"]
    if real:
        settings = " ".join(f"{name}={value}" for name, value in real.environment)
        run = f'exec env {settings} {real.venv}/bin/vllm "$@" {" ".join(real.flags)}'
        lines += ["case $2 in", f"*/{real.weights.name}) {run} ;;", "esac"]
    fake = f"/opt/fleet/vllm-{vllm_cpu().version}/fake_vllm.py"
    command.write_text("\n".join([*lines, f'exec /opt/fleet/venv/bin/python {fake} "$@"', ""]))
    command.chmod(0o755)
    return folder


def grafana(folder: Path) -> Path:
    """Stands in for Grafana, which no test of this tier looks at: laid out as images have it, and stays up."""
    for part, text in (("bin/grafana", "#!/bin/sh\nexec sleep infinity\n"), ("conf/defaults.ini", "")):
        (folder / part).parent.mkdir(parents=True)
        (folder / part).write_text(text)
    (folder / "bin/grafana").chmod(0o755)
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


def asked(items: Sequence[pytest.Item]) -> list[str]:
    """Of the tests of this session, those that run in a world."""
    names = {it.name for it in items if it.path.stem == "test_hosts"}
    return [f"{HERE / file}.py::{name}" for file, name in CASES if any(f"[{file}-{name}]" in it for it in names)]


def run(tests: list[str], folder: Path) -> Ran:
    """What became of tests, all in the same world."""
    hosts, standin = baking.able(), shared("aws/motoplus.py")
    baking.run(sys.executable, "-m", "hosts", "build", PYTHONPATH=str(hosts.parent))  # a world has no way to packages
    real = real_engine()
    binds = {
        str(node_python()): "/opt/fleet/venv",
        str(engines(folder / "vllm", real)): f"/opt/fleet/vllm-{vllm_cpu().version}",
        **({str(it): str(it) for it in (real.venv, real.python) if it != Path("/usr")} if real else {}),
        str(grafana(folder / "grafana")): "/opt/fleet/grafana",
        **tool("prometheus", folder),
        **tool("alertmanager", folder),
    }
    report = folder / "report.xml"
    inner = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    # The sockets of a load balancer whose machines die under it are closed when they are found.
    inner += ["-W", "default::pytest.PytestUnraisableExceptionWarning"]
    inner += ["-o", "junit_family=xunit1", f"--junitxml={report}"]  # the newer form has no place for figures
    inner += ["--tb=short", "--durations=0", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(hosts.parent), str(ROOT), str(ROOT / "nodeconfig/agent")]),
        "FLEET_TEST_BINDS": json.dumps(binds),
        "FLEET_TEST_MOTO": str(moto_python()),
        "FLEET_TEST_STANDIN": str(standin),
        **({"FLEET_TEST_REAL": str(real.weights)} if real else {}),
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
        text = "" if bad is None else f"{bad.get('message')}\n{bad.text}"
        if bad is not None and bad.tag == "skipped":
            text = f"{SKIPPED}{bad.get('message')}"
        results[str(case.get("name"))] = text
        for one in case.iter("property"):
            figures.setdefault(str(case.get("name")), []).append((str(one.get("name")), str(one.get("value"))))
    return Ran(results, figures, said)
