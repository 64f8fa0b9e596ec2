"""Which engine a request goes to: policies, weights, paths of models, large bodies, overload."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.render.gateways import AUTH, IN_TIME_S, Fleet, StartFleet, until

MIB = 2**20


def served(fleet: Fleet, **request: Any) -> str:
    answer = fleet.ask(**request)
    assert answer.status_code == 200, answer.text
    engine: str = answer.json()["engine"]
    return engine


def chat(fleet: Fleet, content: Any, **more: Any) -> str:
    """The engine that gets a conversation."""
    body = {"model": "chat", "messages": [{"role": "user", "content": content}], **more}
    answer = fleet.client.post("/v1/chat/completions", headers=AUTH, json=body)
    assert answer.status_code == 200, answer.text
    engine: str = answer.json()["engine"]
    return engine


class TestPrefixAffinity:
    @pytest.fixture(params=[1, 2])
    def fleet(self, start_fleet: StartFleet, request: pytest.FixtureRequest) -> Fleet:
        models = ("chat", "embed")[: request.param]
        return start_fleet(models, 4, gateway={"routing": "prefix-affinity"})

    def test_what_begins_alike_stays_together(self, fleet: Fleet) -> None:
        prefix = 'a "prompt" \n\\ ' + "x" * 512
        for content in (prefix, [{"type": "text", "text": prefix}], "é" * 300):
            assert len({chat(fleet, content, n=n) for n in range(8)}) == 1
        assert len({chat(fleet, f"{prefix}{n}", temperature=n) for n in range(8)}) == 1

    def test_it_is_the_first_message_wherever_it_stands(self, fleet: Fleet) -> None:
        bodies = [
            '{"messages":[{"role":"user","content":"hello"}],"model":"chat"}',
            '{"model": "chat", "seed": 7, "messages": [{"content": "hello", "role": "user"}, {"content": "more"}]}',
            '{"tools": [{"messages": [{"content": "other"}]}], "messages": [{"content": "hello"}], "model": "chat"}',
        ]
        answers = [fleet.client.post("/v1/chat/completions", headers=AUTH, content=body) for body in bodies]
        assert len({answer.json()["engine"] for answer in answers}) == 1

    def test_different_beginnings_go_everywhere(self, fleet: Fleet) -> None:
        counts = Counter(chat(fleet, f"conversation {n}") for n in range(200))
        assert set(counts) == {f"chat-{n}" for n in range(4)}
        assert min(counts.values()) > 20  # 50 each on average

    def test_so_do_requests_of_other_shapes(self, fleet: Fleet) -> None:
        for body in ({"prompt": "a prompt"}, {"input": ["some", "texts"]}):
            bodies = [json.dumps({"model": "chat", **body, "n": 1}) for _ in range(8)]
            answers = [fleet.client.post("/v1/completions", headers=AUTH, content=text) for text in bodies]
            assert len({answer.json()["engine"] for answer in answers}) == 1

    def test_an_engine_that_goes_moves_its_own_requests_alone(self, fleet: Fleet) -> None:
        before = {n: chat(fleet, f"conversation {n}") for n in range(40)}
        fleet.mark(chat_1=404)
        fleet.gateway.await_states(chat_1="NOLB")
        after = {n: chat(fleet, f"conversation {n}") for n in range(40)}
        assert {n for n in before if before[n] != after[n]} == {n for n in before if before[n] == "chat-1"}

    def test_a_popular_beginning_spreads_before_it_is_too_much(
        self, start_fleet: StartFleet, pool: ThreadPoolExecutor
    ) -> None:
        fleet = start_fleet(engines=4, gateway={"routing": "prefix-affinity", "balance_percent": 150})
        asked = [pool.submit(fleet.ask, do="hold") for _ in range(24)]  # all alike
        until("all are open", lambda: sum(engine.open for engine in fleet.engines.values()) == 24)
        # Of n open requests one may have 1.5 times the mean, rounded up.
        assert max(engine.open for engine in fleet.engines.values()) <= 9
        for engine in fleet.engines.values():
            engine.permit(24)
        assert [future.result(IN_TIME_S).status_code for future in asked] == [200] * 24


class TestSession:
    @pytest.fixture
    def fleet(self, start_fleet: StartFleet) -> Fleet:
        return start_fleet(engines=4, gateway={"routing": "session", "session_header": "X-Chat"})

    def test_a_session_stays_with_its_engine(self, fleet: Fleet) -> None:
        first = {n: served(fleet, headers={"X-Chat": f"session-{n}"}) for n in range(40)}
        assert set(first.values()) == set(fleet.engines)
        assert {n: served(fleet, headers={"x-chat": f"session-{n}"}) for n in range(40)} == first

    @pytest.mark.parametrize("headers", [{}, {"X-Chat": ""}, {"X-Session-Id": "same"}])
    def test_without_one_the_load_is_spread(self, fleet: Fleet, headers: dict[str, str]) -> None:
        assert {served(fleet, headers=headers) for _ in range(60)} == set(fleet.engines)

    def test_and_nobody_gets_much_more_than_the_others(self, fleet: Fleet, pool: ThreadPoolExecutor) -> None:
        asked = [pool.submit(fleet.ask, do="hold") for _ in range(24)]
        until("all are open", lambda: sum(engine.open for engine in fleet.engines.values()) == 24)
        assert max(engine.open for engine in fleet.engines.values()) <= 9
        for engine in fleet.engines.values():
            engine.permit(24)
        assert [future.result(IN_TIME_S).status_code for future in asked] == [200] * 24


class TestWeights:
    def test_round_robin_gives_a_canary_its_share(self, start_fleet: StartFleet) -> None:
        canary = {"routing": "round-robin", "server_weights": (("chat-2", 10),)}
        fleet = start_fleet(engines=3, gateway=canary)
        assert Counter(served(fleet) for _ in range(210)) == {"chat-0": 100, "chat-1": 100, "chat-2": 10}

    def test_least_loaded_gives_it_less_under_load(self, start_fleet: StartFleet, pool: ThreadPoolExecutor) -> None:
        fleet = start_fleet(engines=2, gateway={"server_weights": (("chat-1", 25),)})
        asked = [pool.submit(fleet.ask, do="hold") for _ in range(15)]
        until("all are open", lambda: sum(engine.open for engine in fleet.engines.values()) == 15)
        assert [fleet.engines[name].open for name in ("chat-0", "chat-1")] == [12, 3]
        for engine in fleet.engines.values():
            engine.permit(15)
        assert [future.result(IN_TIME_S).status_code for future in asked] == [200] * 15

    def test_affinity_gives_it_fewer_beginnings(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(engines=2, gateway={"routing": "prefix-affinity", "server_weights": (("chat-1", 10),)})
        counts = Counter(chat(fleet, f"conversation {n}") for n in range(220))
        assert 5 < counts["chat-1"] < 50  # 20 on average

    def test_a_reload_keeps_them(self, start_fleet: StartFleet) -> None:
        canary = {"routing": "round-robin", "server_weights": (("chat-1", 20),)}
        fleet = start_fleet(engines=2, gateway=canary)
        plan = fleet.gateway.plan
        fleet.gateway.reload(plan.model_copy(update={"gateway": plan.gateway.model_copy(update={"queue": 65})}))
        weights = fleet.gateway.command("show servers state").splitlines()[2:]
        assert [row.split()[7:9] for row in weights if "model-chat" in row] == [["100", "100"], ["20", "20"]]


class TestPathsOfModels:
    """`/models/NAME/v1/...`: the model is in the path, and the body is nobody's business."""

    @pytest.fixture
    def fleet(self, start_fleet: StartFleet) -> Fleet:
        return start_fleet(["chat", "embed"], 1)

    def post(self, fleet: Fleet, path: str, content: bytes = b"no JSON") -> httpx.Response:
        return fleet.client.post(path, headers=AUTH, content=content)

    def test_the_path_says_the_model_and_the_engine_gets_the_bare_one(self, fleet: Fleet) -> None:
        for model in ("chat", "embed"):
            assert self.post(fleet, f"/models/{model}/v1/completions").json()["engine"] == f"{model}-0"
            assert [request.path for request in fleet.engines[f"{model}-0"].seen] == ["/v1/completions"]
        until("both are logged", lambda: len(fleet.gateway.requests()) == 2)
        assert [line["model"] for line in fleet.gateway.requests()] == ["chat", "embed"]
        assert [line["path"] for line in fleet.gateway.requests()] == [
            f"/models/{m}/v1/completions" for m in ("chat", "embed")
        ]

    def test_it_takes_bodies_that_are_too_large_to_read(self, fleet: Fleet) -> None:
        body = b"x" * (fleet.gateway.plan.gateway.buffer_bytes * 3)
        assert self.post(fleet, "/models/embed/v1/embeddings", body).status_code == 200
        assert fleet.engines["embed-0"].seen[0].body == body
        over = b"x" * (fleet.gateway.plan.gateway.max_body_bytes + 1)
        assert self.post(fleet, "/models/embed/v1/embeddings", over).status_code == 413

    def test_an_unknown_model_is_404(self, fleet: Fleet) -> None:
        for name in ("nobody", "Chat", "chat%20", "chat;x"):
            status = self.post(fleet, f"/models/{name}/v1/completions")
            assert status.status_code == 404
            assert status.json()["error"]["code"] in {"model_not_found", "unknown_url"}
        assert self.post(fleet, "/models/nobody/v1/completions").json()["error"]["code"] == "model_not_found"

    def test_one_model_has_its_path_too(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet()
        assert self.post(fleet, "/models/chat/v1/completions").status_code == 200
        assert self.post(fleet, "/models/embed/v1/completions").json()["error"]["code"] == "model_not_found"
        assert fleet.client.get("/models/chat/v1/models", headers=AUTH).json()["data"][0]["id"] == "chat"

    def test_it_needs_a_key(self, fleet: Fleet) -> None:
        assert fleet.client.post("/models/chat/v1/completions", content=b"").status_code == 401


class TestAudio:
    """Forms with a file, which no JSON query can read."""

    PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")

    def send(self, fleet: Fleet, path: str) -> httpx.Response:
        return fleet.client.post(path, headers=AUTH, files={"file": b"\0" * 1000}, data={"model": "whisper"})

    def test_only_where_an_engine_has_it(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet()
        for path in self.PATHS:
            assert self.send(fleet, path).status_code == 404
            assert self.send(fleet, f"/models/chat{path}").status_code == 404

    def test_one_that_listens_gets_them(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["chat", "whisper"], 1, gateway={"audio": ("whisper",)})
        for path in self.PATHS:
            assert self.send(fleet, path).json()["engine"] == "whisper-0"
            assert self.send(fleet, f"/models/whisper{path}").json()["engine"] == "whisper-0"
            assert self.send(fleet, f"/models/chat{path}").status_code == 404
        assert {request.path for request in fleet.engines["whisper-0"].seen} == set(self.PATHS)

    def test_of_several_the_path_says_which(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["one", "two"], 1, gateway={"audio": ("one", "two")})
        for path in self.PATHS:
            assert self.send(fleet, path).status_code == 404
            assert self.send(fleet, f"/models/two{path}").json()["engine"] == "two-0"


class TestLargeBodies:
    """Bodies of 4 MiB, with `model` at their end."""

    @pytest.fixture
    def fleet(self, start_fleet: StartFleet) -> Fleet:
        return start_fleet(["chat", "embed"], 1, gateway={"buffer_bytes": 4 * MIB + 32 * 1024})

    @pytest.mark.parametrize("filler", ["x", '\\"model\\": \\"chat\\", ', "\\u00e9\\n", "😀"])
    def test_the_model_is_found_at_the_end_of_4_mib(self, fleet: Fleet, filler: str) -> None:
        start, end = b'{"messages": [{"role": "user", "content": "', b'"}], "model": "embed"}'
        piece = filler.encode()
        body = start + piece * ((4 * MIB - len(start) - len(end)) // len(piece)) + end
        json.loads(body)
        answer = fleet.client.post("/v1/chat/completions", headers=AUTH, content=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["engine"] == "embed-0"
        assert fleet.engines["embed-0"].seen[0].body == body

    def test_a_model_at_the_front_is_enough(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["chat", "embed"], 1)
        body = json.dumps({"model": "embed", "prompt": "x" * MIB})
        assert fleet.client.post("/v1/completions", headers=AUTH, content=body).json()["engine"] == "embed-0"

    def test_out_of_reach_it_is_413_and_the_way_out_is_told(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["chat", "embed"], 1)
        body = json.dumps({"prompt": "x" * MIB, "model": "embed"})
        answer = fleet.client.post("/v1/completions", headers=AUTH, content=body)
        assert answer.status_code == 413
        assert "/models/MODEL/v1" in answer.json()["error"]["message"]

    @pytest.mark.parametrize(("depth", "status"), [(17, 200), (40, 400)])
    def test_nesting_has_a_limit(self, fleet: Fleet, depth: int, status: int) -> None:
        body = '{"tools": ' + '{"a":' * depth + "1" + "}" * depth + ', "model": "chat"}'
        answer = fleet.client.post("/v1/completions", headers=AUTH, content=body)
        assert answer.status_code == status
        assert status == 200 or "nested" in answer.json()["error"]["message"]


class TestOverload:
    """Three times as many clients as places: what is refused is refused at once, and the engines are never idle."""

    def test_the_engines_stay_full_and_the_rest_is_told_to_return(
        self, start_fleet: StartFleet, pool: ThreadPoolExecutor
    ) -> None:
        slots, queue, rounds = 2, 4, 10
        fleet = start_fleet(engines=2, gateway={"server_maxconn": (("chat", slots),), "queue": queue})
        capacity, engines = 2 * slots, list(fleet.engines.values())
        good, refused = 0, 0
        pending = [pool.submit(fleet.ask, do="hold") for _ in range(capacity)]
        until("the engines are full", lambda: sum(engine.open for engine in engines) == capacity)
        for _ in range(rounds):
            # As many wait as may, then as many again come too late.
            pending += [pool.submit(fleet.ask, do="hold") for _ in range(queue)]
            until("the queue is full", lambda: fleet.gateway.queued("chat") == queue)
            late = [pool.submit(fleet.ask, do="hold") for _ in range(capacity)]
            answers = [future.result(IN_TIME_S) for future in late]
            assert {answer.status_code for answer in answers} == {503}
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
            refused += len(answers)
            for engine in engines:
                engine.permit(slots)  # all that it has is done
            until("they are answered", lambda: sum(future.done() for future in pending) >= capacity)  # noqa: B023 - at once
            done = [future for future in pending if future.done()]
            assert [future.result().status_code for future in done] == [200] * capacity
            good += len(done)
            pending = [future for future in pending if not future.done()]
            until("the queue has moved up", lambda: sum(engine.open for engine in engines) == capacity)
        assert (good, refused) == (rounds * capacity, rounds * capacity)
        assert [engine.most_open for engine in engines] == [slots] * 2
        for engine in engines:
            engine.permit(slots)
        assert [future.result(IN_TIME_S).status_code for future in pending] == [200] * len(pending)
