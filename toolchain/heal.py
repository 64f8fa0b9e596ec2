"""What stops the next `pulumi`: the lock of a killed one, plugins that work on without it, the salt of a gone stack."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

END_S = 5
_SALT = re.compile(r"^encryptionsalt: *(?P<salt>\S*).*\n?", re.MULTILINE)
_SECRET = re.compile(r"\bsecure:")
PLUGIN_MARKS = ("pulumi.dynamic", "pulumi-resource-", "pulumi-language-", "language_host.py")


def heal(backend: str, stack: str, config: Path) -> Iterator[str]:
    """End what dead `pulumi` processes of this backend have left at work, then remove their locks of one stack.

    Live processes keep their locks and plugins. A salt in the stack's file that is not the state's goes, too: it is of
    a passphrase that is gone, or of another FLEET_DIR's, and Pulumi would refuse ours. It makes a new one.

    Args:
        backend: PULUMI_BACKEND_URL. Only `file://` has locks that can be judged: others are left alone.
        stack: the stack's name, without project.
        config: the stack's file.

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
    state = Path(unquote(url.path), ".pulumi")
    for file in sorted((state / "locks" / "organization").glob(f"*/{stack}/*.json")):
        yield from _judge(file, stack)
    yield from _forget_salt(
        config, [file.read_text(encoding="utf-8") for file in (state / "stacks").glob(f"*/{stack}.json")]
    )


def _forget_salt(config: Path, states: list[str]) -> Iterator[str]:
    try:
        text = config.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    salt = _SALT.search(text)
    if salt and not _SECRET.search(text) and not any(salt["salt"] in state for state in states):
        partial = config.with_name(f".{config.name}.{os.getpid()}")
        partial.write_text(_SALT.sub("", text), encoding="utf-8")
        partial.replace(config)
        yield f"removed a stale encryption salt from {config.name}; nothing in it is encrypted"


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
