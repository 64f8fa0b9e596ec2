"""Start an engine: check its weights against the digests of the lock, then become vLLM.

A mismatch refuses to start and says which file. Processes that an earlier run of the same engine left behind are ended
first: when vLLM's API server is killed, its workers may live on and hold the memory that the new ones need.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from fleet_agent import verified
from fleet_agent.supervise import marked, running, send, wait_for

PROGRAM = "FLEET_PROGRAM"
"""Environment variable of an engine's processes; its value is the path of the file that it was started from."""
REFUSED = 78  # EX_CONFIG of sysexits.h
GONE_S = 10
LONGEST_FOLDER = 60
"""vLLM adds a name of 37 characters; 108 is the limit, and its libraries may add something too."""


def start(file: Path) -> NoReturn:
    """Become the engine that `file` describes; exits with 78 if its weights are not what they must be."""
    engine: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    identity = str(file.absolute())
    end_leftovers(identity)
    folder = Path(engine["weights"]["folder"])
    problems = check_weights(folder, expected_files(engine["weights"]))
    if problems:
        sys.stderr.write(
            f"{engine['name']} does not start: its weights in {folder} are not what models.lock.yaml says\n"
            + "".join(f"  {problem}\n" for problem in problems)
            + "Delete that folder and run `pulumi up`: it fetches them again.\n"
        )
        raise SystemExit(REFUSED)
    # vLLM renames its processes, and the renaming would overwrite the environment that they are known by.
    environment = {**os.environ, PROGRAM: identity, "SPT_NOENV": "1"}
    environment.pop("PYTHONPATH", None)  # the agent's code is no business of vLLM's
    environment.update(temporary_folder(Path.cwd() / "run" / engine["name"]))
    command = [str(part) for part in engine["command"]]
    sys.stdout.write(f"starting {' '.join(command)}\n")
    sys.stdout.flush()
    os.execve(command[0], command, environment)  # noqa: S606 - that is the point


def temporary_folder(folder: Path) -> dict[str, str]:
    """An empty folder for the engine's temporary files, so that a killed one leaves none behind.

    vLLM's processes talk over sockets in it, and a socket's path is short: in a deep one it is the system's.
    """
    if len(str(folder)) > LONGEST_FOLDER:
        return {}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {"TMPDIR": str(folder)}


def expected_files(weights: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file: from the lock, or from what was recorded when the entry was made here."""
    if weights["files"] is not None:
        return dict(weights["files"])
    return dict(json.loads(Path(weights["record"]).read_text(encoding="utf-8")))


def check_weights(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What differs between a folder and `{path: {"size": bytes, "sha256": hex}}`, one line a file."""
    problems = []
    known = verified.read(folder)  # what was hashed while it came, and is as it was then: 70 GB take minutes
    for path, fact in sorted(files.items()):
        file = folder / path
        try:
            size = file.stat().st_size
            if size != fact["size"]:
                problems.append(f"{path}: {size} bytes, must be {fact['size']}")
                continue
            if known.get(path) == fact["sha256"]:
                continue
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        if found != fact["sha256"]:
            problems.append(f"{path}: SHA-256 {found}, must be {fact['sha256']}")
    return problems


def end_leftovers(identity: str) -> None:
    """Kill what an earlier start of the same engine left running."""
    left = marked(PROGRAM, identity)
    for process in left:
        sys.stdout.write(f"ending process {process.pid}, left over from an earlier start\n")
    send(left, signal.SIGKILL)
    wait_for(lambda: not any(running(process) for process in left), GONE_S)
