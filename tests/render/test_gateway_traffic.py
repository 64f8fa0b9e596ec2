"""Streams, queues, failures and reloads: what happens to requests while things change."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from infra.plan.model import EnginePlan, FleetPlan
from tests.render.fakes import FakeEngine
from tests.render.gateways import AUTH, IN_TIME_S, Fleet, StartFleet, until


def open_stream(fleet: Fleet, chunks: int) -> tuple[httpx.Response, Iterator[str], FakeEngine]:
    """A stream of which the first chunk has arrived."""
    request = fleet.client.build_request(
        "POST", "/v1/completions", headers=AUTH | {"X-Fake": f"stream {chunks}"}, json={}
    )
    opened = {name: engine.open for name, engine in fleet.engines.items()}
    with ThreadPoolExecutor(1) as one:
        sending = one.submit(fleet.client.send, request, stream=True)
        until("the stream is open", lambda: any(e.open > opened[name] for name, e in fleet.engines.items()))
        engine = next(e for name, e in fleet.engines.items() if e.open > opened[name])
        engine.permit()
        response = sending.result(IN_TIME_S)
    lines = response.iter_lines()
    assert next(lines) == f"data: 0 {engine.name}"
    next(lines)
    return response, lines, engine


def finish(response: httpx.Response, lines: Iterator[str], engine: FakeEngine, chunks: int) -> None:
    """The rest of a stream, to its proper end."""
    engine.permit(chunks)
    rest = [line for line in lines if line]
    assert rest == [f"data: {n} {engine.name}" for n in range(1, chunks)]
    response.close()


def hold(fleet: Fleet, pool: ThreadPoolExecutor, count: int) -> list[Future[httpx.Response]]:
    """Requests that engines keep open until they are permitted to answer."""
    asked = [pool.submit(fleet.ask, do="hold") for _ in range(count)]
    until("all are open", lambda: sum(engine.open for engine in fleet.engines.values()) == count)
    return asked


def release(fleet: Fleet, asked: list[Future[httpx.Response]]) -> None:
    for engine in fleet.engines.values():
        engine.permit(len(asked))
    assert [future.result(IN_TIME_S).status_code for future in asked] == [200] * len(asked)


def downs(fleet: Fleet) -> dict[str, int]:
    """How often each server has gone down since HAProxy started."""
    rows = [line.split(",") for line in fleet.gateway.command("show stat").removeprefix("# ").splitlines() if line]
    name, column = rows[0].index("svname"), rows[0].index("chkdown")
    return {row[name]: int(row[column]) for row in rows[1:] if row[name] in fleet.engines}


class TestStreams:
    def test_each_chunk_arrives_before_the_next_is_sent(self, fleet: Fleet) -> None:
        response, lines, engine = open_stream(fleet, 20)
        for n in range(1, 20):
            engine.permit()
            assert next(lines) == f"data: {n} {engine.name}"
            next(lines)
        assert list(lines) == []
        assert response.headers["content-type"] == "text/event-stream"

    def test_a_client_that_leaves_ends_the_stream_in_the_engine(self, fleet: Fleet) -> None:
        response, _, engine = open_stream(fleet, 20)
        response.close()
        until("the engine's request is cancelled", lambda: (engine.aborted, engine.open) == (1, 0))

    def test_so_does_one_that_leaves_before_the_first_token(self, fleet: Fleet) -> None:
        port = fleet.gateway.plan.gateway.port
        head = "".join(f"{name}: {value}\r\n" for name, value in {**AUTH, "X-Fake": "hold", "Host": "x"}.items())
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}Content-Length: 2\r\n\r\n{{}}".encode())
            until("an engine has it", lambda: sum(engine.open for engine in fleet.engines.values()) == 1)
        until("it is cancelled", lambda: sum(engine.aborted for engine in fleet.engines.values()) == 1)

    def test_and_one_that_leaves_the_queue_never_gets_there(
        self, start_fleet: StartFleet, pool: ThreadPoolExecutor
    ) -> None:
        fleet = start_fleet(engines=1, gateway={"server_maxconn": (("chat", 1),)})
        held = hold(fleet, pool, 1)
        port = fleet.gateway.plan.gateway.port
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"Authorization: {AUTH['Authorization']}\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}"
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode())
            until("it waits", lambda: fleet.gateway.queued("chat") == 1)
        until("it has left", lambda: fleet.gateway.queued("chat") == 0)
        release(fleet, held)
        assert len(fleet.engines["chat-0"].seen) == 1


class TestReadiness:
    def test_the_agent_is_asked_about_the_port_that_requests_go_to(self, fleet: Fleet) -> None:
        assert set(fleet.agent.asked) == {engine.port for engine in fleet.engines.values()}
        assert all(f"name=model-chat/{name}" in "".join(fleet.agent.headers) for name in fleet.engines)

    def test_nothing_is_sent_before_the_first_good_answer(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(ready=False)
        fleet.agent.sleep()  # no check ever completes
        assert [fleet.ask().status_code for _ in range(20)] == [503] * 20
        assert all(engine.seen == [] for engine in fleet.engines.values())
        fleet.mark(chat_0=200, chat_1=404)
        fleet.agent.wake()
        fleet.gateway.await_states(chat_0="UP")
        assert {fleet.ask().json()["engine"] for _ in range(10)} == {"chat-0"}

    def test_404_drains(self, fleet: Fleet) -> None:
        response, lines, engine = open_stream(fleet, 10)
        other = next(name for name in fleet.engines if name != engine.name)
        fleet.mark(**{engine.name.replace("-", "_"): 404})
        fleet.gateway.await_states(**{engine.name.replace("-", "_"): "NOLB"})
        assert {fleet.ask().json()["engine"] for _ in range(10)} == {other}
        finish(response, lines, engine, 10)
        fleet.mark(**{engine.name.replace("-", "_"): 200})
        fleet.gateway.await_states(**{engine.name.replace("-", "_"): "UP"})
        assert {fleet.ask().json()["engine"] for _ in range(10)} == set(fleet.engines)

    def test_503_is_out_and_cuts_no_stream(self, fleet: Fleet) -> None:
        response, lines, engine = open_stream(fleet, 10)
        fleet.mark(**{engine.name.replace("-", "_"): 503})
        fleet.gateway.await_states(**{engine.name.replace("-", "_"): "DOWN"})
        assert engine.name not in {fleet.ask().json()["engine"] for _ in range(10)}
        finish(response, lines, engine, 10)

    def test_an_agent_that_restarts_takes_nothing_out(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(timings={"check_ms": 100, "check_fast_ms": 50})
        before, went_down = dict(fleet.agent.asked), downs(fleet)
        fleet.agent.sleep()
        until("both checks wait", lambda: all(fleet.agent.asked[port] > before[port] for port in before))
        gone = time.monotonic()
        until("ten checks would have failed", lambda: time.monotonic() - gone > 1)
        assert fleet.ask().status_code == 200
        before = dict(fleet.agent.asked)
        fleet.agent.wake()
        until("checks go on", lambda: all(fleet.agent.asked[port] > before[port] for port in before))
        assert downs(fleet) == went_down

    def test_an_agent_that_stays_away_takes_all_out(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(timings={"check_ms": 100, "check_fast_ms": 50, "check_timeout_ms": 200})
        fleet.agent.sleep()
        fleet.gateway.await_states(chat_0="DOWN", chat_1="DOWN")


class TestRetries:
    def test_a_refused_connection_goes_to_another_engine(self, fleet: Fleet) -> None:
        fleet.engines["chat-0"].stop()  # the agent has not noticed: it still says 200
        assert {fleet.ask().json()["engine"] for _ in range(20)} == {"chat-1"}
        until("all are logged", lambda: len(fleet.gateway.requests()) == 20)
        assert max(line["total_ms"] for line in fleet.gateway.requests()) < fleet.gateway.plan.timings.connect_ms

    def test_even_if_most_engines_died_at_once(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(engines=4)
        fleet.agent.sleep()  # a lost node takes its agent along: no check says anything
        for name in ("chat-0", "chat-1", "chat-2"):
            fleet.engines[name].stop()
        assert {fleet.ask().json()["engine"] for _ in range(20)} == {"chat-3"}

    def test_a_full_engine_is_passed_over(self, fleet: Fleet) -> None:
        fleet.engines["chat-0"].full = True
        assert {fleet.ask().json()["engine"] for _ in range(10)} == {"chat-1"}

    def test_if_all_are_full_the_engines_503_comes_through(self, fleet: Fleet) -> None:
        for engine in fleet.engines.values():
            engine.full = True
        answer = fleet.ask()
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the engine's queue is full"
        assert int(answer.headers["retry-after"]) >= 1

    def test_what_an_engine_began_is_never_sent_again(self, fleet: Fleet, pool: ThreadPoolExecutor) -> None:
        (asked,) = hold(fleet, pool, 1)
        engine = next(engine for engine in fleet.engines.values() if engine.open)
        engine.stop()
        assert asked.result(IN_TIME_S).status_code == 502
        assert sum(len(engine.seen) for engine in fleet.engines.values()) == 1

    def test_a_stream_that_breaks_ends_broken(self, fleet: Fleet) -> None:
        _, lines, engine = open_stream(fleet, 10)
        engine.stop()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        assert sum(len(engine.seen) for engine in fleet.engines.values()) == 1


class TestLoad:
    def test_least_loaded_goes_where_less_is_open(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(engines=4)
        held = hold(fleet, pool, 12)
        assert [engine.open for engine in fleet.engines.values()] == [3, 3, 3, 3]
        fleet.engines["chat-2"].permit(3)
        until("chat-2 is free", lambda: fleet.engines["chat-2"].open == 0)
        assert fleet.ask().json()["engine"] == "chat-2"
        release(fleet, held)

    def test_round_robin_takes_turns(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(engines=3, gateway={"routing": "round-robin"})
        served = [fleet.ask().json()["engine"] for _ in range(6)]
        assert served[:3] == served[3:]
        assert len(set(served)) == 3

    def test_an_engine_gets_no_more_than_its_share(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(gateway={"server_maxconn": (("chat", 3),)})
        asked = [pool.submit(fleet.ask, do="hold") for _ in range(10)]
        until("the engines are full", lambda: [engine.open for engine in fleet.engines.values()] == [3, 3])
        until("the rest waits", lambda: fleet.gateway.queued("chat") == 4)
        release(fleet, asked)
        assert [engine.most_open for engine in fleet.engines.values()] == [3, 3]

    def test_who_waits_too_long_is_told_when_to_return(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(engines=1, gateway={"server_maxconn": (("chat", 1),)}, timings={"queue_s": 1})
        held = hold(fleet, pool, 1)
        answer = fleet.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        release(fleet, held)
        until("both are logged", lambda: {line["end"] for line in fleet.gateway.requests()} == {"--", "sQ"})

    def test_a_full_queue_turns_away_at_once(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(engines=1, gateway={"server_maxconn": (("chat", 1),), "queue": 2})
        held = hold(fleet, pool, 1)
        waiting = [pool.submit(fleet.ask, do="hold") for _ in range(2)]
        until("the queue is full", lambda: fleet.gateway.queued("chat") == 2)
        answer = fleet.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert not any(future.done() for future in waiting)
        release(fleet, held + waiting)

    def test_a_freed_engine_serves_the_queue(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(engines=1, gateway={"server_maxconn": (("chat", 1),)})
        held = hold(fleet, pool, 1)
        waiting = pool.submit(fleet.ask)
        until("it waits", lambda: fleet.gateway.queued("chat") == 1)
        release(fleet, held)
        assert waiting.result(IN_TIME_S).status_code == 200


@contextmanager
def under_load(fleet: Fleet, clients: int = 6) -> Iterator[Callable[[int], None]]:
    """Clients that ask without pause; in the block, `more(n)` waits for n more answers. Every answer must be good."""
    stop = threading.Event()
    done = [0] * clients
    failed: list[str] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=fleet.gateway.url, timeout=IN_TIME_S) as client:
            while not stop.is_set():
                try:
                    answer = client.post("/v1/completions", headers=AUTH, json={})
                    if answer.status_code != 200:
                        failed.append(f"{answer.status_code} {answer.text}")
                except httpx.HTTPError as error:
                    failed.append(repr(error))
                done[number] += 1

    def more(count: int) -> None:
        before = sum(done)
        until(f"{count} more answers", lambda: sum(done) >= before + count)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield more
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []


def with_timing(plan: FleetPlan, **timings: int) -> FleetPlan:
    return plan.model_copy(update={"timings": plan.timings.model_copy(update=timings)})


class TestReload:
    def test_under_load_nothing_fails_and_the_drained_stay_drained(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(engines=3)
        streams = [open_stream(fleet, 10) for _ in range(3)]
        fleet.mark(chat_1=404, chat_2=503)
        fleet.gateway.await_states(chat_0="UP", chat_1="NOLB", chat_2="DOWN")
        before = {name: len(fleet.engines[name].seen) for name in ("chat-1", "chat-2")}
        fleet.agent.sleep()  # so that only what was carried over can keep them out
        with under_load(fleet) as more:
            more(20)
            for n in range(5):
                fleet.gateway.reload(with_timing(fleet.gateway.plan, queue_s=31 + n))
                assert {name: state.split()[0] for name, state in fleet.gateway.servers().items()} == {
                    "chat-0": "UP",
                    "chat-1": "NOLB",
                    "chat-2": "DOWN",
                }
                more(20)
        assert {name: len(fleet.engines[name].seen) for name in before} == before
        for stream in streams:
            finish(*stream, 10)

    def test_a_new_engine_waits_for_its_first_good_answer(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet()
        plan = fleet.gateway.plan
        extra = FakeEngine(fleet.agent.loop, name="chat-2").start()
        try:
            fleet.agent.sleep()
            engine = EnginePlan(name="chat-2", model="chat", port=extra.port, flags=(), environment=())
            fleet.gateway.reload(plan.model_copy(update={"engines": (*plan.engines, engine)}))
            assert fleet.gateway.servers() == {"chat-0": "UP", "chat-1": "UP", "chat-2": "DOWN"}
            fleet.agent.status[extra.port] = 200
            fleet.agent.wake()
            fleet.gateway.await_states(chat_2="UP")
        finally:
            fleet.gateway.stop()
            extra.stop()

    def test_an_engine_that_moved_is_found_at_its_new_port(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(engines=1)
        plan, url = fleet.gateway.plan, f"{fleet.gateway.url}/v1/completions"
        moved = FakeEngine(fleet.agent.loop, name="moved").start()
        try:
            fleet.agent.status[moved.port] = 200
            engine = plan.engines[0].model_copy(update={"port": moved.port})
            fleet.gateway.reload(plan.model_copy(update={"engines": (engine,)}))
            fleet.gateway.await_states(chat_0="UP")
            # For some milliseconds the old worker takes connections too.
            until("it is found", lambda: httpx.post(url, headers=AUTH, json={}).json().get("engine") == "moved")
        finally:
            fleet.gateway.stop()
            moved.stop()

    def test_keys_change_with_a_reload(self, fleet: Fleet) -> None:
        plan = fleet.gateway.plan
        fleet.gateway.reload(plan.model_copy(update={"gateway": plan.gateway.model_copy(update={"keys": ()})}))
        url = f"{fleet.gateway.url}/v1/completions"
        until("the key is no longer good", lambda: httpx.post(url, headers=AUTH, json={}).status_code == 401)


class TestProcess:
    def test_the_admin_socket_is_its_owners_alone(self, fleet: Fleet) -> None:
        assert stat.S_IMODE((fleet.gateway.root / "run/haproxy.sock").stat().st_mode) == 0o600

    def test_a_stop_finishes_streams_and_takes_nothing_new(self, fleet: Fleet) -> None:
        response, lines, engine = open_stream(fleet, 10)
        process = fleet.gateway.process
        assert process
        process.send_signal(getattr(signal, f"SIG{fleet.gateway.bundle.programs[0].stop_signal}"))

        def closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", fleet.gateway.plan.gateway.port)).close()
            except ConnectionRefusedError:
                return True
            return False

        until("nobody listens", closed)
        assert process.poll() is None
        finish(response, lines, engine, 10)
        fleet.client.close()
        assert process.wait(IN_TIME_S) == 0

    def test_a_stop_does_not_wait_for_ever(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(timings={"gateway_stop_s": 1})
        response, _, _ = open_stream(fleet, 10)
        process = fleet.gateway.process
        assert process
        process.send_signal(signal.SIGUSR1)
        process.wait(IN_TIME_S)
        response.close()

    def test_after_kill_9_it_starts_again_with_nobody_in_rotation(self, fleet: Fleet) -> None:
        fleet.ask()
        gateway = fleet.gateway
        worker = int(gateway.worker())
        assert gateway.process
        gateway.process.kill()
        gateway.process.wait(IN_TIME_S)
        until("the worker has gone too", lambda: not running(worker))
        fleet.agent.sleep()
        gateway.start()
        assert set(gateway.servers().values()) == {"DOWN"}
        fleet.agent.wake()
        gateway.await_states(chat_0="UP", chat_1="UP")
        with httpx.Client(base_url=gateway.url) as client:
            assert client.post("/v1/completions", headers=AUTH, json={}).status_code == 200

    def test_a_killed_worker_ends_the_master_so_that_it_is_started_again(self, fleet: Fleet) -> None:
        assert fleet.gateway.process
        subprocess.run(["kill", "-KILL", fleet.gateway.worker()], check=True)
        assert fleet.gateway.process.wait(IN_TIME_S) != 0


def running(pid: int) -> bool:
    result = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return result.stdout.strip() != "" and not result.stdout.startswith("Z")
