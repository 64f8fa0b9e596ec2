"""The gateway with nginx: streams, readiness, failures, limits and reloads."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from infra.plan.model import EnginePlan, KeyPlan
from tests.render.fakes import FakeEngine
from tests.render.gateways import AUTH, IN_TIME_S, Fleet, StartFleet, until
from tests.render.nginx_gateways import NGINX, NginxGateway
from tests.render.plans import KEYS
from tests.render.test_gateway_api import refused, seen
from tests.render.test_gateway_traffic import finish, hold, open_stream, release, under_load, with_timing


@pytest.fixture
def fleet(start_fleet: StartFleet) -> Fleet:
    """One model, two ready engines."""
    return start_fleet(gateway=NGINX)


def nginx_of(fleet: Fleet) -> NginxGateway:
    assert isinstance(fleet.gateway, NginxGateway)
    return fleet.gateway


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
        until("it is logged", lambda: [line["complete"] for line in fleet.gateway.requests()] == [""])

    def test_so_does_one_that_leaves_before_the_first_token(self, fleet: Fleet) -> None:
        port = fleet.gateway.plan.gateway.port
        head = "".join(f"{name}: {value}\r\n" for name, value in {**AUTH, "X-Fake": "hold", "Host": "x"}.items())
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}Content-Length: 2\r\n\r\n{{}}".encode())
            until("an engine has it", lambda: sum(engine.open for engine in fleet.engines.values()) == 1)
        until("it is cancelled", lambda: sum(engine.aborted for engine in fleet.engines.values()) == 1)
        until("it is logged", lambda: [line["status"] for line in fleet.gateway.requests()] == [499])

    def test_a_slow_upload_takes_no_place_in_an_engine(self, fleet: Fleet) -> None:
        port = fleet.gateway.plan.gateway.port
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"Authorization: {AUTH['Authorization']}\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}{{".encode())
            assert fleet.ask().status_code == 200
            assert len(seen(fleet)) == 1
            connection.sendall(b"}")
            assert connection.recv(12) == b"HTTP/1.1 200"


class TestReadiness:
    def test_nothing_is_sent_before_the_first_good_answer(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, ready=False)
        fleet.agent.sleep()  # no check ever completes
        assert [fleet.ask().status_code for _ in range(20)] == [503] * 20
        assert seen(fleet) == []
        fleet.mark(chat_0=200, chat_1=404)
        fleet.agent.wake()
        fleet.gateway.await_states(chat_0="UP")
        assert {fleet.ask().json()["engine"] for _ in range(10)} == {"chat-0"}

    @pytest.mark.parametrize("status", [404, 503])
    def test_one_that_drains_or_is_out_gets_nothing_new_and_finishes(self, fleet: Fleet, status: int) -> None:
        response, lines, engine = open_stream(fleet, 10)
        other = next(name for name in fleet.engines if name != engine.name)
        fleet.mark(**{engine.name.replace("-", "_"): status})
        fleet.gateway.await_states(**{engine.name.replace("-", "_"): "DOWN"})
        assert {fleet.ask().json()["engine"] for _ in range(10)} == {other}
        finish(response, lines, engine, 10)
        fleet.mark(**{engine.name.replace("-", "_"): 200})
        fleet.gateway.await_states(**{engine.name.replace("-", "_"): "UP"})
        assert {fleet.ask().json()["engine"] for _ in range(10)} == set(fleet.engines)

    def test_one_bad_answer_takes_nothing_out(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, timings={"check_fall": 10**6})
        before = dict(fleet.agent.asked)
        fleet.mark(chat_0=503)
        until("it was asked again and again", lambda: all(fleet.agent.asked[p] > n + 3 for p, n in before.items()))
        assert fleet.gateway.servers() == {"chat-0": "UP", "chat-1": "UP"}

    def test_an_agent_that_restarts_takes_nothing_out(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, timings={"check_ms": 100, "check_fast_ms": 50})
        before, workers = dict(fleet.agent.asked), nginx_of(fleet).workers()
        fleet.agent.sleep()
        until("both checks wait", lambda: all(fleet.agent.asked[port] > before[port] for port in before))
        gone = time.monotonic()
        until("ten checks would have failed", lambda: time.monotonic() - gone > 1)
        assert fleet.ask().status_code == 200
        before = dict(fleet.agent.asked)
        fleet.agent.wake()
        until("checks go on", lambda: all(fleet.agent.asked[port] > before[port] for port in before))
        assert nginx_of(fleet).workers() == workers

    def test_an_agent_that_stays_away_takes_all_out(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, timings={"check_ms": 100, "check_fast_ms": 50, "check_timeout_ms": 200})
        fleet.agent.sleep()
        fleet.gateway.await_states(chat_0="DOWN", chat_1="DOWN")
        refused(fleet.ask(), 503)

    def test_engines_come_and_go_and_no_request_fails(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, engines=3)
        streams = [open_stream(fleet, 10) for _ in range(3)]
        with under_load(fleet) as more:
            for _ in range(4):
                fleet.mark(chat_1=404)
                fleet.gateway.await_states(chat_0="UP", chat_1="DOWN", chat_2="UP")
                more(20)
                fleet.mark(chat_1=200)
                fleet.gateway.await_states(chat_0="UP", chat_1="UP", chat_2="UP")
                more(20)
        for stream in streams:
            finish(*stream, 10)


class TestRetries:
    def test_a_refused_connection_goes_to_another_engine(self, fleet: Fleet) -> None:
        fleet.engines["chat-0"].stop()  # the agent has not noticed: it still says 200
        assert {fleet.ask().json()["engine"] for _ in range(20)} == {"chat-1"}

    def test_even_if_most_engines_died_at_once(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, engines=4)
        fleet.agent.sleep()  # a lost node takes its agent along: no check says anything
        for name in ("chat-0", "chat-1", "chat-2"):
            fleet.engines[name].stop()
        assert {fleet.ask().json()["engine"] for _ in range(20)} == {"chat-3"}

    def test_if_all_are_gone_it_is_503_as_nothing_was_sent(self, fleet: Fleet) -> None:
        fleet.agent.sleep()
        for engine in fleet.engines.values():
            engine.stop()
        for _ in range(4):  # at first a connection is refused, then nginx asks nobody
            answer = fleet.ask()
            assert refused(answer, 503)["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1

    def test_what_an_engine_began_is_never_sent_again(self, fleet: Fleet, pool: ThreadPoolExecutor) -> None:
        (asked,) = hold(fleet, pool, 1)
        engine = next(engine for engine in fleet.engines.values() if engine.open)
        engine.stop()
        assert asked.result(IN_TIME_S).status_code == 502
        assert len(seen(fleet)) == 1

    def test_nor_is_what_an_engine_refuses(self, fleet: Fleet) -> None:
        for engine in fleet.engines.values():
            engine.full = True
        answer = fleet.ask()
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the engine's queue is full"
        assert int(answer.headers["retry-after"]) >= 1
        assert len(seen(fleet)) == 1

    def test_a_stream_that_breaks_ends_broken(self, fleet: Fleet) -> None:
        _, lines, engine = open_stream(fleet, 10)
        engine.stop()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        assert len(seen(fleet)) == 1


class TestLoad:
    def test_least_loaded_goes_where_less_is_open(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(gateway=NGINX, engines=4)
        held = hold(fleet, pool, 12)
        assert [engine.open for engine in fleet.engines.values()] == [3, 3, 3, 3]
        fleet.engines["chat-2"].permit(3)
        until("chat-2 is free", lambda: fleet.engines["chat-2"].open == 0)
        until("nginx knows", lambda: len(fleet.gateway.requests()) == 3)
        assert fleet.ask().json()["engine"] == "chat-2"
        release(fleet, held)

    def test_round_robin_takes_turns(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(engines=3, gateway=NGINX | {"routing": "round-robin"})
        served = [fleet.ask().json()["engine"] for _ in range(6)]
        assert served[:3] == served[3:]
        assert len(set(served)) == 3

    def test_a_session_stays_with_its_engine(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(engines=4, gateway=NGINX | {"routing": "session", "session_header": "X-Chat"})

        def served(session: str) -> str:
            engine: str = fleet.ask(headers={"X-Chat": session}).json()["engine"]
            return engine

        before = {session: served(session) for session in map(str, range(24))}
        assert {session: served(session) for session in before} == before
        assert set(before.values()) == set(fleet.engines)
        fleet.mark(chat_1=503)
        fleet.gateway.await_states(chat_1="DOWN")
        after = {session: served(session) for session in before}
        assert {s for s in before if before[s] != after[s]} == {s for s in before if before[s] == "chat-1"}
        assert {fleet.ask().json()["engine"] for _ in range(40)} == {"chat-0", "chat-2", "chat-3"}

    def test_weights_send_less_to_a_canary(self, start_fleet: StartFleet) -> None:
        gateway = NGINX | {"routing": "round-robin", "server_weights": (("chat-0", 25),)}
        fleet = start_fleet(gateway=gateway)
        served = [fleet.ask().json()["engine"] for _ in range(10)]
        assert served.count("chat-0") == 2

    def test_an_engine_gets_no_more_than_it_runs_and_lets_wait(
        self, start_fleet: StartFleet, pool: ThreadPoolExecutor
    ) -> None:
        fleet = start_fleet(engines=2, gateway=NGINX | {"server_maxconn": (("chat", 2),)})
        places = 2 + fleet.gateway.plan.model("chat").queued
        held = hold(fleet, pool, 30)
        assert [engine.open for engine in fleet.engines.values()] == [15, 15]
        more = [pool.submit(fleet.ask, do="hold") for _ in range(2)]
        until("the two are in", lambda: sum(engine.open for engine in fleet.engines.values()) == 32)
        assert sum(engine.open for engine in fleet.engines.values()) < 2 * places
        release(fleet, [*held, *more])

    def test_what_is_too_much_is_turned_away_at_once(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(engines=1, gateway=NGINX | {"server_maxconn": (("chat", 2),)})
        held = hold(fleet, pool, 2 + fleet.gateway.plan.model("chat").queued)
        answer = fleet.ask()
        assert refused(answer, 503)["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
        release(fleet, held)


def limits(**more: Any) -> dict[str, Any]:
    """One key with limits."""
    ((name, sha256),) = KEYS
    return {**NGINX, "key_limits": (KeyPlan(name=name, sha256=sha256, **more),)}


class TestKeys:
    def test_the_limit_on_open_requests_is_exact(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(gateway=limits(concurrency=5))
        asked = [pool.submit(fleet.ask, do="hold") for _ in range(20)]
        until("the rest has its answer", lambda: sum(future.done() for future in asked) == 15)
        assert sum(engine.open for engine in fleet.engines.values()) == 5
        answers = [future.result() for future in asked if future.done()]
        assert {refused(answer, 429)["code"] for answer in answers} == {"rate_limit_exceeded"}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        release(fleet, [future for future in asked if not future.done()])
        until("their places are free", lambda: fleet.ask().status_code == 200)

    def test_it_outlasts_a_reload(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(gateway=limits(concurrency=3))
        held = hold(fleet, pool, 3)
        fleet.gateway.reload(with_timing(fleet.gateway.plan, queue_s=31))
        refused(fleet.ask(), 429)
        release(fleet, held)
        until("their places are free", lambda: fleet.ask().status_code == 200)

    def test_so_is_that_on_requests_in_a_minute(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(gateway=limits(rpm=20))
        answers = [future.result(IN_TIME_S) for future in [pool.submit(fleet.ask) for _ in range(30)]]
        assert sorted(answer.status_code for answer in answers) == [200] * 20 + [429] * 10
        assert all(30 < int(a.headers["retry-after"]) <= 60 for a in answers if a.status_code == 429)
        assert fleet.client.get("/v1/models", headers=AUTH).status_code == 200
        fleet.gateway.reload(with_timing(fleet.gateway.plan, queue_s=31))
        refused(fleet.ask(), 429)

    def test_the_keeper_that_stands_by_lets_nobody_in_beside(
        self, start_fleet: StartFleet, pool: ThreadPoolExecutor
    ) -> None:
        fleet = start_fleet(gateway=limits(rpm=20))
        nginx_of(fleet).start_keeper()
        until("it waits", lambda: psutil.Process(nginx_of(fleet).keepers[1].pid).status() == psutil.STATUS_SLEEPING)
        answers = [future.result(IN_TIME_S) for future in [pool.submit(fleet.ask) for _ in range(60)]]
        assert sorted(answer.status_code for answer in answers) == [200] * 20 + [429] * 40

    def test_a_key_for_some_models_sees_no_others(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["chat", "embed"], 1, gateway=limits(models=("embed",)))
        assert fleet.ask("/models/embed/v1/completions").status_code == 200
        assert refused(fleet.ask("/models/chat/v1/completions"), 404)["code"] == "model_not_found"
        listed = fleet.client.get("/v1/models", headers=AUTH).json()["data"]
        assert [model["id"] for model in listed] == ["embed"]
        assert len(seen(fleet)) == 1

    @pytest.mark.parametrize(("day", "status"), [("2000-01-01", 401), ("2999-12-31", 200)])
    def test_a_key_is_good_until_its_last_day(self, start_fleet: StartFleet, day: str, status: int) -> None:
        assert start_fleet(gateway=limits(expires=day)).ask().status_code == status

    def test_a_revoked_one_is_refused_without_a_restart(self, fleet: Fleet) -> None:
        response, lines, engine = open_stream(fleet, 10)
        plan = fleet.gateway.plan
        fleet.gateway.reload(plan.model_copy(update={"gateway": plan.gateway.model_copy(update={"keys": ()})}))
        until("the key is no longer good", lambda: fleet.ask().status_code == 401)
        finish(response, lines, engine, 10)


class TestReload:
    def test_under_load_nothing_fails_and_the_drained_stay_drained(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, engines=3)
        streams = [open_stream(fleet, 10) for _ in range(3)]
        fleet.mark(chat_1=404, chat_2=503)
        fleet.gateway.await_states(chat_0="UP", chat_1="DOWN", chat_2="DOWN")
        before = {name: len(fleet.engines[name].seen) for name in ("chat-1", "chat-2")}
        fleet.agent.sleep()  # so that only what was carried over can keep them out
        with under_load(fleet) as more:
            more(20)
            for n in range(5):
                fleet.gateway.reload(with_timing(fleet.gateway.plan, queue_s=31 + n))
                assert fleet.gateway.servers() == {"chat-0": "UP", "chat-1": "DOWN", "chat-2": "DOWN"}
                more(20)
        assert {name: len(fleet.engines[name].seen) for name in before} == before
        for stream in streams:
            finish(*stream, 10)

    def test_a_new_engine_waits_for_its_first_good_answer(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX)
        plan = fleet.gateway.plan
        extra = FakeEngine(fleet.agent.loop, name="chat-2").start()
        fleet.engines["chat-2"] = extra
        fleet.agent.status[extra.port] = 503
        engine = EnginePlan(name="chat-2", model="chat", port=extra.port, flags=(), environment=())
        fleet.gateway.reload(plan.model_copy(update={"engines": (*plan.engines, engine)}))
        assert fleet.gateway.servers() == {"chat-0": "UP", "chat-1": "UP", "chat-2": "DOWN"}
        fleet.mark(chat_2=200)
        fleet.gateway.await_states(chat_2="UP")
        assert {fleet.ask().json()["engine"] for _ in range(9)} == set(fleet.engines)

    def test_a_new_model_and_one_that_goes_are_taken_up(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["chat", "embed"], 1, gateway=NGINX)
        plan = fleet.gateway.plan
        model = plan.models[1].model_copy(update={"name": "coder"})
        engine = plan.engines[1].model_copy(update={"name": "coder-0", "model": "coder"})
        gateway = plan.gateway.model_copy(update={"server_maxconn": (("chat", 16), ("coder", 16))})
        fleet.gateway.reload(
            plan.model_copy(
                update={
                    "models": (plan.models[0], model),
                    "engines": (plan.engines[0], engine),
                    "gateway": gateway,
                }
            )
        )
        fleet.gateway.await_states(chat_0="UP", coder_0="UP")
        assert fleet.ask("/models/coder/v1/completions").json()["engine"] == "embed-0"
        refused(fleet.ask("/models/embed/v1/completions"), 404)


class TestProcess:
    def test_a_stop_finishes_streams_and_takes_nothing_new(self, fleet: Fleet) -> None:
        response, lines, engine = open_stream(fleet, 10)
        process = fleet.gateway.process
        assert process
        process.send_signal(getattr(signal, f"SIG{nginx_of(fleet).program('nginx').stop_signal}"))

        def closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", fleet.gateway.plan.gateway.port)).close()
            except ConnectionRefusedError:
                return True
            return False

        until("nobody listens", closed)
        assert process.poll() is None
        finish(response, lines, engine, 10)
        assert process.wait(IN_TIME_S) == 0

    def test_a_stop_does_not_wait_for_ever(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, timings={"gateway_stop_s": 1})
        response, _, _ = open_stream(fleet, 10)
        process = fleet.gateway.process
        assert process
        process.send_signal(signal.SIGQUIT)
        process.wait(IN_TIME_S)
        response.close()

    def test_after_kill_9_it_starts_again_and_the_keeper_tells_it_who_is_ready(self, fleet: Fleet) -> None:
        gateway = nginx_of(fleet)
        response, lines, engine = open_stream(fleet, 10)
        left = gateway.workers()
        assert gateway.process
        gateway.process.kill()
        gateway.process.wait(IN_TIME_S)
        gateway.start()
        gateway.await_states(chat_0="UP", chat_1="UP")
        finish(response, lines, engine, 10)  # in a worker that the killed master left behind
        until("it has gone then", lambda: not any(psutil.pid_exists(pid) for pid in left))
        assert {fleet.ask().json()["engine"] for _ in range(10)} == set(fleet.engines)

    def test_nginx_that_starts_with_the_right_engines_need_not_read_them_again(self, fleet: Fleet) -> None:
        gateway = nginx_of(fleet)
        assert gateway.process
        gateway.process.kill()
        gateway.process.wait(IN_TIME_S)
        gateway.start()
        gateway.await_states(chat_0="UP", chat_1="UP")
        before = gateway.metrics()
        asked = dict(fleet.agent.asked)
        until("the keeper has looked", lambda: all(fleet.agent.asked[port] > asked[port] + 3 for port in asked))
        assert "fleet_gateway_reloads_total" in before
        assert gateway.metrics() == before

    def test_a_second_keeper_takes_over_at_once(self, fleet: Fleet) -> None:
        gateway = nginx_of(fleet)
        gateway.start_keeper()
        workers = gateway.workers()
        with under_load(fleet) as more:
            more(20)
            gateway.keepers[0].kill()
            more(100)
        assert gateway.keepers[1].poll() is None
        assert gateway.rotation() == ["chat-0", "chat-1"]
        fleet.mark(chat_0=503)
        gateway.await_states(chat_0="DOWN")
        assert not set(workers) & set(gateway.workers())
