"""Where set-up puts things. All of it is in the shared folder (infra/paths.py), caches included."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import TYPE_CHECKING

from infra.paths import shared_dir, toolchain_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"


def last_on_path() -> Path:
    """Links to installed tools; toolchain/env puts it last on PATH."""
    return toolchain_dir() / "bin"


def first_on_path() -> Path:
    """Links to installed tools whose namesakes on PATH will not do; toolchain/env puts it first."""
    return toolchain_dir() / "override"


def users_path() -> str:
    """PATH without what set-up put there, and with the system tools' folders, which a user's PATH may lack."""
    ours = {str(last_on_path()), str(first_on_path())}
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin"]
    return os.pathsep.join(folder for folder in dict.fromkeys(folders) if folder and folder not in ours)


def uv() -> str:
    """The uv that is locked with this project: in this virtual environment."""
    return str(Path(sys.prefix, "bin", "uv"))


def uv_environment() -> dict[str, str]:
    """For running uv: its cache beside everything else, unless the user has one."""
    return {"UV_CACHE_DIR": str(shared_dir() / "cache" / "uv"), **os.environ, "PYTHONDONTWRITEBYTECODE": ""}


@contextmanager
def one_at_a_time(name: str, kind: int = LOCK_EX) -> Iterator[None]:
    """Held by one process on this machine; the kernel gives it up when the process ends, however it ends.

    Args:
        name: what is held.
        kind: fcntl's flags: LOCK_SH for any number of holders, LOCK_NB not to wait.

    Raises:
        BlockingIOError: with LOCK_NB, when it is held.
    """
    locks = toolchain_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as file:
        flock(file, kind)
        yield


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` to build in; it takes `final`'s place when it is complete, and is gone if it never is.

    Call with one_at_a_time held: it clears what an interrupted run left behind.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    building, old = final.with_name(f".{final.name}.building"), final.with_name(f".{final.name}.old")
    for leftover in (building, old):
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        if final.exists():
            final.rename(old)
        building.rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
