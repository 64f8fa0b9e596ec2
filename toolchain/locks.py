"""Stale locks of Pulumi's file backend: a killed `pulumi` leaves its lock behind, and the next one refuses to start."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator


def unlock(backend: str, stack: str) -> Iterator[str]:
    """Remove the locks of a stack whose `pulumi` is no more, and only those.

    Args:
        backend: PULUMI_BACKEND_URL. Only `file://` has such locks that can be judged: others are left alone.
        stack: the stack's name, without project.

    Yields:
        A sentence for each lock removed, and for each that is held by a live process.
    """
    url = urlsplit(backend)
    if url.scheme != "file":
        return
    for file in sorted(Path(unquote(url.path), ".pulumi", "locks", "organization").glob(f"*/{stack}/*.json")):
        try:
            holder = json.loads(file.read_text(encoding="utf-8"))
            pid, host, since = int(holder["pid"]), holder["hostname"], holder["timestamp"]
        except FileNotFoundError:
            continue  # released just now
        except (ValueError, KeyError, TypeError):
            file.unlink(missing_ok=True)
            yield f"removed a lock that was not completely written: {file}"
            continue
        if host != socket.gethostname():
            yield f"stack {stack} is locked by process {pid} on {host} since {since}: if it is dead, `pulumi cancel`"
        elif _is_pulumi(pid):
            yield f"stack {stack} is being changed by process {pid} since {since}: wait for it, or stop it"
        else:
            file.unlink(missing_ok=True)
            yield f"removed the lock of process {pid}, which died at work (since {since})"


def _is_pulumi(pid: int) -> bool:
    """Whether the process is alive and a pulumi: numbers are used again."""
    try:
        return "pulumi" in psutil.Process(pid).name()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    except psutil.AccessDenied:
        return True
