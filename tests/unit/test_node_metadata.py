"""The instance metadata service as a machine asks it, and what systemd says of its units."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fleet_agent.metadata import Metadata, Unreachable
from fleet_agent.move import install
from fleet_agent.node import CONFIG, Unit
from fleet_agent.watch import read_units


class Service:
    """IMDSv2: a token first, and never without."""

    def __init__(self) -> None:
        self.documents = {"instance-id": "i-1"}
        self.current = "1"
        self.status = 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.answer(service.status or 200, service.current)

            def do_GET(self) -> None:
                path = self.path.removeprefix("/meta-data/")
                if self.headers.get("X-aws-ec2-metadata-token") != service.current:
                    self.answer(401, "")
                else:
                    self.answer(200 if path in service.documents else 404, service.documents.get(path, ""))

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_document_that_is_not_there_is_empty(service: Service) -> None:
    metadata = Metadata(service.address)
    assert metadata.get("instance-id") == "i-1"
    assert metadata.get("spot/instance-action") == ""
    service.documents["spot/instance-action"] = "{}"
    assert metadata.get("spot/instance-action") == "{}"


def test_a_token_that_has_ended_is_replaced(service: Service) -> None:
    metadata = Metadata(service.address)
    metadata.get("instance-id")
    service.current = "2"
    assert metadata.get("instance-id") == "i-1"


def test_a_service_that_does_not_answer_says_nothing(service: Service) -> None:
    service.status = 403
    with pytest.raises(Unreachable, match="gives no token: 403"):
        Metadata(service.address).get("spot/instance-action")
    with pytest.raises(Unreachable, match="does not answer"):
        Metadata("http://127.0.0.1:1").get("spot/instance-action")


def test_units_are_told_apart() -> None:
    text = (
        "Result=exit-code\nExecMainStatus=78\nId=fleet-weights.service\nActiveState=failed\n\n"
        "Result=success\nExecMainStatus=0\nId=fleet-apply.service\nActiveState=active\n"
    )
    found = read_units(text)
    assert found == {
        "fleet-weights.service": Unit("failed", "exit-code", CONFIG),
        "fleet-apply.service": Unit("active", "success", 0),
    }
    assert found["fleet-weights.service"].refused
    assert read_units("") == {}


def test_only_units_that_differ_are_installed(tmp_path: Path) -> None:
    units, target = tmp_path / "units", tmp_path / "system"
    units.mkdir()
    target.mkdir()
    (units / "a.service").write_text("1")
    assert install(units, target)
    assert not install(units, target)
    (units / "a.service").write_text("2")
    assert install(units, target)
    assert (target / "a.service").read_text() == "2"
