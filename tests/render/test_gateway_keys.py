"""What a key may do: which models, how often, how much at once, until when; and what a reload does to that."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest

from infra.plan.model import FleetPlan, KeyPlan
from infra.render.gateway import gateway
from tests.render.fakes import FakeEngine
from tests.render.gateways import IN_TIME_S, Fleet, Gateway, StartFleet, tool, until
from tests.render.plans import a_layout, a_plan, counter

MODELS = ("chat", "embed", "coder")
TODAY = dt.datetime.now(dt.UTC).date()
CLIENTS = 8


def key_of(name: str) -> str:
    return f"sk-fleet-key-of-{name}"


def auth(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(name)}"}


def keys(**limits: dict[str, Any]) -> dict[str, Any]:
    """Fields of the gateway's plan: a key for each name, with those limits."""
    plans = tuple(
        KeyPlan(name=name, sha256=hashlib.sha256(key_of(name).encode()).hexdigest(), **limit)
        for name, limit in sorted(limits.items())
    )
    return {"keys": tuple((key.name, key.sha256) for key in plans), "key_limits": plans}


def with_keys(plan: FleetPlan, **limits: dict[str, Any]) -> FleetPlan:
    return plan.model_copy(update={"gateway": plan.gateway.model_copy(update=keys(**limits))})


def files(models: tuple[str, ...] = ("chat",), **limits: dict[str, Any]) -> dict[str, str]:
    rendered = gateway(a_plan(models, gateway=keys(**limits)), a_layout()).files
    return {path.removeprefix("programs/haproxy/"): text for path, text in rendered.items()}


def ask(fleet: Fleet, name: str, model: str = "chat", **more: Any) -> httpx.Response:
    return fleet.ask(headers=auth(name), content=json.dumps({"messages": [], "model": model}).encode(), **more)


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error in OpenAI's shape, or the test fails."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (name, body), *more = answer.json().items()
    assert (name, more) == ("error", [])
    assert set(body) == {"message", "type", "param", "code"}
    return dict(body)


def seen(fleet: Fleet) -> int:
    return sum(len(engine.seen) for engine in fleet.engines.values())


def running(fleet: Fleet) -> int:
    return sum(engine.open for engine in fleet.engines.values())


def begun(fleet: Fleet) -> dict[str, int]:
    """Requests that were counted, by key and minute."""
    rows = fleet.gateway.command("show table keys/begun")
    return {name: int(count) for name, count in re.findall(r"key=(\S+) .* gpc0=(\d+)", rows)}


class TestRendering:
    @pytest.mark.parametrize("models", [1, 3])
    def test_haproxy_takes_it_without_a_warning(self, root: Any, models: int) -> None:
        limits = keys(a={"rpm": 5}, b={"concurrency": 2}, c={"models": ("chat",)}, d={"expires": "2030-01-31"})
        plan = a_plan(MODELS[:models], port=counter(20000), gateway=limits)
        result = Gateway(root, plan, tool("haproxy")).check()
        assert result.returncode == 0, result.stderr
        assert not re.search("WARNING|ALERT", result.stderr), result.stderr

    def test_what_no_key_has_is_not_there(self) -> None:
        differ = {path for path, text in files(a={}).items() if files().get(path) != text}
        assert differ == {"keys.map", "manifest.json"}
        assert "peers" not in files(a={"expires": "2030-01-31"})["haproxy.cfg"]
        assert "peers" in files(a={"rpm": 1})["haproxy.cfg"]

    def test_with_one_model_no_limit_reads_a_body(self) -> None:
        text = files(a={"rpm": 5, "concurrency": 2, "expires": "2030-01-31"})["haproxy.cfg"]
        assert "req.body," not in text
        assert "json_query" not in text

    def test_the_last_day_is_whole(self) -> None:
        assert files(a={"expires": "2030-01-31"})["expires.map"].splitlines()[1] == "a 1896134400"
        assert dt.datetime.fromtimestamp(1896134400, dt.UTC).isoformat() == "2030-02-01T00:00:00+00:00"

    def test_keys_for_the_same_models_share_what_is_rendered(self) -> None:
        rendered = files(MODELS, a={"models": ("chat",)}, b={"models": ("chat",)}, c={"models": ("chat", "embed")})
        assert [name for name in rendered if re.fullmatch(r"models-\d+\.json", name)] == [
            "models-1.json",
            "models-2.json",
        ]
        assert rendered["key-models.map"].splitlines()[1:] == ["a 1", "b 1", "c 2"]
        assert rendered["may-use.map"].splitlines()[1:] == ["1/chat chat", "2/chat chat", "2/embed embed"]


class TestModels:
    @pytest.fixture
    def fleet(self, start_fleet: StartFleet) -> Fleet:
        return start_fleet(
            MODELS, 1, gateway=keys(some={"models": ("chat", "embed")}, one={"models": ("chat",)}, any={})
        )

    def test_the_list_has_what_the_key_may_use(self, fleet: Fleet) -> None:
        listed = {
            name: [model["id"] for model in fleet.client.get("/v1/models", headers=auth(name)).json()["data"]]
            for name in ("some", "one", "any")
        }
        assert listed == {"some": ["chat", "embed"], "one": ["chat"], "any": list(MODELS)}

    def test_another_model_is_as_one_that_is_not_there(self, fleet: Fleet) -> None:
        assert ask(fleet, "some", "embed").json()["engine"] == "embed-0"
        assert ask(fleet, "any", "coder").json()["engine"] == "coder-0"
        before = seen(fleet)
        refused = ask(fleet, "some", "coder")
        assert error(refused, 404)["code"] == "model_not_found"
        assert refused.text.replace("coder", "x") == ask(fleet, "some", "x").text
        assert seen(fleet) == before

    @pytest.mark.parametrize("model", ["coder", r"cod\u0065r", "1/chat", "2/coder", "chat ", "embed\\u0000", ""])
    def test_however_it_is_written(self, fleet: Fleet, model: str) -> None:
        body = f'{{"messages": [], "model": "{model}"}}'.encode()
        answer = fleet.ask(headers=auth("one"), content=body)
        assert answer.status_code in {400, 404}, answer.text
        assert seen(fleet) == 0

    def test_the_path_gives_no_more(self, fleet: Fleet) -> None:
        assert ask(fleet, "one", path="/models/chat/v1/completions").status_code == 200
        refused = ask(fleet, "one", path="/models/coder/v1/completions")
        assert error(refused, 404)["code"] == "model_not_found"
        assert seen(fleet) == 1


class TestRequestsPerMinute:
    RPM = 10

    def test_exactly_as_many_are_let_in(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(gateway=keys(a={"rpm": self.RPM}, b={"rpm": 1000}, free={}))

        def client(_: int) -> list[httpx.Response]:
            return [ask(fleet, "a") for _ in range(self.RPM)]

        answers = [answer for answers in pool.map(client, range(CLIENTS)) for answer in answers]
        assert Counter(answer.status_code for answer in answers) == {200: self.RPM, 429: self.RPM * (CLIENTS - 1)}
        assert seen(fleet) == self.RPM
        refused = next(answer for answer in answers if answer.status_code != 200)
        assert error(refused, 429)["code"] == "rate_limit_exceeded"
        assert f"may begin {self.RPM}." in error(refused, 429)["message"]
        assert {ask(fleet, name).status_code for name in ("b", "free")} == {200}, "each key has a limit of its own"

    def test_what_is_refused_does_not_count(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={"rpm": self.RPM}))
        for _ in range(3 * self.RPM):
            ask(fleet, "a")
        assert sum(begun(fleet).values()) == self.RPM

    def test_the_list_of_models_does_not_count(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={"rpm": 1}))
        assert {fleet.client.get("/v1/models", headers=auth("a")).status_code for _ in range(5)} == {200}
        assert ask(fleet, "a").status_code == 200

    def test_the_minute_slides(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={"rpm": self.RPM}))
        first = int(time.time())
        fleet.gateway.command(f"set table keys/begun key a/{first // 60 - 1} data.gpc0 {self.RPM}")
        admitted = [ask(fleet, "a").status_code for _ in range(self.RPM + 1)].count(200)
        last = int(time.time())
        if last // 60 != first // 60:
            pytest.skip("the minute of the clock ended meanwhile")
        assert first % 60 * self.RPM // 60 <= admitted <= last % 60 * self.RPM // 60

    @pytest.mark.parametrize("before", [0, 1, RPM, 10 * RPM])
    def test_who_waits_as_long_as_told_is_let_in(self, start_fleet: StartFleet, before: int) -> None:
        """The clock is not waited for: what is free at the time that it names is computed from the gateway's counts."""
        fleet = start_fleet(gateway=keys(a={"rpm": self.RPM}))
        minute = int(time.time()) // 60
        fleet.gateway.command(f"set table keys/begun key a/{minute - 1} data.gpc0 {before}")
        answers = [ask(fleet, "a") for _ in range(self.RPM + 1)]
        now = int(time.time())
        if now // 60 != minute:
            pytest.skip("the minute of the clock ended meanwhile")
        counts = {minute - 1: before, minute: begun(fleet).get(f"a/{minute}", 0)}
        assert answers[-1].status_code == 429
        wait = int(answers[-1].headers["Retry-After"])
        assert 1 <= wait <= 60 + 60 // self.RPM
        assert free(counts, self.RPM, now + wait) >= 1
        assert free(counts, self.RPM, now + wait - 2) < 1, "and not much later than it could be"

    def test_both_limits_together(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(gateway=keys(a={"rpm": self.RPM, "concurrency": 1}))
        held = pool.submit(ask, fleet, "a", do="hold")
        until("it is open", lambda: running(fleet) == 1)
        for _ in range(5):
            assert error(ask(fleet, "a"), 429)["code"] == "concurrency_limit_exceeded"
        release(fleet)
        assert held.result(IN_TIME_S).status_code == 200
        assert sum(begun(fleet).values()) == 1, "what was refused for the other limit has used nothing up"


def free(counts: dict[int, int], rpm: int, now: int) -> int:
    """What a key may begin in the minute of `now`, by the definition: a sliding minute of two of the clock."""
    minute, gone = divmod(now, 60)
    carried = -(-counts.get(minute - 1, 0) * (60 - gone) // 60)
    return rpm - carried - counts.get(minute, 0)


def done(asked: list[Future[httpx.Response]], count: int) -> bool:
    return sum(future.done() for future in asked) == count


def knows(fleet: Fleet, count: int) -> bool:
    return sum(begun(fleet).values()) == count


def release(fleet: Fleet) -> None:
    for engine in fleet.engines.values():
        engine.permit(engine.open)


class TestConcurrency:
    LIMIT = 3

    def test_exactly_as_many_are_open(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(gateway=keys(a={"concurrency": self.LIMIT}, free={}))
        for _ in range(10):
            asked = [pool.submit(ask, fleet, "a", do="hold") for _ in range(CLIENTS)]
            until("all others have an answer", partial(done, asked, CLIENTS - self.LIMIT))
            refused = [future.result() for future in asked if future.done()]
            until("the engines have the rest", lambda: running(fleet) == self.LIMIT)
            assert {error(answer, 429)["code"] for answer in refused} == {"concurrency_limit_exceeded"}
            assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
            assert ask(fleet, "free").status_code == 200, "others go on"
            release(fleet)
            statuses = Counter(future.result(IN_TIME_S).status_code for future in asked)
            assert statuses == {200: self.LIMIT, 429: CLIENTS - self.LIMIT}

    def test_a_place_is_free_again_when_a_stream_has_ended(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={"concurrency": 1}))
        for _ in range(5):
            with streaming(fleet, fleet.client, "a", 2) as (lines, engine):
                assert ask(fleet, "a").status_code == 429
                engine.permit()
                assert [line for line in lines if line] == [f"data: 1 {engine.name}"]
            until("the place is free", lambda: ask(fleet, "a").status_code == 200)

    def test_and_when_a_client_has_left(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={"concurrency": 1}))
        with httpx.Client(base_url=fleet.gateway.url, timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", headers=auth("a") | {"X-Fake": "hold"}, json={})
        until("the place is free", lambda: ask(fleet, "a").status_code == 200)

    def test_never_more_under_pressure(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(engines=1, gateway=keys(a={"concurrency": self.LIMIT}))

        def client(_: int) -> Counter[int]:
            return Counter(ask(fleet, "a").status_code for _ in range(50))

        statuses: Counter[int] = sum(pool.map(client, range(CLIENTS)), Counter())
        assert set(statuses) <= {200, 429}
        assert fleet.engines["chat-0"].most_open <= self.LIMIT
        assert ask(fleet, "a").status_code == 200, "nothing is left counted"


class TestExpiry:
    def test_a_key_is_good_to_the_end_of_its_last_day(self, start_fleet: StartFleet) -> None:
        last = {
            "old": TODAY - dt.timedelta(days=1),
            "fresh": TODAY + dt.timedelta(days=1),
            "far": dt.date(2999, 12, 31),
        }
        fleet = start_fleet(gateway=keys(free={}, **{name: {"expires": day.isoformat()} for name, day in last.items()}))
        statuses = {name: ask(fleet, name).status_code for name in ("free", *last)}
        assert statuses == {"free": 200, "old": 401, "fresh": 200, "far": 200}
        assert fleet.client.get("/v1/models", headers=auth("old")).status_code == 401

    def test_then_it_is_as_a_wrong_one(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(old={"expires": "2026-01-01", "rpm": 5, "concurrency": 5}))
        expired, wrong = ask(fleet, "old"), ask(fleet, "nobody")
        assert (expired.status_code, expired.content) == (401, wrong.content)
        own = {"x-request-id", "connection"}  # the second: it closes if the body is still on its way
        headers = [{name: it.headers[name] for name in it.headers if name not in own} for it in (expired, wrong)]
        assert headers[0] == headers[1]

    def test_the_hour_comes_without_a_reload(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={"expires": TODAY.isoformat()}))
        worker = fleet.gateway.worker()
        fleet.gateway.command(f"set map slots/haproxy/expires.map a {int(time.time()) + 2}")
        assert ask(fleet, "a").status_code == 200
        until("it is over", lambda: ask(fleet, "a").status_code == 401)
        assert fleet.gateway.worker() == worker


def ready_to_hand_over(fleet: Fleet) -> bool:
    """Before HAProxy 3.0 a worker has counters to hand over once it has waited for those of the worker before, 5 s."""
    return "resync_timeout=<PAST>" in fleet.gateway.command("show peers") or not re.search(
        r"^Version: 2\.", fleet.gateway.command("show info"), re.MULTILINE
    )


def fresh(fleet: Fleet, name: str) -> int:
    """The status of a request over a connection of its own: it cannot be one that an old worker has kept."""
    with httpx.Client(base_url=fleet.gateway.url, timeout=IN_TIME_S) as client:
        return client.post("/v1/completions", headers=auth(name), json={"model": "chat"}).status_code


class TestReload:
    def test_what_was_begun_is_not_forgotten(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={"rpm": 1000}))
        for _ in range(20):
            ask(fleet, "a")
        for number in range(2):
            before = sum(begun(fleet).values())
            until("the worker can hand over", lambda: ready_to_hand_over(fleet))
            fleet.gateway.reload(with_keys(fleet.gateway.plan, a={"rpm": 1000}, **{f"key-{number}": {}}))
            until("the new worker has them", partial(knows, fleet, before))
            assert fresh(fleet, "a") == 200
            assert sum(begun(fleet).values()) == before + 1

    def test_a_limit_that_is_reached_stays_reached(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={"rpm": 5}))
        assert [ask(fleet, "a").status_code for _ in range(6)] == [200] * 5 + [429]
        until("the worker can hand over", lambda: ready_to_hand_over(fleet))
        fleet.gateway.reload(with_keys(fleet.gateway.plan, a={"rpm": 5}, b={}))
        until("the new worker knows", lambda: sum(begun(fleet).values()) >= 5)
        assert fresh(fleet, "a") == 429

    def test_no_place_stays_taken_by_what_ended_in_an_old_worker(
        self, start_fleet: StartFleet, pool: ThreadPoolExecutor
    ) -> None:
        fleet = start_fleet(gateway=keys(a={"concurrency": 1, "rpm": 1000}))
        held = pool.submit(ask, fleet, "a", do="hold")
        until("it is open", lambda: running(fleet) == 1)
        assert fresh(fleet, "a") == 429
        until("the worker can hand over", lambda: ready_to_hand_over(fleet))
        fleet.gateway.reload(with_keys(fleet.gateway.plan, a={"concurrency": 1, "rpm": 1000}, b={}))
        until("the new worker has the counts of minutes", lambda: bool(begun(fleet)))
        assert fresh(fleet, "a") == 200, "what the old worker has open is not in the new one's count"
        release(fleet)
        assert held.result(IN_TIME_S).status_code == 200
        assert [fresh(fleet, "a") for _ in range(3)] == [200] * 3

    def test_a_new_limit_is_in_force_and_a_new_key_works(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={}))
        assert ask(fleet, "b").status_code == 401
        fleet.gateway.reload(with_keys(fleet.gateway.plan, a={"concurrency": 1, "rpm": 2}, b={}))
        assert fresh(fleet, "b") == 200
        assert [fresh(fleet, "a") for _ in range(3)] == [200, 200, 429]

    def test_a_revoked_key_is_refused_and_its_stream_goes_on(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=keys(a={}, b={}))
        url = fleet.gateway.url
        with (
            idle_connection(fleet, "b") as oldest,
            httpx.Client(base_url=url, timeout=IN_TIME_S) as client,
            streaming(fleet, client, "b", 3) as (lines, engine),
        ):
            fleet.gateway.reload(with_keys(fleet.gateway.plan, a={}, b={}, c={}))
            with idle_connection(fleet, "b") as old, idle_connection(fleet, "b") as other:
                assert other.post("/v1/completions", headers=auth("a"), json={}).status_code == 200
                before = seen(fleet)

                fleet.gateway.reload(with_keys(fleet.gateway.plan, a={}, c={}))

                assert fresh(fleet, "b") == 401
                for kept in (oldest, old):
                    answer = kept.post("/v1/completions", headers=auth("b"), json={})
                    assert answer.status_code == 401, "nor over a connection that an old worker has kept"
                assert seen(fleet) == before
                assert other.post("/v1/completions", headers=auth("a"), json={}).status_code == 200
            engine.permit(2)
            assert [line for line in lines if line] == [f"data: {n} {engine.name}" for n in (1, 2)]


@contextmanager
def streaming(fleet: Fleet, client: httpx.Client, name: str, chunks: int) -> Iterator[tuple[Iterator[str], FakeEngine]]:
    """A stream whose first chunk has come: its further lines, and the engine that it comes from."""
    headers = auth(name) | {"X-Fake": f"stream {chunks}"}
    request = client.build_request("POST", "/v1/completions", headers=headers, json={"model": "chat"})
    with ThreadPoolExecutor(1) as one:
        sending = one.submit(client.send, request, stream=True)
        until("it is open", lambda: running(fleet) == 1)
        engine = next(engine for engine in fleet.engines.values() if engine.open)
        engine.permit()
        stream = sending.result(IN_TIME_S)
    lines = stream.iter_lines()
    assert next(lines).startswith("data: 0")
    yield lines, engine
    stream.close()


@contextmanager
def idle_connection(fleet: Fleet, name: str) -> Iterator[httpx.Client]:
    """A client whose only connection has been used once, and is kept."""
    with httpx.Client(base_url=fleet.gateway.url, timeout=IN_TIME_S) as client:
        assert client.post("/v1/completions", headers=auth(name), json={}).status_code == 200
        yield client


def test_no_key_is_in_the_log_whatever_became_of_it(start_fleet: StartFleet) -> None:
    names = ("rate", "old", "some", "nobody")
    fleet = start_fleet(
        MODELS,
        1,
        gateway=keys(rate={"rpm": 1, "concurrency": 1}, old={"expires": "2026-01-01"}, some={"models": ("embed",)}),
    )
    statuses = [ask(fleet, name).status_code for name in ("rate", *names)]
    assert statuses == [200, 429, 401, 404, 401]
    until("all are logged", lambda: len(fleet.gateway.requests()) == len(statuses))
    log = fleet.gateway.log_text()
    for name in names:
        assert key_of(name) not in log
        assert hashlib.sha256(key_of(name).encode()).hexdigest() not in log
    assert [(line["key"], line["status"]) for line in fleet.gateway.requests()] == [
        ("rate", 200),
        ("rate", 429),
        ("old", 401),
        ("some", 404),
        ("-", 401),
    ]
