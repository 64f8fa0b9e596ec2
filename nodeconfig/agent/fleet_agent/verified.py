"""What was verified of a folder of weights, so that a start need not read 70 GB again to know it.

`.verified.json` in the folder: for every file its size and SHA-256, and what the file system said of it at that
moment. A file that anybody wrote to, replaced or touched since has another time of change (ctime, which programs cannot
set), and counts as not verified: whoever asks then reads it. The record can also stand for the lock's digests where the
lock has none: it is a mapping of paths to `size` and `sha256`, and more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = ".verified.json"


def write(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Record that every one of these files was compared with its digest, in one step and durably.

    Args:
        folder: Where they are.
        files: Path to `size` and `sha256`.
    """
    content = {
        path: {"size": fact["size"], "sha256": fact["sha256"], **_state((folder / path).stat())}
        for path, fact in sorted(files.items())
    }
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(folder / RECORD)
    sync(folder)


def read(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that was verified and not touched since, by path; nothing where there is no record."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = {}
    for path, fact in content.items():
        try:
            state = _state((folder / path).stat())
        except OSError:
            continue
        if state == {key: fact.get(key) for key in state}:
            known[path] = str(fact["sha256"])
    return known


def sync(path: Path) -> None:
    """Make a file or folder survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state(stat: os.stat_result) -> dict[str, int]:
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
