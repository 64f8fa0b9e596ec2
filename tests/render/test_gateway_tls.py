"""TLS, HTTP/2, the PROXY protocol, and what hostile clients try with them."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import httpx
import pytest

from tests.render.gateways import AUTH, IN_TIME_S, Fleet, StartFleet, tool, until
from tests.render.plans import KEY
from tests.render.test_gateway_api import HOSTILE, NOT_HTTP, seen

Headers = Sequence[tuple[str, str]]


def certificate(path: Path, name: str = "localhost", *, kind: str = "ec") -> None:
    """A new key and a certificate that it signs itself, as one PEM, put in place at once."""
    new = {"ec": ["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"], "rsa": ["rsa:2048"]}[kind]
    key, signed = path.with_suffix(".key"), path.with_suffix(".crt")
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"]
    command: list[str | Path] = [tool("openssl"), "req", "-x509", "-nodes", "-days", "2", "-newkey", *new, *subject]
    subprocess.run([*command, "-keyout", key, "-out", signed], check=True, capture_output=True)
    together = path.with_suffix(".new")
    together.write_text(signed.read_text() + key.read_text())
    together.rename(path)


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.pem"
    certificate(path)
    return path


@pytest.fixture
def fleet(start_fleet: StartFleet, pem: Path) -> Fleet:
    return start_fleet(gateway={"tls": str(pem)})


def trusting(pem: Path, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pem))
    context.set_alpn_protocols(protocols or ("http/1.1",))
    return context


def connect(fleet: Fleet, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", fleet.gateway.plan.gateway.port), timeout=IN_TIME_S)
    return context.wrap_socket(plain, server_hostname="localhost")


def serial(fleet: Fleet, pem: Path) -> str:
    """Of the certificate that a client is shown."""
    with connect(fleet, trusting(pem)) as connection:
        return str(dict(connection.getpeercert() or {})["serialNumber"])


class H2:
    """A client that sends whatever header list it is told to."""

    def __init__(self, fleet: Fleet, pem: Path) -> None:
        self.socket = connect(fleet, trusting(pem, "h2"))
        assert self.socket.selected_alpn_protocol() == "h2"
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.connection = h2.connection.H2Connection(config)
        self.connection.initiate_connection()

    def ask(self, headers: Headers, body: bytes = b"") -> tuple[int, bytes]:
        """The status and body of the answer; 0: the stream was reset, or the connection closed."""
        stream = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream, headers, end_stream=not body)
        if body:
            self.connection.send_data(stream, body, end_stream=True)
        status, answer = 0, b""
        while True:
            self.socket.sendall(self.connection.data_to_send())
            data = self.socket.recv(65536)
            if not data:
                return status, answer
            for event in self.connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, h2.events.DataReceived):
                    answer += event.data
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return status, answer

    def close(self) -> None:
        self.socket.close()


def request(path: str = "/v1/completions", method: str = "POST", **pseudo: str) -> list[tuple[str, str]]:
    values = {"method": method, "scheme": "https", "authority": "localhost", "path": path} | pseudo
    return [*((f":{name}", value) for name, value in values.items()), ("authorization", f"Bearer {KEY}")]


class TestTls:
    @pytest.mark.parametrize("protocol", ["http/1.1", "h2"])
    def test_both_protocols_are_spoken(self, fleet: Fleet, pem: Path, protocol: str) -> None:
        with httpx.Client(verify=trusting(pem), http1=protocol != "h2", http2=protocol == "h2") as client:
            answer = client.post(f"{fleet.gateway.url}/v1/completions", headers=AUTH, json={})
        assert answer.status_code == 200
        assert answer.http_version == {"h2": "HTTP/2", "http/1.1": "HTTP/1.1"}[protocol]

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_new_versions_are_spoken_with_good_ciphers(self, fleet: Fleet, pem: Path, version: ssl.TLSVersion) -> None:
        context = trusting(pem)
        context.minimum_version = context.maximum_version = version
        with connect(fleet, context) as connection:
            cipher, *_ = connection.cipher() or ("",)
        assert "GCM" in cipher or "CHACHA20" in cipher

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    def test_old_ones_are_not(self, fleet: Fleet, pem: Path, version: ssl.TLSVersion) -> None:
        context = trusting(pem)
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            context.minimum_version = context.maximum_version = version
        with pytest.raises((ssl.SSLError, ConnectionError)):
            connect(fleet, context)

    @pytest.mark.parametrize("kind", ["ec", "rsa"])
    @pytest.mark.parametrize(
        "ciphers", ["AES128-SHA", "AES256-GCM-SHA384", "ECDHE-RSA-AES128-SHA:ECDHE-ECDSA-AES128-SHA"]
    )
    def test_nor_ciphers_without_forward_secrecy_or_authentication(
        self, start_fleet: StartFleet, pem: Path, kind: str, ciphers: str
    ) -> None:
        certificate(pem, kind=kind)
        fleet = start_fleet(gateway={"tls": str(pem)})
        context = trusting(pem)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            connect(fleet, context)

    def test_plain_http_gets_nothing(self, fleet: Fleet) -> None:
        with pytest.raises(httpx.TransportError):
            httpx.post(f"http://127.0.0.1:{fleet.gateway.plan.gateway.port}/v1/completions", headers=AUTH, json={})
        assert seen(fleet) == []

    def test_errors_have_their_shape_over_h2(self, fleet: Fleet, pem: Path) -> None:
        with httpx.Client(verify=trusting(pem), http2=True, base_url=fleet.gateway.url) as client:
            answers = {
                401: client.post("/v1/completions", json={}),
                404: client.post("/v1/nothing", headers=AUTH, json={}),
                405: client.get("/v1/completions", headers=AUTH),
                415: client.post("/v1/completions", headers=AUTH | {"Content-Encoding": "gzip"}, content=b"x"),
            }
        for status, answer in answers.items():
            assert (answer.status_code, answer.http_version) == (status, "HTTP/2")
            assert answer.headers["content-type"] == "application/json"
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    def test_an_engine_that_dies_is_asked_once_over_h2(self, fleet: Fleet, pem: Path) -> None:
        client = H2(fleet, pem)
        # 502; HAProxy 2.6 resets the stream instead.
        assert client.ask([*request(), ("x-fake", "die")])[0] in {502, 0}
        client.close()
        assert len(seen(fleet)) == 1

    def test_tokens_are_not_held_back_over_h2(self, fleet: Fleet, pem: Path) -> None:
        headers = AUTH | {"X-Fake": "stream 5"}
        engines = list(fleet.engines.values())
        engines[0].permit()
        engines[1].permit()
        url = f"{fleet.gateway.url}/v1/completions"
        with (
            httpx.Client(verify=trusting(pem), http2=True, timeout=IN_TIME_S) as client,
            client.stream("POST", url, headers=headers, json={}) as answer,
        ):
            engine = next(engine for engine in engines if engine.open)
            lines = (line for line in answer.iter_lines() if line)
            assert next(lines) == f"data: 0 {engine.name}"
            for n in range(1, 5):  # each is let go only when the last has arrived
                engine.permit()
                assert next(lines) == f"data: {n} {engine.name}"

    def test_a_client_that_resets_its_stream_ends_it_in_the_engine(self, fleet: Fleet, pem: Path) -> None:
        client = H2(fleet, pem)
        client.connection.send_headers(1, [*request(), ("x-fake", "hold")], end_stream=True)
        client.socket.sendall(client.connection.data_to_send())
        until("an engine has it", lambda: sum(engine.open for engine in fleet.engines.values()) == 1)
        client.connection.reset_stream(1)
        client.socket.sendall(client.connection.data_to_send())
        until("it is cancelled", lambda: sum(engine.aborted for engine in fleet.engines.values()) == 1)
        client.close()


class TestReload:
    def test_a_new_certificate_is_taken_up_and_no_request_fails(self, fleet: Fleet, pem: Path) -> None:
        old = pem.with_name("old.pem")
        old.write_bytes(pem.read_bytes())
        stop, failed, done = threading.Event(), [], [0] * 4
        both = ssl.create_default_context(cafile=str(old))

        def ask(number: int) -> None:
            while not stop.is_set():
                try:  # each its own connection: who has one keeps it, and its certificate
                    answer = httpx.post(f"{fleet.gateway.url}/v1/completions", headers=AUTH, json={}, verify=both)
                    if answer.status_code != 200:
                        failed.append(answer.text)
                except httpx.HTTPError as error:
                    failed.append(repr(error))
                done[number] += 1

        first = serial(fleet, old)
        certificate(pem)
        both.load_verify_locations(cafile=str(pem))
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(done))]
        for thread in threads:
            thread.start()
        try:
            until("some are answered", lambda: sum(done) > 20)
            fleet.gateway.reload(fleet.gateway.plan)
            until("the new one is shown", lambda: shown(fleet, both) != first)
            before = sum(done)
            until("more are answered", lambda: sum(done) > before + 20)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failed == []
        assert serial(fleet, pem) != first

    def test_a_broken_certificate_leaves_the_old_one_in_place(self, fleet: Fleet, pem: Path) -> None:
        old = pem.with_name("old.pem")
        old.write_bytes(pem.read_bytes())
        first = serial(fleet, old)
        pem.write_text("no certificate")
        assert fleet.gateway.check().returncode != 0  # the apply program goes no further
        assert serial(fleet, old) == first


def shown(fleet: Fleet, context: ssl.SSLContext) -> str:
    with connect(fleet, context) as connection:
        return str(dict(connection.getpeercert() or {})["serialNumber"])


class TestHostile:
    """What must not pass over HTTP/1.1 must not over h2 either, nor what only h2 can say."""

    @pytest.fixture
    def client(self, fleet: Fleet, pem: Path) -> Iterator[H2]:
        client = H2(fleet, pem)
        yield client
        client.close()

    def test_a_proper_request_passes(self, fleet: Fleet, client: H2) -> None:
        assert client.ask(request(), b"{}")[0] == 200
        assert seen(fleet) == ["/v1/completions"]

    def test_paths(self, fleet: Fleet, pem: Path) -> None:
        paths = [path for path in HOSTILE if path not in NOT_HTTP]
        assert len(paths) >= 40
        for path in paths:
            for method in ("GET", "POST"):
                client = H2(fleet, pem)
                status, body = client.ask(request(path, method))
                client.close()
                assert status in {404, 400, 0}, (method, path, status)
                if status == 404:
                    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, path
        assert seen(fleet) == []

    PSEUDO: tuple[tuple[str, Headers], ...] = (
        ("no path", [(":method", "POST"), (":scheme", "https"), (":authority", "x")]),
        ("an empty path", request("")),
        ("a path without a slash", request("metrics")),
        ("a star", request("*", "OPTIONS")),
        ("two paths", [*request("/v1/completions"), (":path", "/metrics")]),
        ("two paths, the bad one first", [(":path", "/metrics"), *request("/v1/completions")]),
        ("two methods", [*request(), (":method", "GET")]),
        ("no method", [(":scheme", "https"), (":path", "/v1/completions"), (":authority", "x")]),
        ("no scheme", [(":method", "POST"), (":path", "/metrics"), (":authority", "x")]),
        ("an unknown pseudo-header", [(":evil", "1"), *request("/metrics")]),
        ("a pseudo-header after a header", [("x", "1"), *request("/metrics")]),
        ("a whole URL", request("https://engine/metrics")),
        ("another scheme", request("/metrics", scheme="ftp")),
        ("a scheme with a path in it", request("/metrics", scheme="http://engine/v1/completions?")),
        ("an authority with a path in it", request("/metrics", authority="engine/v1/completions?")),
        ("an authority with a user", request("/metrics", authority="v1@engine")),
        ("a space in the path", request("/v1/completions /metrics")),
        ("a line in the path", request("/v1/completions\r\nX: y")),
        ("a request in the path", request("/metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics")),
        ("a NUL in the path", request("/v1/completions\0/metrics")),
        ("a request in the method", request("/v1/completions", "GET /metrics HTTP/1.1\r\nX: y\r\n\r\nPOST")),
        ("a small method", request("/metrics", "post")),
        ("a tunnel", [(":method", "CONNECT"), (":authority", "127.0.0.1:22")]),
        ("a tunnel through", request("/metrics", "CONNECT", protocol="websocket")),
        ("a fragment", request("/v1/completions#/metrics")),
        ("a backslash", request("\\metrics")),
        ("dots", request("/models/chat/v1/../../../metrics")),
        ("dots for a model", request("/models/../v1/metrics")),
        ("slashes for a model", request("/models//v1/completions")),
        ("an encoded slash after a model", request("/models/chat%2fv1/completions")),
        ("more behind a model", request("/models/chat/v1/completions/v1/completions")),
        ("a model in a model", request("/models/chat/models/chat/v1/completions")),
        ("a model without an API", request("/models/chat")),
        ("metrics of a model", request("/models/chat/metrics")),
        ("a capital model", request("/Models/chat/v1/completions")),
    )

    @pytest.mark.parametrize(("what", "headers"), PSEUDO, ids=[what for what, _ in PSEUDO])
    def test_pseudo_headers(self, fleet: Fleet, client: H2, what: str, headers: Headers) -> None:
        status, _ = client.ask(headers)
        if status == 200:  # before 2.8: authority and path are read as one URL
            assert what == "an authority with a path in it"
            assert seen(fleet) == ["/v1/completions"]
        else:
            assert status in {0, 400, 404, 405}, what
            assert seen(fleet) == []

    SMUGGLE: tuple[tuple[str, Headers], ...] = (
        ("chunked", [("transfer-encoding", "chunked")]),
        ("chunked, in capitals", [("Transfer-Encoding", "chunked")]),
        ("a connection", [("connection", "keep-alive, transfer-encoding"), ("transfer-encoding", "chunked")]),
        ("an upgrade", [("connection", "upgrade"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABk")]),
        ("a wrong length", [("content-length", "3")]),
        ("two lengths", [("content-length", "50"), ("content-length", "3")]),
        ("no length", [("content-length", "")]),
        ("a request in a value", [("x", "y\r\nContent-Length: 0\r\n\r\nGET /metrics HTTP/1.1")]),
        ("a request in a name", [("x: y\r\n\r\nGET /metrics HTTP/1.1\r\nz", "1")]),
        ("a colon in a name", [("content-length:", "0")]),
        ("a space in a name", [("content-length ", "0")]),
        ("an empty name", [("", "0")]),
        ("other TE", [("te", "gzip, chunked")]),
    )

    @pytest.mark.parametrize(("what", "headers"), SMUGGLE, ids=[what for what, _ in SMUGGLE])
    def test_nothing_is_smuggled(self, fleet: Fleet, client: H2, what: str, headers: Headers) -> None:
        hidden = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        status, _ = client.ask([*request(), *headers], hidden)
        assert status in {0, 200, 400}, what
        assert set(seen(fleet)) <= {"/v1/completions"}
        for engine in fleet.engines.values():
            for one in engine.seen:
                assert one.body == hidden
                assert one.header("Transfer-Encoding") == one.header("Upgrade") == []


class TestProxyProtocol:
    @pytest.fixture
    def fleet(self, start_fleet: StartFleet) -> Fleet:
        return start_fleet(gateway={"proxy_protocol": True})

    def send(self, fleet: Fleet, prefix: bytes, context: ssl.SSLContext | None = None) -> bytes:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
        plain = socket.create_connection(("127.0.0.1", fleet.gateway.plan.gateway.port), timeout=IN_TIME_S)
        plain.sendall(prefix)
        connection = context.wrap_socket(plain, server_hostname="localhost") if context else plain
        with connection:
            try:
                connection.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
                return b"".join(iter(lambda: connection.recv(65536), b""))
            except ConnectionError:
                return b""

    V2 = (
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes([203, 0, 113, 7]) + bytes([10, 0, 0, 1]) + b"\x30\x39\x01\xbb"
    )

    @pytest.mark.parametrize("prefix", [b"PROXY TCP4 203.0.113.7 10.0.0.1 12345 443\r\n", V2])
    def test_the_client_is_the_one_that_the_balancer_names(self, fleet: Fleet, prefix: bytes) -> None:
        assert self.send(fleet, prefix).startswith(b"HTTP/1.1 200")
        until("it is logged", lambda: [line["client"] for line in fleet.gateway.requests()] == ["203.0.113.7"])
        (one,) = (one for engine in fleet.engines.values() for one in engine.seen)
        assert one.header("X-Forwarded-For") == ["203.0.113.7"]

    def test_without_it_nobody_gets_in(self, fleet: Fleet) -> None:
        assert b" 200 " not in self.send(fleet, b"")
        assert seen(fleet) == []

    def test_it_comes_before_tls(self, start_fleet: StartFleet, pem: Path) -> None:
        fleet = start_fleet(gateway={"proxy_protocol": True, "tls": str(pem)})
        assert self.send(fleet, self.V2, trusting(pem)).startswith(b"HTTP/1.1 200")
        until("it is logged", lambda: [line["client"] for line in fleet.gateway.requests()] == ["203.0.113.7"])


def test_the_certificate_is_in_no_bundle(fleet: Fleet, pem: Path) -> None:
    text: dict[str, Any] = dict(fleet.gateway.bundle.files)
    assert not any("PRIVATE KEY" in content for content in text.values())
    assert any(str(pem) in content for content in text.values())
