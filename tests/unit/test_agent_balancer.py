"""What HAProxy's new workers are told of the servers."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

import pytest
from fleet_agent import balancer
from fleet_agent.balancer import merge_states


def row(server: str, port: int, state: int) -> str:
    """A line of HAProxy's server-state format, version 1: 25 columns."""
    columns = [
        "3",
        "model-chat",
        "1",
        server,
        "127.0.0.1",
        str(state),
        *["0"] * 12,
        str(port),
        *["0"] * 2,
        "9090",
        "0",
        "0",
        "0",
    ]
    return " ".join(columns)


RUNNING = "\n".join(["1", "# be_id be_name srv_id srv_name", row("chat-1", 9001, 2), row("chat-2", 9002, 2), ""])


def test_a_known_server_keeps_its_state_and_a_new_one_starts_down() -> None:
    initial = "\n".join(["1", row("chat-1", 9001, 0), row("chat-3", 9003, 0), ""])
    assert merge_states(RUNNING, initial).splitlines() == ["1", row("chat-1", 9001, 2), row("chat-3", 9003, 0)]


def test_a_server_on_another_port_is_another_server() -> None:
    initial = "\n".join(["1", row("chat-1", 9101, 0), ""])
    assert merge_states(RUNNING, initial).splitlines() == ["1", row("chat-1", 9101, 0)]


def test_a_master_that_takes_up_a_reload_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes its socket and opens it again; a key that goes must go all the same."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, socket.socket(socket.AF_UNIX) as master:
        run, asked = Path(folder), list[str]()
        master.bind(str(run / balancer.MASTER))  # bound, and not listening: refused
        ask = balancer.command

        def command(run: Path, line: str, listener: str = balancer.SOCKET) -> str:
            try:
                return ask(run, line, listener)
            except ConnectionRefusedError:
                asked.append(line)
                master.listen()
                threading.Thread(target=answer, args=(master,), daemon=True).start()
                raise

        monkeypatch.setattr(balancer, "command", command)
        balancer.revoke(run, "# nothing\n")
        assert asked == ["show proc"]


def answer(master: socket.socket) -> None:
    connection, _ = master.accept()
    with connection:
        connection.recv(100)
        connection.sendall(b"#<PID> <type>\n1 master 0 0\n")
