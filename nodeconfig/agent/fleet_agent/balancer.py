"""Take up a changed HAProxy configuration without dropping a connection.

HAProxy's master starts new workers on SIGUSR2 and lets the old ones finish. New workers believe every server to be up
until they have checked it, so what the old ones know is written to the server-state file first; a server that they do
not know starts out of rotation, as the configuration's own servers.state has it.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import tempfile
from configparser import RawConfigParser
from pathlib import Path

from fleet_agent.machine import AgentError, Machine
from fleet_agent.supervise import Supervisor, wait_for

SOCKET = "haproxy.sock"
MASTER = "master.sock"
"""Where HAProxy's master listens; it passes on what is for a certain worker."""
STATE = "haproxy.state"
KEYS = "slots/haproxy/keys.map"
"""What HAProxy calls the file of the keys' hashes."""
LEAVING = "experimental-mode on; set var proc.leaving bool(true)"
"""From then on a load balancer hears that this gateway is not well. The command is experimental in 2.6 and 2.8."""
RELOAD_S = 15
SIGNALS = 3
IDENTITY = (1, 3, 4, 18, 21)
"""Columns be_name, srv_name, srv_addr, srv_port, srv_check_port of HAProxy's server-state format."""

SRV_RECORD = 19
"""Column srvrecord: the name whose SRV records have the server; - where it stands in the configuration."""


def command(run: Path, line: str, listener: str = SOCKET) -> str:
    """One command on a socket of HAProxy's, the stats socket if none is named, and its answer.

    Raises:
        OSError: HAProxy does not listen there.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(run / listener))
        connection.sendall(line.encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def check(machine: Machine, folder: Path) -> None:
    """Let HAProxy read the configuration in a program folder.

    Raises:
        AgentError: it refuses it; the text holds HAProxy's own words.
    """
    unit = RawConfigParser(interpolation=None)
    unit.read(folder / "program.ini")
    command_line = shlex.split(unit.get(unit.sections()[0], "command"))
    binary = next(part for part in command_line if Path(part).is_absolute() and Path(part).name.startswith("haproxy"))
    # The configuration names its files as slots/haproxy/..., so it is read from a folder in which that is the new one.
    trial = machine.run / f"check.{os.getpid()}"
    (trial / "slots").mkdir(parents=True)
    (trial / "run").symlink_to(machine.run)
    (trial / "slots" / folder.name).symlink_to(folder)
    # Where several gateways count together, what the machine knows of them; or as long as that is nothing, the default.
    known = "run" if (machine.run / "peers.cfg").exists() else f"slots/{folder.name}"
    peers = ("-f", f"{known}/peers.cfg") if (folder / "peers.cfg").exists() else ()
    try:
        result = subprocess.run(
            [binary, "-c", *peers, "-f", f"slots/{folder.name}/haproxy.cfg"],
            cwd=trial,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for link in (trial / "slots" / folder.name, trial / "run"):
            link.unlink()
        (trial / "slots").rmdir()
        trial.rmdir()
    if result.returncode:
        raise AgentError(
            f"HAProxy refuses the new configuration, the old one goes on:\n{result.stderr or result.stdout}"
        )


def check_nginx(machine: Machine, folder: Path) -> None:
    """Let nginx read the configuration in a program folder.

    Raises:
        AgentError: it refuses it; the text holds nginx's own words.
    """
    unit = RawConfigParser(interpolation=None)
    unit.read(folder / "program.ini")
    command_line = shlex.split(unit.get(unit.sections()[0], "command"))
    # As above; and run/ is a new one, as the list of engines in the machine's own belongs to the old configuration.
    with tempfile.TemporaryDirectory(prefix="check.", dir=machine.run) as name:
        trial = Path(name)
        (trial / "slots").mkdir()
        (trial / "slots" / folder.name).symlink_to(folder)
        result = subprocess.run([*command_line, "check"], cwd=trial, capture_output=True, text=True, check=False)
    if result.returncode:
        raise AgentError(f"nginx refuses the new configuration, the old one goes on:\n{result.stderr or result.stdout}")


def reload(machine: Machine, supervisor: Supervisor, program: str) -> None:
    """Make the running HAProxy read its slot again.

    Raises:
        AgentError: the new workers did not take over.
    """
    before = _worker(machine.run)
    initial = (machine.slots / program / "servers.state").read_text(encoding="ascii")
    revoke(machine.run, (machine.slots / program / "keys.map").read_text(encoding="ascii"))
    state = merge_states(command(machine.run, "show servers state"), initial)
    (machine.run / STATE).write_text(state, encoding="ascii")
    for _ in range(SIGNALS):  # a master that is just starting loses the signal
        supervisor.signal(program, "USR2")
        if wait_for(lambda: _worker(machine.run) not in ("", before), RELOAD_S / SIGNALS):
            return
    raise AgentError("HAProxy did not take up the new configuration; its old workers go on")


def revoke(run: Path, keys: str) -> None:
    """Let the workers that run, also those that are on their way out, forget the keys that a new keys.map lacks.

    After a reload a worker still has clients' idle connections, and answers one more request on each (`option
    idle-close-on-response`). It must not do that for a key that was revoked.
    """
    still = {line.split()[0] for line in keys.splitlines() if line and not line.startswith("#")}
    rows = [row.split() for row in _of_master(run, "show proc").splitlines()]
    for worker in (row[0] for row in rows if row[1:2] == ["worker"]):
        for row in _of_master(run, f"@!{worker} show map {KEYS}").splitlines():
            match row.split():
                case [_, sha256, _] if sha256 not in still:
                    _of_master(run, f"@!{worker} del map {KEYS} {sha256}")


def _of_master(run: Path, line: str) -> str:
    """A command to the master, which does not listen while it takes up a reload.

    Raises:
        OSError: it does not listen at all.
    """
    answers: list[str] = []

    def asked() -> bool:
        try:
            answers.append(command(run, line, MASTER))
        except (ConnectionError, FileNotFoundError):
            return False
        return True

    if not wait_for(asked, RELOAD_S):
        raise ConnectionRefusedError(f"HAProxy's master does not listen on {run / MASTER}")
    return answers[0]


def merge_states(running: str, initial: str) -> str:
    """The servers of `initial`, each with the state that it has in `running` if it is the same server there.

    Both are HAProxy's server-state format, version 1. The same server: backend, name, address, port and check port; a
    row with another port would win over the configuration. Servers that were found by DNS are in no configuration: they
    keep their state and their address, so that a reload does without a nameserver.
    """
    known = _rows(running)
    found = [row for row in known.values() if row.split()[SRV_RECORD].startswith("_")]
    return "\n".join(["1", *(known.get(server, row) for server, row in _rows(initial).items()), *found, ""])


def _rows(text: str) -> dict[tuple[str, ...], str]:
    rows = [row for row in text.splitlines() if len(row.split()) > max(IDENTITY) and not row.startswith("#")]
    return {tuple(row.split()[column] for column in IDENTITY): row for row in rows}


def _worker(run: Path) -> str:
    """Process id of the worker that answers now, "" if none does."""
    try:
        rows = command(run, "show info").splitlines()
    except OSError:
        return ""
    return next((row.partition(":")[2].strip() for row in rows if row.startswith("Pid:")), "")
