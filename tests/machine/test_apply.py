"""Taking a machine from one bundle to another: real supervisord, real agent, engines that start in no time."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request

import psutil
import pytest
from fleet_agent.apply import differences
from fleet_agent.machine import AgentError
from fleet_agent.machine import Bundle as StoredBundle
from fleet_agent.supervise import machine_processes

from tests.machine.nodes import EngineNode


def stored(node: EngineNode, digest: str) -> StoredBundle:
    return StoredBundle(node.machine.bundles / digest)


def test_a_new_machine_ends_with_every_engine_ready(node: EngineNode) -> None:
    bundle = node.bundle("good")

    node.apply(bundle)

    assert {row["state"] for row in node.engines().values()} == {"ready"}
    assert [node.ready_status(1), node.ready_status(2)] == [200, 200]
    assert differences(node.machine, stored(node, bundle.digest)) == []
    assert node.machine.current.resolve().name == bundle.digest


def test_the_same_bundle_again_touches_nothing(node: EngineNode) -> None:
    node.apply(node.bundle("good"))
    before = {p.program: p.pid for p in node.supervisor.processes()}
    node.said.clear()

    node.apply(node.bundle("good"))

    assert node.said == []
    assert {p.program: p.pid for p in node.supervisor.processes()} == before


def test_engines_move_one_by_one_and_one_is_always_ready(node: EngineNode) -> None:
    node.apply(node.bundle("good"))
    seen: list[list[int]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.append([node.ready_status(1), node.ready_status(2)])

    watcher = threading.Thread(target=watch)
    watcher.start()
    node.apply(node.bundle("better"))
    ended.set()
    watcher.join()

    assert all(200 in pair for pair in seen)
    assert any(404 in pair for pair in seen), "each engine is drained before it stops"
    assert {row["weights"] for row in node.engines().values()} == {"better"}


def test_what_is_in_flight_is_finished_before_an_engine_stops(node: EngineNode) -> None:
    node.apply(node.bundle("good", engines=1))
    answers: list[str] = []

    def ask() -> None:
        url = f"http://127.0.0.1:{node.ports[1]}/v1/completions"
        body = json.dumps({"hold": True}).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            answers.append(json.load(answer)["weights"])

    client = threading.Thread(target=ask)
    client.start()
    node.until("the request is in the engine", lambda: node.engines()["chat-1"]["running"] == 1)
    change = threading.Thread(target=node.apply, args=(node.bundle("better", engines=1),))
    change.start()
    node.until("the engine drains", lambda: node.engines()["chat-1"]["state"] == "draining")
    urllib.request.urlopen(f"http://127.0.0.1:{node.ports[1]}/release", data=b"", timeout=5).close()
    client.join()
    change.join()

    assert answers == ["good"]
    assert node.engines()["chat-1"]["weights"] == "better"


@pytest.mark.parametrize("behaviour", ["dies-on-request", "exits"])
def test_an_engine_that_does_not_get_ready_brings_the_old_bundle_back(node: EngineNode, behaviour: str) -> None:
    good = node.bundle("good")
    node.apply(good)
    node.weights("bad", behaviour)

    with pytest.raises(AgentError, match="chat-1"):
        node.apply(node.bundle("bad"))

    assert {row["weights"] for row in node.engines().values()} == {"good"}
    assert {row["state"] for row in node.engines().values()} == {"ready"}
    assert differences(node.machine, stored(node, good.digest)) == []


def test_an_engine_that_dies_at_its_first_request_is_reported_and_never_ready(node: EngineNode) -> None:
    node.weights("bad", "dies-on-request")

    with pytest.raises(AgentError, match="crashes again and again"):
        node.apply(node.bundle("bad", engines=1))

    row = node.engines()["chat-1"]
    assert row["crash_loop"]
    assert "warm-up" in row["last_error"]
    assert node.ready_status(1) == 503
    node.apply(node.bundle("good", engines=1))
    assert node.ready_status(1) == 200


def test_engines_are_added_and_removed_without_touching_the_others(node: EngineNode) -> None:
    node.apply(node.bundle("good", engines=1))
    pid = node.engines()["chat-1"]["pid"]

    node.apply(node.bundle("good", engines=3))
    assert set(node.engines()) == {"chat-1", "chat-2", "chat-3"}
    node.apply(node.bundle("good", engines=1))

    node.until("the agent forgets them", lambda: set(node.engines()) == {"chat-1"})
    assert node.engines()["chat-1"]["pid"] == pid
    assert {p.program for p in node.supervisor.processes()} == {"agent", "chat-1"}


def test_a_run_that_was_killed_halfway_is_finished_by_the_next_one(node: EngineNode) -> None:
    node.apply(node.bundle("good"))
    better = node.bundle("better")
    folder = node.machine.store(better.files)
    node.machine.point("chat-1", folder / "programs" / "chat-1")  # moved, and not restarted: the worst moment
    assert differences(node.machine, stored(node, better.digest)) != []

    node.apply(better)

    assert {row["weights"] for row in node.engines().values()} == {"better"}


def test_a_file_edited_by_hand_is_noticed_and_mended(node: EngineNode) -> None:
    bundle = node.bundle("good", engines=1)
    node.apply(bundle)
    (node.machine.slots / "chat-1" / "engine.json").write_text("{}")
    assert differences(node.machine, stored(node, bundle.digest)) == ["file programs/chat-1/engine.json was edited"]

    node.apply(bundle)

    assert differences(node.machine, stored(node, bundle.digest)) == []


def test_a_process_that_was_stopped_by_hand_is_noticed_and_started(node: EngineNode) -> None:
    bundle = node.bundle("good", engines=1)
    node.apply(bundle)
    node.supervisor.stop("chat-1")
    assert differences(node.machine, stored(node, bundle.digest)) == ["process chat-1 is stopped"]

    node.apply(bundle)

    assert node.ready_status(1) == 200


def test_orphans_of_a_killed_process_manager_are_ended_and_all_comes_back(node: EngineNode) -> None:
    bundle = node.bundle("good", engines=1)
    node.apply(bundle)
    orphans = {process.pid for process in machine_processes(node.machine.root)}
    daemon = int((node.machine.run / "supervisord.pid").read_text())
    os.kill(daemon, signal.SIGKILL)
    node.until("supervisord is gone", lambda: not psutil.pid_exists(daemon))
    assert differences(node.machine, stored(node, bundle.digest)) == ["the machine is down"]

    node.apply(bundle)

    assert node.ready_status(1) == 200
    assert not orphans & {process.pid for process in machine_processes(node.machine.root)}


def test_halt_leaves_no_process(node: EngineNode) -> None:
    node.apply(node.bundle("good"))

    node.supervisor.halt(30, node.said.append)

    assert machine_processes(node.machine.root) == []
