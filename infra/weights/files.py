"""Files of the cache: digests, comparison, space, and one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.findings import ConfigError, Finding
from infra.weights.entry import FileFact
from infra.weights.progress import INTERVAL_S, POLL_S, Say, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

CHUNK = 4 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


class WeightsError(ConfigError):
    """Weights cannot be had: every finding says what is wrong and what to do."""


@dataclass(frozen=True)
class Mismatch:
    """A file that is not what the lock says."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def uncounted(_count: int) -> None:
    """For files that nobody waits for."""


def sha256(path: Path, count: Callable[[int], None] = uncounted) -> str:
    """Digest of a file; `count` is told of every chunk's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            count(len(chunk))
    return digest.hexdigest()


def difference(path: Path, fact: FileFact, count: Callable[[int], None] = uncounted) -> str | None:
    """What is wrong with one file, or None."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if found != fact.size:
        return f"has {found} bytes, expected {fact.size}"
    digest = sha256(path, count)
    return None if digest == fact.sha256 else f"has SHA-256 {digest}, expected {fact.sha256}"


def compare(folder: Path, expected: Mapping[str, FileFact], count: Callable[[int], None]) -> list[Mismatch]:
    """Every file that differs, is missing, or is there and should not be."""
    found = listing(folder)
    problems = {path: difference(folder / path, fact, count) for path, fact in expected.items()}
    extra = [Mismatch(path, "is not in the lock") for path in found if path not in expected]
    return [*(Mismatch(path, problem) for path, problem in problems.items() if problem), *extra]


def listing(folder: Path) -> dict[str, os.stat_result]:
    """Every file below a folder, by relative path."""
    return {
        entry.relative_to(folder).as_posix(): entry.stat(follow_symlinks=False)
        for entry in sorted(folder.rglob("*"))
        if not entry.is_dir() or entry.is_symlink()
    }


def facts(folder: Path, count: Callable[[int], None]) -> dict[str, FileFact]:
    """Size and digest of every file below a folder."""
    return {
        path: FileFact(size=stat.st_size, sha256=sha256(folder / path, count)) for path, stat in listing(folder).items()
    }


def write_record(path: Path, files: Mapping[str, FileFact]) -> None:
    """Write digests as `{path: {"size": bytes, "sha256": hex}}`, in one step and durably."""
    partial = path.with_name(f"{path.name}.part")
    content = {name: fact.model_dump(include={"size", "sha256"}) for name, fact in sorted(files.items())}
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def read_record(path: Path) -> dict[str, FileFact] | None:
    """What `write_record` wrote, or None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: FileFact.model_validate(fact) for name, fact in content.items()}
    except (OSError, ValueError, AttributeError):
        return None


def sync(path: Path) -> None:
    """Make a file or folder survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(root: Path, needed: int, name: str) -> None:
    """See that so many bytes more fit.

    Raises:
        WeightsError: they do not.
    """
    free = shutil.disk_usage(root).free
    if needed > free:
        raise full(root, f"{name} needs {size(needed)} ({needed} bytes) more, and {size(free)} ({free} bytes) are free")


def full(root: Path, problem: str) -> WeightsError:
    """The error for a disk without space."""
    return WeightsError(
        [Finding(str(root), problem, "free space there, or set FLEET_SHARED to a folder on a larger disk")]
    )


@contextlib.contextmanager
def held(path: Path, say: Say, what: str) -> Iterator[None]:
    """Hold a lock that ends with its process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    said = -INTERVAL_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now - said >= INTERVAL_S:
                    said = now
                    holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
                    say(f"waiting for another run (process {holder}) that is at work on {what}")
                time.sleep(POLL_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
