"""The agent on a live machine: faults of engines, and of the agent itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import urllib.request

import psutil
import pytest
from fleet_agent.serve import LOOK_S, OWN_PROCESS

from tests.machine.nodes import EngineNode


def test_a_killed_engine_is_out_at_once_and_comes_back_by_itself(node: EngineNode) -> None:
    node.apply(node.bundle("good"))
    pid = node.engines()["chat-1"]["pid"]

    os.kill(pid, signal.SIGKILL)

    node.until("it is out", lambda: node.ready_status(1) == 503)
    assert node.ready_status(2) == 200
    node.until("it is back", lambda: node.ready_status(1) == 200)
    assert node.engines()["chat-1"]["pid"] != pid
    assert node.engines()["chat-1"]["starts"] == 2


def test_a_stopped_engine_is_out_and_is_restarted_when_it_stays_so(node: EngineNode) -> None:
    node.apply(node.bundle("good"))
    pid = node.engines()["chat-1"]["pid"]

    os.kill(pid, signal.SIGSTOP)

    node.until("it is out", lambda: node.ready_status(1) == 503)
    assert node.engines()["chat-1"]["state"] == "silent"
    node.until("another process serves", lambda: node.engines()["chat-1"]["pid"] not in (pid, None))
    node.until("it is back", lambda: node.ready_status(1) == 200)


def test_an_engine_whose_tokens_do_not_move_is_restarted(node: EngineNode) -> None:
    node.apply(node.bundle("good", engines=1))
    pid = node.engines()["chat-1"]["pid"]

    def ask() -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{node.ports[1]}/v1/completions", b'{"hold": true}')
        request.add_header("content-type", "application/json")
        with contextlib.suppress(OSError):  # it is killed under this request
            urllib.request.urlopen(request, timeout=30).close()

    client = threading.Thread(target=ask)
    client.start()
    node.until("it is restarted", lambda: node.engines()["chat-1"]["pid"] not in (pid, None))
    client.join()

    metrics = urllib.request.urlopen(f"http://127.0.0.1:{node.ports[0]}/metrics", timeout=5).read().decode()
    assert 'fleet_engine_wedged_total{engine="chat-1",model="chat"} 1.0' in metrics


def agents_without(node: EngineNode, killed: set[int]) -> int:
    return sum(p.state == "RUNNING" and p.pid not in killed for p in node.supervisor.of("agent"))


def test_a_killed_agent_refuses_no_check_and_forgets_nothing(node: EngineNode) -> None:
    node.apply(node.bundle("good"))
    node.ask("/drain?engine=chat-2", "POST")
    node.until("both agents run", lambda: sum(p.state == "RUNNING" for p in node.supervisor.of("agent")) == 2)
    answers: list[tuple[int, int] | None] = []
    ended = threading.Event()

    def check() -> None:
        while not ended.is_set():
            try:
                answers.append((node.ready_status(1), node.ready_status(2)))
            except ConnectionError:  # the answer that the killed one owed
                answers.append(None)

    checker = threading.Thread(target=check)
    checker.start()
    killed: set[int] = set()
    try:
        for _ in range(4):  # the working one and the standby, twice each
            pid = next(process.pid for process in node.supervisor.of("agent") if process.pid not in killed)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
            node.until("it is back", lambda: agents_without(node, killed) == 2)
    finally:
        ended.set()
        checker.join()

    assert set(answers) <= {(200, 404), None}
    assert all(pair != (None, None) for pair in itertools.pairwise(answers)), "one lost check takes no engine out"
    assert node.engines()["chat-1"]["starts"] == 1


def test_drain_and_undrain(node: EngineNode) -> None:
    node.apply(node.bundle("good"))

    node.ask("/drain?engine=chat-1", "POST")
    assert node.ready_status(1) == 404
    node.until("it is drained", lambda: node.ready_status(1) == 404 and bool(node.engines()["chat-1"]["drained"]))

    node.ask("/undrain?engine=chat-1", "POST")
    assert node.ready_status(1) == 200


def known_part(node: EngineNode, pid: int) -> psutil.Process:
    """The engine's part, once the agent has had time to look at it: it looks while the engine is ready."""
    node.until("the agent has looked", lambda: node.engines()["chat-1"]["since_s"] > 3 * LOOK_S)
    return next(process for process in psutil.Process(pid).children() if process.name().startswith(OWN_PROCESS))


@pytest.mark.skipif(sys.platform != "linux", reason="a process can be given a name through /proc only on Linux")
def test_an_engine_of_which_a_part_died_is_ended_and_comes_back(node: EngineNode) -> None:
    node.weights("parts", "has-a-part")
    node.apply(node.bundle("parts", engines=1))
    pid = node.engines()["chat-1"]["pid"]
    part = known_part(node, pid)

    part.kill()

    node.until("another process serves", lambda: node.engines()["chat-1"]["pid"] not in (pid, None))
    node.until("it is back", lambda: node.ready_status(1) == 200)
    assert "one of its processes died" in (node.machine.log / "agent.log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="a process can be given a name through /proc only on Linux")
def test_an_engine_that_is_told_to_stop_is_left_to_finish(node: EngineNode) -> None:
    node.weights("parts", "has-a-part")
    node.apply(node.bundle("parts", engines=1))
    known_part(node, node.engines()["chat-1"]["pid"])

    node.supervisor.stop("chat-1")

    node.until("it is stopped", lambda: node.engines()["chat-1"]["state"] == "stopped")
    assert "one of its processes died" not in (node.machine.log / "agent.log").read_text()
