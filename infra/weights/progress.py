"""Long work that says how far it is, at least every other second, and the programs that do some of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Say = Callable[[str], None]
INTERVAL_S = 2.0
POLL_S = 0.2
TAIL_LINES = 12


def silent(_text: str) -> None:
    """A `Say` for callers that want no progress."""


def size(count: float) -> str:
    """Bytes for people: `412 bytes`, `93 MB`, `1.2 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}" if count < 10 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f} bytes"


class Progress:
    """Counts bytes; any thread may count, and the one that waits says how many there are."""

    def __init__(self, say: Say, what: str, total: int = 0) -> None:
        self._say = say
        self._what = what
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        self._start = self._said = time.monotonic()

    def add(self, count: int) -> None:
        """So many bytes more."""
        with self._lock:
            self._done += count

    def tick(self) -> None:
        """Say how far it is, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self._said >= INTERVAL_S:
            self._said = now
            amount = f"{size(self._done)} of {size(self._total)}, " if self._total else ""
            self._say(f"{self._what}: {amount}{now - self._start:.0f} s")

    def advance(self, count: int) -> None:
        """So many bytes more, and say it."""
        self.add(count)
        self.tick()


class ProgramError(Exception):
    """A program failed; the text is the end of what it wrote."""


def run(  # noqa: PLR0913 - what a process needs
    command: Sequence[str | Path],
    say: Say,
    what: str,
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    chatty: bool = False,
) -> None:
    """Run a program to its end. What it writes on standard output are the stages of its work, and said as such.

    With `chatty`, what it writes on standard error is said as well; else that is kept for the case that it fails.

    Its standard input stays open for as long as this process lives, so that the program can notice the end of it.

    Raises:
        ProgramError: it failed or could not be started.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if chatty else errors,
                start_new_session=True,
            )
        except OSError as error:
            raise ProgramError(f"{command[0]}: {error.strerror}") from None
        try:
            stages = _follow(process, say, what)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
        if process.returncode != 0:
            errors.seek(0)
            wrote = "\n".join(stages) if chatty else errors.read().decode(errors="replace")
            raise ProgramError(_tail(wrote) or f"{command[0]} ended with {process.returncode}")


def _follow(process: subprocess.Popen[bytes], say: Say, what: str) -> list[str]:
    stages: list[str] = []

    def read(stream: IO[bytes]) -> None:
        stages.extend(line.decode(errors="replace").strip() for line in stream)

    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    start = said = time.monotonic()
    seen = 0
    running = True
    while running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            running = False
        now = time.monotonic()
        if len(stages) > seen or now - said >= INTERVAL_S:
            stage = f", {stages[-1]}" if stages else ""
            say(f"{what}{stage}: {now - start:.0f} s")
            seen, said = len(stages), now
    reader.join(INTERVAL_S)  # a child that outlives it may hold the pipe open
    return stages


def _tail(output: str) -> str:
    # Progress bars overwrite their line: only what stands at the end of one counts.
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in output.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-TAIL_LINES:])
