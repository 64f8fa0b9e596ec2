"""`pulumi up`, `refresh` and `destroy` on the local target, and what interrupts them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleets import Fleet, a_fleet


def kill_group(process: subprocess.Popen[str]) -> None:
    """As a power cut would: pulumi, its plugins and what they started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def unlock(fleet: Fleet) -> None:
    """What `make up` and `make down` do first: a run that was killed leaves its lock behind."""
    fleet.run(sys.executable, "-m", "toolchain", "heal", "--stack", fleet.stack)


def test_up_again_changes_nothing_and_destroy_leaves_nothing(fleet: Fleet) -> None:
    fleet.up()
    assert fleet.in_rotation() == {"chat-1", "chat-2"}
    pids = fleet.processes()

    assert "unchanged" in fleet.up()
    assert "~" not in fleet.run(*fleet.pulumi("preview", "--expect-no-changes"))
    assert fleet.processes() == pids

    fleet.destroy()
    assert fleet.processes() == []
    assert not (fleet.folder / fleet.stack).exists()
    fleet.up()
    assert fleet.post("/v1/chat/completions", {"model": "chat", "messages": []})[0] == 200


def test_up_mends_what_broke_without_a_refresh_and_refresh_says_what_it_is(fleet: Fleet) -> None:
    fleet.up()
    fleet.supervisor("engine").stop("chat-2")
    configuration = fleet.machine("gateway").slots / "haproxy" / "haproxy.cfg"
    configuration.write_text(configuration.read_text() + "# edited by hand\n")
    os.kill(int((fleet.machine("monitor").run / "supervisord.pid").read_text()), signal.SIGKILL)

    refreshed = fleet.run(*fleet.pulumi("refresh", "--yes", "--skip-preview", "--diff"))
    assert "process chat-2 is stopped" in refreshed
    assert "file programs/haproxy/haproxy.cfg was edited" in refreshed
    assert "the machine is down" in refreshed

    fleet.up()
    assert fleet.in_rotation() == {"chat-1", "chat-2"}
    assert "edited by hand" not in configuration.read_text()
    assert fleet.supervisor("monitor").alive()
    fleet.run(*fleet.pulumi("preview", "--expect-no-changes"))


def test_up_after_a_reboot_brings_everything_back(fleet: Fleet) -> None:
    fleet.up()
    for pid in fleet.processes():
        os.kill(pid, signal.SIGKILL)
    fleet.until("everything is gone", lambda: fleet.processes() == [])

    fleet.up()

    assert fleet.in_rotation() == {"chat-1", "chat-2"}


def test_a_destroy_that_was_killed_is_finished_by_the_next_one(fleet: Fleet) -> None:
    fleet.up()
    destroy = fleet.start(*fleet.pulumi("destroy", "--yes", "--skip-preview"))
    fleet.until("it is under way", lambda: not fleet.machine("engine").root.is_dir() or not fleet.engines())
    kill_group(destroy)

    unlock(fleet)
    fleet.destroy()

    assert fleet.processes() == []
    assert not (fleet.folder / fleet.stack).exists()


def test_an_up_that_was_killed_is_finished_by_the_next_one(fleet: Fleet) -> None:
    up = fleet.start(*fleet.pulumi("up", "--yes", "--skip-preview"))
    fleet.until("an engine runs", lambda: bool(fleet.engines()))
    kill_group(up)

    unlock(fleet)
    fleet.up()

    assert fleet.in_rotation() == {"chat-1", "chat-2"}


def test_destroy_also_ends_what_a_killed_first_up_left_and_pulumi_does_not_know(fleet: Fleet) -> None:
    up = fleet.start(*fleet.pulumi("up", "--yes", "--skip-preview"))
    fleet.until("an engine runs", lambda: bool(fleet.engines()))
    kill_group(up)
    assert fleet.processes() != []

    unlock(fleet)
    fleet.destroy()

    assert fleet.processes() == []


def test_two_stacks_on_one_machine_do_not_meet(fleet: Fleet, shared: Path) -> None:
    with a_fleet("other", shared) as other:
        fleet.up()
        other.up()
        other.destroy()

    assert fleet.in_rotation() == {"chat-1", "chat-2"}


def test_a_port_that_is_taken_is_an_error_in_preview_that_names_its_owner(fleet: Fleet) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", fleet.base_port + 80))
        taken.listen()

        said = fleet.fails(*fleet.pulumi("preview"))

    assert f"port {fleet.base_port + 80}, for gateway, is taken by" in said
    assert f"(process {os.getpid()})" in said
    assert "base-port" in said


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a full disk takes root to make")
def test_a_full_disk_is_an_error_that_says_so(fleet: Fleet) -> None:
    machines = fleet.folder / fleet.stack / "machines"
    machines.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(machines)], check=True)
    try:
        said = fleet.fails(*fleet.pulumi("up", "--yes", "--skip-preview"))
        assert "No space left on device" in said
        assert "make room" in said
    finally:
        fleet.end()
        subprocess.run(["umount", "--lazy", str(machines)], check=True)


def test_an_update_whose_engine_dies_at_its_first_request_fails_and_the_old_one_serves_on(fleet: Fleet) -> None:
    fleet.up()
    fleet.configure(context=1000)  # to the engine that stands in here, a poison

    said = fleet.fails(*fleet.pulumi("up", "--yes", "--skip-preview"))

    assert "chat-1 crashes again and again" in said or "chat-1 does not start" in said
    assert "going back to bundle" in said
    assert fleet.in_rotation() == {"chat-1", "chat-2"}
    fleet.configure()
    fleet.up()
    assert fleet.in_rotation() == {"chat-1", "chat-2"}
