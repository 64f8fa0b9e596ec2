"""The machine's process manager, as the rest of this package sees it. Here it is supervisord, over its XML-RPC socket.

supervisord does not adopt processes: when it is killed, what it ran lives on and holds the ports. `boot` ends such
orphans before it starts a new one; it knows them by the environment variable that a machine's processes inherit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport

from fleet_agent.machine import AgentError, Machine

MARK = "FLEET_MACHINE"
"""Environment variable of every process of a machine; its value is the machine's folder."""
BOOT_S = 20
ORPHAN_S = 45
"""How long orphans may take to finish what they are at: an engine ends its requests when it is told to stop."""
LIVE = ("STARTING", "RUNNING")
BAD_NAME, ALREADY_STARTED, NOT_RUNNING = 10, 60, 70


@dataclass(frozen=True)
class Process:
    """What the process manager says of one process."""

    program: str
    state: str
    """supervisord's own names: STARTING, RUNNING, BACKOFF, STOPPING, STOPPED, EXITED, FATAL."""
    pid: int
    description: str


class Supervisor:
    """supervisord of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def _call(self, method: str, *arguments: str) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.machine.supervisor_socket}")
        with xmlrpc.client.ServerProxy("http://localhost", transport) as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    def alive(self) -> bool:
        """Whether supervisord answers."""
        try:
            return bool(self._call("getState")["statecode"] == 1)
        except (OSError, HTTPException, xmlrpc.client.Error):
            return False

    def boot(self, say: Callable[[str], None]) -> bool:
        """Start supervisord if it does not run; it starts every program that has a slot. Repeatable.

        Returns:
            Whether it had to be started.

        Raises:
            AgentError: it does not come up.
        """
        machine = self.machine
        machine.prepare()
        if self.alive():
            return False
        end_processes(machine.root, ORPHAN_S, say)
        machine.supervisor_socket.unlink(missing_ok=True)
        config = machine.root / "supervisord.conf"
        shutil.copyfile(Path(__file__).parents[2] / "machine" / "supervisord.conf", config)
        started = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", config],
            cwd=machine.root,
            env={**os.environ, MARK: str(machine.root), "PYTHONDONTWRITEBYTECODE": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if started.returncode or not wait_for(self.alive, BOOT_S):
            raise AgentError(f"the process manager of {machine.root} did not start: {started.stderr or started.stdout}")
        return True

    def halt(self, timeout_s: float, say: Callable[[str], None]) -> None:
        """Stop every program and supervisord itself; nothing of the machine runs afterwards."""
        if self.alive():
            with contextlib.suppress(OSError, HTTPException, xmlrpc.client.Error):
                self._call("shutdown")
            wait_for(lambda: not machine_processes(self.machine.root), timeout_s)
        end_processes(self.machine.root, ORPHAN_S, say)

    def processes(self) -> list[Process]:
        """Every process that supervisord knows; an empty list when it does not answer."""
        try:
            rows: list[dict[str, Any]] = self._call("getAllProcessInfo")
        except (OSError, HTTPException, xmlrpc.client.Error):
            return []
        return [Process(r["group"], r["statename"], r["pid"], r["description"] or r["spawnerr"]) for r in rows]

    def of(self, program: str) -> list[Process]:
        """The processes of one program: one, or two where it has a standby."""
        return [process for process in self.processes() if process.program == program]

    def stop(self, program: str) -> None:
        """Stop a program and wait for it: its own stop signal, and SIGKILL after its own deadline."""
        with _expected(BAD_NAME, NOT_RUNNING):
            self._call("stopProcessGroup", program)

    def start(self, program: str) -> None:
        """Start a program with the unit that its slot holds now; it may be new, changed, stopped or given up on."""
        self.forget(program)
        self._call("addProcessGroup", program)

    def forget(self, program: str) -> None:
        """Take a stopped program out of supervisord, and let it read the units of all slots again."""
        self._call("reloadConfig")
        with _expected(BAD_NAME):
            self._call("removeProcessGroup", program)

    def signal(self, program: str, name: str) -> None:
        """Send a signal, without its SIG, to the main process of a program."""
        with _expected(BAD_NAME, NOT_RUNNING):
            self._call("signalProcessGroup", program, name)

    def tail(self, program: str, lines: int = 15) -> str:
        """The end of a program's log."""
        try:
            text = (self.machine.log / f"{program}.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:])


@contextlib.contextmanager
def _expected(*codes: int) -> Any:
    """Let pass the faults that only say it is done already."""
    try:
        yield
    except xmlrpc.client.Fault as fault:
        if fault.faultCode not in codes:
            raise


def marked(variable: str, value: str) -> list[psutil.Process]:
    """Every other live process that has `variable=value` in its environment, whoever is its parent by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended meanwhile, or another user's
            if process.pid != os.getpid() and process.environ().get(variable) == value and running(process):
                found.append(process)
    return found


def running(process: psutil.Process) -> bool:
    """Whether a process is there and has not ended."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def machine_processes(root: Path) -> list[psutil.Process]:
    """Every process that belongs to a machine."""
    return [*marked(MARK, str(root)), *_untitled(root)]


def _untitled(root: Path) -> list[psutil.Process]:
    """A machine's nginx: it writes its title over its environment, and is known by the folder that it works in."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("nginx") and process.cwd() == str(root) and running(process):
                found.append(process)
    return found


def end_processes(root: Path, timeout_s: float, say: Callable[[str], None]) -> None:
    """End what is left of a machine: first kindly, then not."""
    left = machine_processes(root)
    if not left:
        return
    say(f"ending {len(left)} processes that the machine left behind")
    # Main processes only: an engine's API server ends its workers itself, after they have finished their requests.
    pids = {process.pid for process in left}
    send([process for process in left if _parent(process) not in pids], signal.SIGTERM)
    wait_for(lambda: not machine_processes(root), timeout_s)
    send(machine_processes(root), signal.SIGKILL)
    if not wait_for(lambda: not machine_processes(root), BOOT_S):
        raise AgentError(f"processes of {root} cannot be killed: {[p.pid for p in machine_processes(root)]}")


def _parent(process: psutil.Process) -> int | None:
    with contextlib.suppress(psutil.Error):
        return int(process.ppid())
    return None


def send(processes: Iterable[psutil.Process], sig: signal.Signals) -> None:
    """Send a signal to those of the processes that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(sig)


def wait_for(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.1) -> bool:
    """Poll until a condition holds; False when it did not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True
