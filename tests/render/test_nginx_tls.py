"""The gateway with nginx: TLS, HTTP/2 and the PROXY protocol, by the same tests as HAProxy's."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.render.gateways import AUTH, Fleet, StartFleet, until
from tests.render.nginx_gateways import NGINX
from tests.render.test_gateway_api import refused, seen
from tests.render.test_gateway_tls import TestHostile as Hostile
from tests.render.test_gateway_tls import TestProxyProtocol as ProxyProtocol
from tests.render.test_gateway_tls import TestReload as Reload
from tests.render.test_gateway_tls import TestTls as Tls
from tests.render.test_gateway_tls import certificate, trusting

__all__ = ["Hostile", "ProxyProtocol", "Reload", "Tls"]


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.pem"
    certificate(path)
    return path


@pytest.fixture
def fleet(start_fleet: StartFleet, pem: Path) -> Fleet:
    return start_fleet(gateway=NGINX | {"tls": str(pem)})


class TestTls(Tls):
    def test_plain_http_gets_nothing(self, fleet: Fleet) -> None:
        url = f"http://127.0.0.1:{fleet.gateway.plan.gateway.port}/v1/completions"
        assert refused(httpx.post(url, headers=AUTH, json={}), 400)["code"] == "bad_request"
        assert seen(fleet) == []


class TestReload(Reload):
    pass


class TestHostile(Hostile):
    pass


class TestProxyProtocol(ProxyProtocol):
    @pytest.fixture
    def fleet(self, start_fleet: StartFleet) -> Fleet:
        return start_fleet(gateway=NGINX | {"proxy_protocol": True})

    def test_it_comes_before_tls(self, start_fleet: StartFleet, pem: Path) -> None:
        fleet = start_fleet(gateway=NGINX | {"proxy_protocol": True, "tls": str(pem)})
        assert self.send(fleet, self.V2, trusting(pem)).startswith(b"HTTP/1.1 200")
        until("it is logged", lambda: [line["client"] for line in fleet.gateway.requests()] == ["203.0.113.7"])
        assert len(seen(fleet)) == 1
