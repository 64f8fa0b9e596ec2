"""What set-up shows while it works: live lines on a terminal, plain lines elsewhere."""

from __future__ import annotations

import subprocess
import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

HEARTBEAT_S = 15
NAME_WIDTH = 12
TAIL_LINES = 15


class CommandError(RuntimeError):
    """A command failed; the text has its last lines."""


class Screen:
    """All steps that run at the same time. Thread-safe.

    Args:
        console: where to write; standard error by default, so that output can be piped.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(min_width=NAME_WIDTH)),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(ratio=1, overflow="ellipsis")),
            console=self.console,
            expand=True,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._steps: dict[str, Step] = {}
        self._closed = threading.Event()
        self.stopping = threading.Event()
        self.processes: set[subprocess.Popen[str]] = set()

    def __enter__(self) -> Self:
        self._live.start()
        if not self.console.is_terminal:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._live.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Show a step from its begin to its end."""
        task = self._live.add_task(escape(name), total=None, status="")
        step = self._steps[name] = Step(self, name, task, self._live)
        try:
            yield step
        finally:
            self._steps.pop(name, None)
            self._live.remove_task(task)

    def say(self, name: str, text: str) -> None:
        """A line that stays."""
        self.console.print(f"{name:<{NAME_WIDTH}} {text}", markup=False)

    def stop(self) -> None:
        """Have no step begin anything new, and end the commands that run."""
        self.stopping.set()
        for process in list(self.processes):
            process.terminate()

    def _beat(self) -> None:
        """Without a terminal, show every so often that slow steps are alive."""
        while not self._closed.wait(HEARTBEAT_S):
            for step in list(self._steps.values()):
                self.say(step.name, f"… {time.monotonic() - step.started:.0f} s {step.last}")


class Step:
    """One step's lines."""

    def __init__(self, screen: Screen, name: str, task: TaskID, live: Progress) -> None:
        self.name = name
        self.started = time.monotonic()
        self.last = ""
        self._screen = screen
        self._task = task
        self._live = live

    @property
    def stopping(self) -> bool:
        """Whether the user has asked to stop."""
        return self._screen.stopping.is_set()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._screen.say(self.name, text)

    def status(self, text: str) -> None:
        """What the step is at; replaces the status before."""
        self.last = text.strip()[:100]
        self._live.update(self._task, status=self.last)

    def run(
        self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Run a command; each line it prints is the step's status.

        Returns:
            Its standard output and error, the last lines only.

        Raises:
            CommandError: it cannot be started, or its exit code is not 0.
        """
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            with subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=env,
                cwd=cwd,
            ) as process:
                self._screen.processes.add(process)
                if self._screen.stopping.is_set():  # set while this one started
                    process.terminate()
                for line in process.stdout or ():
                    if line.strip():
                        tail.append(line.rstrip())
                        self.status(line)
            self._screen.processes.discard(process)
        except OSError as error:
            raise CommandError(f"{command[0]}: {error.strerror}") from None
        if process.returncode:
            raise CommandError(
                f"{' '.join(map(str, command[:3]))} … ended with exit code {process.returncode}:\n" + "\n".join(tail)
            )
        return "\n".join(tail)
