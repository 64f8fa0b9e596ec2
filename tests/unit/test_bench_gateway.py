"""The gateway's benchmark: its engine, its arithmetic and its verdicts. What it measures is not tested here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.gateway.engine import Pace
from bench.gateway.gateways import Cores, Missing, Scene, plan_of, start_engines
from bench.gateway.load import (
    Arrival,
    ClosedLoop,
    OneByOne,
    OpenLoop,
    Streams,
    arrivals,
    closes,
    complete,
    percentile,
    request,
)
from bench.gateway.measure import PLAIN
from bench.gateway.report import targets, text
from bench.gateway.soak import NOWHERE, PACE, Engine, Kind, Outcome, Soak

Start = Callable[..., list[int]]


@pytest.fixture
def engines() -> Iterator[Start]:
    """Start fake engines; they end with the test."""
    running = []

    def start(pace: Pace, count: int = 1) -> list[int]:
        process, ports = start_engines(pace, count, 0)
        running.append(process)
        return ports

    yield start
    for process in running:
        process.stop()
        assert process.process.stdout
        process.process.stdout.close()


class TestEngine:
    def test_it_answers_and_streams(self, engines: Start) -> None:
        (port,) = engines(Pace())
        loop = ClosedLoop(port, 2, [request()])
        while not loop.run(0.01):
            pass
        assert loop.failed == 0
        loop.close()
        client = OneByOne(port, request(stream=True, tokens=3))
        assert client.first_token_s() > 0
        client.close()

    def test_a_stream_has_as_many_tokens_as_were_asked_for(self, engines: Start) -> None:
        (port,) = engines(Pace(token_ms=1))
        streams = Streams(port, request(stream=True, tokens=5))
        streams.add(3)
        while streams.tokens < 3 * 6:  # and the end
            streams.run(30, until_begun=None if streams.tokens else 3)
            streams.run(0.05)
        assert (streams.tokens, streams.broken) == (18, 0)
        streams.close()

    def test_a_seed_is_a_pace(self, engines: Start) -> None:
        (port,) = engines(Pace())
        streams = Streams(port, request(stream=True, tokens=5, token_ms=1_000_000))
        streams.add(1)
        streams.run(30, until_begun=1)
        assert streams.tokens == 1
        streams.close()

    def test_what_does_not_fit_waits(self, engines: Start) -> None:
        (port,) = engines(Pace(slots=1, prompt_ms=100))
        client = OpenLoop(port, "")
        client.run([Arrival(0, 0, 1)] * 3, 30)
        assert client.failed == 0
        assert [first >= least for first, least in zip(sorted(client.first), (0.1, 0.2, 0.3), strict=True)] == [
            True
        ] * 3

    def test_a_slow_port_is_slow(self, engines: Start) -> None:
        (port,) = engines(Pace(slots=1, prompt_ms=50, speeds=[0.5]))
        client = OpenLoop(port, "")
        client.run([Arrival(0, 0, 1)], 30)
        assert client.first[0] >= 0.1


class TestLoad:
    def test_a_request_is_as_long_as_asked_and_names_the_model_last(self) -> None:
        head, _, body = request("chat", body_bytes=4000, key="k", session="s").partition(b"\r\n\r\n")
        assert len(body) == 4000
        assert list(json.loads(body))[:2] == ["messages", "model"]
        assert b"Authorization: Bearer k" in head
        assert b"Content-Length: 4000" in head

    @pytest.mark.parametrize(
        ("answer", "whole"),
        [
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", True),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", False),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", True),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", False),
            (b"HTTP/1.1 200 OK\r\n", False),
        ],
    )
    def test_when_an_answer_is_whole(self, answer: bytes, *, whole: bool) -> None:
        assert complete(answer) is whole

    def test_who_closes_says_so(self) -> None:
        assert closes(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        assert not closes(b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\nConnection: close\r\n\r\n")

    def test_the_same_arrivals_for_everyone(self) -> None:
        load = arrivals(50, 100, 40, 200)
        assert load == arrivals(50, 100, 40, 200)
        assert 4500 < len(load) < 5500
        assert 38 < sum(one.tokens for one in load) / len(load) < 42

    def test_percentile(self) -> None:
        values = [float(n * 37 % 100) for n in range(100)]
        assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1)] == [50, 95, 99, 99]


class TestPlan:
    def test_the_gateway_is_the_planners(self) -> None:
        plan = plan_of(Scene({"chat": range(9000, 9064), "code": [9100]}, 9200, concurrency=8))
        assert [engine.port for engine in plan.engines] == [*range(9000, 9064), 9100]
        assert plan.gateway.route_by_body
        assert plan.gateway.maxconn >= 65 * 8
        assert dict(plan.gateway.server_maxconn) == {"chat": 8, "code": 8}

    def test_what_a_proxy_cannot_do_is_missing_with_a_reason(self) -> None:
        with pytest.raises(Missing, match="model"):
            plan_of(Scene({"chat": [9000], "code": [9001]}, 9200), "nginx")


def found(us: float = 50, p95: float = 300) -> dict[str, dict[str, dict[str, Any]]]:
    cost = {"spread_us": 1, "rps": 1e4, "core_busy": 1, "failed": 0}
    skew = {"p50_ms": 100, "p99_ms": 900, "failed": 0}
    return {
        "cost": {
            "haproxy, 3 models": {"us_per_request": us, **cost},
            "haproxy, 1 model": {"us_per_request": 40, **cost},
            "haproxy, 64 engines": {"us_per_request": 42, **cost},
            "vllm-router, nearest to ours": {"us_per_request": 110, **cost},
        },
        "first-token": {"haproxy, 3 models": {"added_p50_ms": 0.2, "added_p99_ms": 0.4}},
        "skew": {
            f"haproxy, {PLAIN}": {"p95_ms": 9000, **skew},
            "haproxy, least-loaded": {"p95_ms": p95, **skew},
            "vllm-router, power_of_two": {"p95_ms": 310, **skew},
            "vllm-router, cache_aware": {"p95_ms": 3100, **skew},
        },
    }


class TestReport:
    def test_all_good(self) -> None:
        assert [one.verdict for one in targets(found()) if one.binding] == ["met"] * 5

    def test_what_is_missed_is_said(self) -> None:
        missed = [one.what for one in targets(found(us=60, p95=320)) if one.binding and not one.met]
        assert len(missed) == 2
        assert "nearest" in missed[0]
        assert "best" in missed[1]
        assert "MISSED" in text(found(us=60), {}, {})

    def test_what_could_not_be_measured_is_not_met(self) -> None:
        some = found()
        del some["cost"]["vllm-router, nearest to ours"]
        assert {one.verdict for one in targets(some) if one.binding} == {"met", "not measured"}
        assert "Not measured: vllm-router: no network" in text(some, {"vllm-router": "no network"}, {})


class TestSoakVerdict:
    @pytest.mark.parametrize(
        ("place", "error", "excused"),
        [
            ("chat-0", "502", True),
            ("127.0.0.1:7000", "502", True),
            ("chat-1", "502", False),
            (NOWHERE, "ServerDisconnectedError", True),
            (NOWHERE, "503", False),
        ],
    )
    def test_only_what_was_at_the_killed_engine_may_fail(
        self, tmp_path: Path, place: str, error: str, *, excused: bool
    ) -> None:
        kind = Kind("stream", 1, 3)
        run = soak(tmp_path, Outcome(0, kind, begun=99.9, ended=100.2, error=error), place)
        allowed, others = run.judge()
        assert (allowed.total(), len(others)) == ((1, 0) if excused else (0, 1))

    def test_nor_what_began_after_it_died(self, tmp_path: Path) -> None:
        run = soak(tmp_path, Outcome(0, Kind("stream", 1, 3), begun=100.5, ended=101, error="502"), "chat-0")
        assert len(run.judge()[1]) == 1

    def test_nor_more_than_it_had(self, tmp_path: Path) -> None:
        run = soak(tmp_path, Outcome(0, Kind("stream", 1, 3), begun=99.9, ended=100.2, error="502"), "chat-0")
        run.outcomes *= 2 * PACE.slots + 1
        run.judge()
        assert len(run.problems) == 1


def soak(root: Path, outcome: Outcome, place: str) -> Soak:
    """One that is over: chat-0 was killed at 100, the only request was at `place`."""
    (root / "log").mkdir()
    line = (
        json.dumps({"id": outcome.request_id, "engine": place}) if place != NOWHERE else "[NOTICE] a line of HAProxy's"
    )
    (root / "log/haproxy.log").write_text(line + "\n")
    run = Soak(root, "haproxy", Cores(0, 0, 0))
    run.plan = plan_of(Scene({"chat": [7000, 7001]}, 7002, concurrency=PACE.slots))
    run.outcomes = [outcome]
    run.kills = [(Engine("chat-0", 0, port=7000), 100.0)]
    return run
