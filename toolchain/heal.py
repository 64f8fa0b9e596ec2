"""What a killed `pulumi` leaves behind: its lock, which stops the next one, and plugins that work on without it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

END_S = 5
PLUGIN_MARKS = ("pulumi.dynamic", "pulumi-resource-", "pulumi-language-", "language_host.py")


def heal(backend: str, stack: str) -> Iterator[str]:
    """End what dead `pulumi` processes of this backend have left at work, then remove their locks of one stack.

    Live processes keep their locks and plugins.

    Args:
        backend: PULUMI_BACKEND_URL. Only `file://` has locks that can be judged: others are left alone.
        stack: the stack's name, without project.

    Yields:
        A sentence for each thing done, and for each lock that is held.
    """
    url = urlsplit(backend)
    if url.scheme != "file":
        return
    # First the plugins: one may be in the middle of what the next `pulumi up` would start on.
    orphans = [process for process in psutil.process_iter() if _is_orphan(process, backend)]
    for process in orphans:
        process.terminate()
    for process in psutil.wait_procs(orphans, timeout=END_S)[1]:
        process.kill()
    if orphans:
        yield f"ended {len(orphans)} plugin processes that a killed pulumi left at work"
    for file in sorted(Path(unquote(url.path), ".pulumi", "locks", "organization").glob(f"*/{stack}/*.json")):
        yield from _judge(file, stack)


def _judge(lock: Path, stack: str) -> Iterator[str]:
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        pid, host, since = int(holder["pid"]), holder["hostname"], holder["timestamp"]
    except FileNotFoundError:
        return  # released just now
    except (ValueError, KeyError, TypeError):
        lock.unlink(missing_ok=True)
        yield f"removed a lock that was not completely written: {lock}"
        return
    if host != socket.gethostname():
        yield f"stack {stack} is locked by process {pid} on {host} since {since}: if it is dead, `pulumi cancel`"
    elif _is_pulumi(pid):
        yield f"stack {stack} is being changed by process {pid} since {since}: wait for it, or stop it"
    else:
        lock.unlink(missing_ok=True)
        yield f"removed the lock of process {pid}, which died at work (since {since})"


def _is_pulumi(pid: int) -> bool:
    """Whether the process is alive and a pulumi: numbers are used again."""
    try:
        return psutil.Process(pid).name() == "pulumi"
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False


def _is_orphan(process: psutil.Process, backend: str) -> bool:
    """Whether it is a plugin of this backend with no pulumi above it."""
    try:
        return (
            any(mark in part for part in process.cmdline() for mark in PLUGIN_MARKS)
            and process.environ().get("PULUMI_BACKEND_URL") == backend
            and not any(parent.name() == "pulumi" for parent in process.parents())
        )
    except psutil.Error:
        return False
