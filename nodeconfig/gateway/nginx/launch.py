"""Start nginx on a gateway machine, or have it check its configuration.

python launch.py NGINX           become nginx
python launch.py NGINX check     exit code 0: nginx takes the configuration; else its own words are on standard error

The working directory is the machine's folder. nginx starts with those engines in rotation that the keeper knows to be
ready; with none, if the keeper does not answer: it puts them there once the agent says so.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import socket
import sys
from pathlib import Path

SLOT, RUN = Path("slots/nginx"), Path("run")
STARTED = "# So nginx started.\n"
"""Tells the keeper that nginx has read the list: see there."""
MOST_FILES = 1 << 20
KEEPER_S = 2


def main(nginx: str, *mode: str) -> None:
    """Become nginx."""
    RUN.mkdir(exist_ok=True)
    if not mode:
        (RUN / "nginx.pid").unlink(missing_ok=True)
    engines = (None if mode else known_engines()) or (SLOT / "engines.conf").read_text(encoding="utf-8")
    (RUN / "engines.conf").write_text(engines + STARTED, encoding="utf-8")
    (RUN / "nginx.conf").write_text("include ../slots/nginx/nginx.conf;\n", encoding="utf-8")
    command = [nginx, "-p", ".", "-e", "stderr", "-c", "run/nginx.conf", "-g", globals_of_this_machine()]
    os.execv(nginx, [*command, *(["-q", "-t"] if mode else [])])  # noqa: S606


def globals_of_this_machine() -> str:
    """What the plan does not know: how many files a process may open, and who runs it, if that is root."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    user = f" user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
    return f"worker_rlimit_nofile {files};{user}"


def known_engines() -> str | None:
    """What the keeper wants in engines.conf; None if it does not answer, or does not know yet."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as keeper:
        keeper.settimeout(KEEPER_S)
        keeper.connect(str(RUN / "keeper.sock"))
        keeper.sendall(b"GET /engines HTTP/1.1\r\nConnection: close\r\n\r\n")
        head, _, body = b"".join(iter(lambda: keeper.recv(1 << 16), b"")).partition(b"\r\n\r\n")
        return body.decode() if head.startswith(b"HTTP/1.1 200 ") else None
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
