"""The gateway with nginx: what clients may ask, what they are told, and what is written down about them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.render.gateways import AUTH, Fleet, StartFleet, until
from tests.render.nginx_gateways import NGINX
from tests.render.plans import KEY
from tests.render.test_gateway_api import GENERATE, HOSTILE, ask_raw, error_of, raw, refused, seen

MORE = [
    "/v1/chat/completions/../../../../metrics",
    "/v1/chat/%63ompletions",
    "/v1/chat/completions%20",
    "/v1/chat/completions%0a",
    "/v1/chat/completions/.",
    "/v1%2fchat%2fcompletions",
    "/.key",
    "/.models",
    "/.error/404",
    "/.none",
    "/models",
    "/models/",
    "/models/chat",
    "/models/chat/",
    "/models/chat/metrics",
    "/models/chat/v1/load_lora_adapter",
    "/models/chat/../v1/completions",
    "/models/a/b/v1/completions",
    "/models//v1/completions",
    "/models/chat/v1//completions",
    "/Models/chat/v1/completions",
    "/lb-health?",
    "/rotation",
]


def unreadable(path: str) -> bool:
    """Whether a target is none, climbs, or has a NUL: what nginx itself may take for no HTTP."""
    return not path.startswith("/") or re.search(r"\.\.|%2e|%00", path, re.IGNORECASE) is not None


@pytest.fixture
def fleet(start_fleet: StartFleet) -> Fleet:
    """One model, two ready engines."""
    return start_fleet(gateway=NGINX)


@pytest.mark.parametrize("path", GENERATE)
def test_the_api_reaches_an_engine(fleet: Fleet, path: str) -> None:
    assert fleet.ask(path).status_code == 200
    assert fleet.ask(f"/models/chat{path}").status_code == 200
    assert seen(fleet) == [path] * 2


def test_every_other_path_is_404_and_reaches_no_engine(fleet: Fleet) -> None:
    for path in [*HOSTILE, *MORE]:
        for method in ("GET", "POST"):
            status, body = ask_raw(fleet, path, method)
            assert status == 404 or (status == 400 and unreadable(path)), (method, path, status)
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, path
    assert seen(fleet) == []


def test_what_an_engine_sees_is_the_bare_path(fleet: Fleet) -> None:
    assert ask_raw(fleet, "/v1/completions?api_key=hidden")[0] == 200
    assert ask_raw(fleet, "http://elsewhere/v1/completions")[0] == 200
    assert seen(fleet) == ["/v1/completions"] * 2
    assert "hidden" not in fleet.gateway.log_text()


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/completions", "POST"),
        ("OPTIONS", "/v1/responses", "POST"),
        ("POST", "/v1/models", "GET"),
        ("HEAD", "/v1/models", "GET"),
    ],
)
def test_another_method_is_405(fleet: Fleet, method: str, path: str, allowed: str) -> None:
    status, headers, body = raw(fleet, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert status == 405
    assert headers["allow"] == allowed
    if method != "HEAD":
        assert error_of(status, headers, body, 405)["code"] == "method_not_allowed"
    assert seen(fleet) == []


def test_a_method_in_small_letters_is_no_method(fleet: Fleet) -> None:
    status, headers, body = raw(fleet, b"post /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n")
    error_of(status, headers, body, 400)


class TestModels:
    def test_they_are_answered_by_the_gateway(self, fleet: Fleet) -> None:
        for path in ("/v1/models", "/models/chat/v1/models"):
            answer = fleet.client.get(path, headers=AUTH)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "application/json"
            assert [(model["id"], model["object"]) for model in answer.json()["data"]] == [("chat", "model")]
        assert seen(fleet) == []

    def test_no_condition_keeps_them_back(self, fleet: Fleet) -> None:
        for more in ({"Range": "bytes=0-1"}, {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}):
            assert fleet.client.get("/v1/models", headers=AUTH | more).json()["object"] == "list"
        refused(fleet.client.get("/v1/models", headers=AUTH | {"If-Match": '"x"'}), 400)

    def test_one_that_is_not_served_is_404(self, fleet: Fleet) -> None:
        for name in ("Chat", "other", "chat.", "chatx"):
            error = refused(fleet.ask(f"/models/{name}/v1/completions"), 404)
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert f"'{name}'" in error["message"]
        assert seen(fleet) == []

    def test_the_path_says_which_of_several(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["chat", "embed", "co.der"], 1, gateway=NGINX)
        for model in ("chat", "embed", "co.der"):
            assert fleet.ask(f"/models/{model}/v1/completions").json()["engine"] == f"{model}-0"
        refused(fleet.ask("/models/co-der/v1/completions"), 404)
        assert refused(fleet.ask(), 400)["param"] == "model"
        until("all are logged", lambda: len(fleet.gateway.requests()) == 5)
        assert [line["model"] for line in fleet.gateway.requests()][:3] == ["chat", "embed", "co.der"]

    def test_audio_is_for_those_that_listen(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["chat", "ear"], 1, gateway={**NGINX, "audio": ("ear",)})
        path = "/v1/audio/transcriptions"
        assert fleet.ask(f"/models/ear{path}").json()["engine"] == "ear-0"
        refused(fleet.ask(f"/models/chat{path}"), 404)
        refused(fleet.ask(path), 404)


class TestKeys:
    @pytest.mark.parametrize(
        "authorization",
        [None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer team-a", "Bearer '"],
    )
    def test_a_bad_one_gets_a_constant_401(self, fleet: Fleet, authorization: str | None) -> None:
        first = fleet.client.post("/v1/completions", json={}, headers={"Authorization": "Bearer some-wrong-key"})
        headers = {} if authorization is None else {"Authorization": authorization}
        answer = fleet.client.post("/v1/completions", json={}, headers=headers)
        assert refused(answer, 401)["code"] == "invalid_api_key"
        assert answer.content == first.content
        assert answer.headers.get_list("www-authenticate") == ["Bearer"]
        assert refused(fleet.client.get("/v1/models", headers=headers), 401)
        assert seen(fleet) == []

    def test_its_hash_is_no_key(self, fleet: Fleet) -> None:
        (_, sha256), *_ = fleet.gateway.plan.gateway.keys
        refused(fleet.client.post("/v1/completions", json={}, headers={"Authorization": f"Bearer {sha256}"}), 401)

    def test_none_lets_nobody_in(self, start_fleet: StartFleet) -> None:
        refused(start_fleet(gateway=NGINX | {"keys": ()}).ask(), 401)

    def test_it_is_in_no_log_nor_file_nor_at_an_engine(self, fleet: Fleet) -> None:
        fleet.ask()
        fleet.client.post("/v1/completions", json={}, headers={"Authorization": "Bearer sk-wrong-secret"})
        fleet.client.post("/v1/completions", json={}, headers=[("Authorization", f"Bearer {KEY}")] * 2)
        raw(fleet, f"POST /v1/comp\x01 HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        for engine in fleet.engines.values():
            engine.stop()
        ask_raw(fleet, f"/v1/completions?key={KEY}")  # of what fails, nginx would like to write the whole request
        until("all are logged", lambda: len(fleet.gateway.requests()) == 5)
        for file in fleet.gateway.root.rglob("*"):
            text = file.read_bytes() if file.is_file() else b""
            assert KEY.encode() not in text, file
            assert b"sk-wrong-secret" not in text, file
        for engine in fleet.engines.values():
            for request in engine.seen:
                assert request.header("Authorization") == []
                assert KEY not in str(request.headers)

    def test_while_the_keeper_is_away_nobody_is_let_in(self, fleet: Fleet) -> None:
        keepers = fleet.gateway.keepers  # type: ignore[attr-defined]
        keepers[0].kill()
        keepers[0].wait()
        fleet.gateway.socket.close()  # type: ignore[attr-defined]
        answer = fleet.ask()
        assert refused(answer, 503)["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
        refused(fleet.client.get("/lb-health"), 503)
        assert seen(fleet) == []


def test_clients_cannot_speak_for_the_gateway(fleet: Fleet) -> None:
    spoofed = {
        "X-Forwarded-For": "1.2.3.4",
        "X-Forwarded-Proto": "https",
        "Forwarded": "for=1.2.3.4",
        "X-Real-Ip": "1.2.3.4",
        "X-Fleet-Key": "root",
        "X_Forwarded_For": "1.2.3.4",
        "Upgrade": "irc/6.9",
        "Connection": "Upgrade",
    }
    assert fleet.ask(headers=spoofed).status_code == 200
    (request,) = (request for engine in fleet.engines.values() for request in engine.seen)
    assert request.header("X-Forwarded-For") == ["127.0.0.1"]
    for name in ("X-Forwarded-Proto", "Forwarded", "X-Real-Ip", "X_Forwarded_For", "Upgrade"):
        assert request.header(name) == []


class TestRequestIds:
    def test_a_sane_id_is_kept(self, fleet: Fleet) -> None:
        answer = fleet.ask(headers={"X-Request-Id": "Order-66_a.b"})
        assert answer.headers.get_list("x-request-id") == ["Order-66_a.b"]
        (request,) = (request for engine in fleet.engines.values() for request in engine.seen)
        assert request.header("X-Request-Id") == ["Order-66_a.b"]
        until("it is logged", lambda: [line["id"] for line in fleet.gateway.requests()] == ["Order-66_a.b"])

    @pytest.mark.parametrize("mine", [None, "", "x" * 65, 'a"b', "a b", "a,b", "ä".encode()])
    def test_else_a_new_one_is_made(self, fleet: Fleet, mine: str | bytes | None) -> None:
        headers: dict[str, Any] = {} if mine is None else {"X-Request-Id": mine}
        answers = [fleet.client.post("/v1/completions", json={}, headers=AUTH | headers) for _ in range(2)]
        made = [answer.headers["x-request-id"] for answer in answers]
        assert len(set(made)) == 2
        assert all(len(one) == 32 for one in made)
        asked = [request for engine in fleet.engines.values() for request in engine.seen]
        assert sorted(request.header("X-Request-Id")[0] for request in asked) == sorted(made)

    def test_errors_carry_it_too(self, fleet: Fleet) -> None:
        answer = fleet.client.post("/nowhere", headers={"X-Request-Id": "lost"})
        assert answer.headers.get_list("x-request-id") == ["lost"]


class TestLog:
    def test_a_line_says_what_happened(self, fleet: Fleet) -> None:
        answer = fleet.ask("/v1/chat/completions")
        until("it is logged", lambda: len(fleet.gateway.requests()) == 1)
        (line,) = fleet.gateway.requests()
        assert line["id"] == answer.headers["x-request-id"]
        assert line["engine"] == answer.json()["engine"]
        assert (line["client"], line["key"], line["model"]) == ("127.0.0.1", "team-a", "chat")
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
        assert line["complete"] == "OK"
        assert all(isinstance(line[name], int) for name in line if name.endswith("_ms") or name.startswith("bytes"))
        assert 0 <= line["headers_ms"] <= line["total_ms"]
        assert line["bytes_out"] > len(answer.content)

    def test_every_line_is_json_whatever_the_client_sends(self, fleet: Fleet) -> None:
        nasty = [
            '"',
            "\\",
            "\x7f",
            "é",
            "\xff\xfe",
            "%s%n",
            "\u2028",
            "'",
            "${HOME}",
            "x" * 3000,
            "\xc3" * 3000,
            "\\" * 3000,
            "😀" * 300,
            "\x01" * 300,
        ]
        sent = 0
        for text in nasty:
            encoded = text.encode("utf-8", "surrogateescape")
            for head in (
                b"POST /" + encoded + b" HTTP/1.1\r\nHost: x\r\n",
                b"POST /models/"
                + encoded
                + b"/v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
                + KEY.encode()
                + b"\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + encoded + b"\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + encoded + b"\r\n",
                encoded + b" / HTTP/1.1\r\nHost: x\r\n",
            ):
                raw(fleet, head + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
                sent += 1
        until("all are logged", lambda: len(fleet.gateway.requests()) == sent)
        assert all(len(line) < 4096 for line in fleet.gateway.log_text().splitlines())

    def test_health_checks_are_not_in_it(self, fleet: Fleet) -> None:
        assert fleet.client.get("/lb-health").status_code == 200
        fleet.ask()
        until(
            "the request is logged", lambda: [line["path"] for line in fleet.gateway.requests()] == ["/v1/completions"]
        )


class TestErrors:
    def test_a_large_body_is_413_by_its_stated_length(self, fleet: Fleet) -> None:
        limit = fleet.gateway.plan.gateway.max_body_bytes
        assert fleet.client.post("/v1/completions", headers=AUTH, content=b"x" * limit).status_code == 200
        answer = fleet.client.post("/v1/completions", headers=AUTH, content=b"x" * (limit + 1))
        assert refused(answer, 413)["code"] == "request_too_large"
        assert len(seen(fleet)) == 1

    def test_a_large_chunked_body_is_413(self, fleet: Fleet) -> None:
        limit = fleet.gateway.plan.gateway.max_body_bytes

        def chunks(size: int) -> Iterator[bytes]:
            for _ in range(0, size, 1024):
                yield b"x" * 1024

        assert fleet.client.post("/v1/completions", headers=AUTH, content=chunks(limit)).status_code == 200
        assert refused(fleet.client.post("/v1/completions", headers=AUTH, content=chunks(limit + 1024)), 413)
        assert [len(request.body) for engine in fleet.engines.values() for request in engine.seen] == [limit]

    def test_no_body_is_ever_on_disk(self, fleet: Fleet) -> None:
        for folder in fleet.gateway.root.glob("run/nginx-*/"):
            folder.rmdir()
            folder.write_text("not even root can put a file in here")
        body = b"x" * fleet.gateway.plan.gateway.max_body_bytes
        assert fleet.client.post("/v1/completions", headers=AUTH, content=body).status_code == 200

    @pytest.mark.parametrize(
        "request_bytes",
        [
            b"rubbish\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
            b"POST /v1/compl\x00etions HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 20000 + b"\r\n\r\n",
            b"POST /v1/completions?" + b"x" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        ],
    )
    def test_bad_http_is_400(self, fleet: Fleet, request_bytes: bytes) -> None:
        status, headers, body = raw(fleet, request_bytes)
        assert error_of(status, headers, body, 400)["code"] == "bad_request"
        assert seen(fleet) == []

    @pytest.mark.parametrize(
        "encoding", ["chunked, identity", "gzip, chunked", "xchunked", "chunked\r\nContent-Length: 4"]
    )
    def test_transfer_encodings_do_not_smuggle(self, fleet: Fleet, encoding: str) -> None:
        hidden = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        status, body = ask_raw(fleet, "/v1/completions", "POST", f"Transfer-Encoding: {encoding}", body=hidden)
        assert status in {400, 501}
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert seen(fleet) == []

    def test_an_unknown_version_of_http_is_told(self, fleet: Fleet) -> None:
        status, headers, body = raw(fleet, b"POST /v1/completions HTTP/3.0\r\nHost: x\r\n\r\n")
        assert error_of(status, headers, body, 501)["code"] == "not_implemented"

    def test_a_compressed_body_is_415(self, fleet: Fleet) -> None:
        assert refused(fleet.ask(headers={"Content-Encoding": "gzip"}), 415)["code"] == "unsupported_encoding"
        assert fleet.ask(headers={"Content-Encoding": "identity"}).status_code == 200

    def test_a_client_that_does_not_finish_is_closed_on(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, timings={"request_s": 1})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
        assert raw(fleet, head)[0] == 0
        assert raw(fleet, head + b"Content-Length: 9\r\n\r\n{")[0] == 0
        until("both are logged", lambda: [line["status"] for line in fleet.gateway.requests()] == [408, 408])
        assert seen(fleet) == []

    def test_an_engine_that_dies_is_502_and_not_asked_again(self, fleet: Fleet) -> None:
        assert refused(fleet.ask(do="die"), 502)["code"] == "engine_failed"
        assert len(seen(fleet)) == 1

    def test_a_silent_engine_is_504_and_not_asked_again(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, timings={"server_s": 1})
        assert refused(fleet.ask(do="hold"), 504)["code"] == "engine_timeout"
        assert len(seen(fleet)) == 1

    def test_no_ready_engine_is_503_at_once(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(gateway=NGINX, ready=False)
        answer = fleet.ask()
        assert refused(answer, 503)["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1

    @pytest.mark.parametrize("status", [400, 404, 405, 413, 422, 429, 500, 503])
    def test_what_an_engine_answers_comes_through(self, fleet: Fleet, status: int) -> None:
        answer = fleet.ask(do=str(status))
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith("engine ")
        assert ("retry-after" in answer.headers) == (status in {429, 503})
        assert "allow" not in answer.headers
        assert answer.headers["server"] == "nginx"


class TestHealth:
    def test_it_follows_the_engines(self, start_fleet: StartFleet) -> None:
        fleet = start_fleet(["chat", "embed"], 1, gateway=NGINX, ready=False)
        assert refused(fleet.client.get("/lb-health"), 503)
        fleet.mark(embed_0=200)
        until("it is healthy", lambda: fleet.client.get("/lb-health").status_code == 200)

    def test_the_status_page_and_metrics_are_apart(self, fleet: Fleet) -> None:
        status = f"http://127.0.0.1:{fleet.gateway.plan.gateway.stats_port}"
        fleet.ask()
        metrics = httpx.get(f"{status}/metrics").text
        assert 'fleet_gateway_engine_ready{engine="chat-0",model="chat"} 1' in metrics
        assert 'fleet_gateway_keys_total{verdict="good"} 1' in metrics
        assert httpx.get(f"{status}/").text.startswith("Active connections:")
        assert httpx.get(f"{status}/key").status_code == 404
