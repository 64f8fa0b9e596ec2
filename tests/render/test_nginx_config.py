"""The rendered files by themselves: nginx takes them, they are as expected, and every number is the plan's."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.deployed import ON_NGINX
from infra.paths import NODECONFIG
from infra.plan.model import KeyPlan
from infra.render.gateway import gateway
from tests.render.gateways import tool
from tests.render.nginx_gateways import NGINX, NginxGateway, nginx_bundle
from tests.render.plans import a_layout, a_plan, counter
from tests.render.test_gateway_tls import certificate

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("chat", "embed", "coder")
KEYS = (
    KeyPlan(name="a", sha256="a" * 64, concurrency=7373, models=("chat",)),
    KeyPlan(name="b", sha256="b" * 64, concurrency=7373),
    KeyPlan(name="c", sha256="c" * 64, concurrency=2),
    KeyPlan(name="d", sha256="d" * 64),
)
EVERYTHING = {
    "routing": "session",
    "proxy_protocol": True,
    "audio": ("chat",),
    "server_weights": (("chat-0", 25),),
    "key_limits": KEYS,
}


def files(gateway: Mapping[str, Any] | None = None, **plan: Any) -> dict[str, str]:
    return nginx_bundle(a_plan(gateway={**NGINX, **(gateway or {})}, **plan)).files


def config(**plan: Any) -> str:
    rendered = files(**plan)
    return rendered["programs/nginx/engines.conf"] + rendered["programs/nginx/nginx.conf"]


def checked(root: Path, models: int, engines: int, **gateway: Any) -> subprocess.CompletedProcess[str]:
    plan = a_plan(MODELS[:models], engines, port=counter(20000), gateway={**NGINX, **gateway})
    return NginxGateway(root, plan, tool("nginx")).check()


@pytest.mark.parametrize("engines", [1, 2, 64])
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["plain", "everything"])
def test_nginx_takes_it_without_a_warning(root: Path, models: int, engines: int, more: Mapping[str, Any]) -> None:
    result = checked(root, models, engines, **more)
    assert (result.returncode, result.stderr) == (0, "")


def test_nginx_takes_tls(root: Path) -> None:
    pem = root / "gateway.pem"
    certificate(pem)
    result = checked(root, 1, 2, tls=str(pem))
    assert result.returncode == 0, result.stderr
    # From 1.25.1 on nginx would like `http2` to be said elsewhere, where older ones do not know it.
    assert re.sub(r".*\[warn\].*http2.*\n", "", result.stderr) == ""


def test_what_it_does_not_take_is_told(root: Path) -> None:
    result = checked(root, 1, 2, bind="300.0.0.1")
    assert result.returncode != 0
    assert "300.0.0.1" in result.stderr


@pytest.mark.parametrize(("models", "engines"), [(1, 1), (1, 2), (3, 2)])
def test_it_is_as_expected(golden: Callable[[Path, str], None], models: int, engines: int) -> None:
    golden(GOLDEN / f"nginx-{models}x{engines}.conf", config(models=MODELS[:models], engines=engines))


def test_everything_is_as_expected(golden: Callable[[Path, str], None]) -> None:
    golden(GOLDEN / "nginx-everything.conf", config(models=MODELS, gateway=EVERYTHING | {"tls": "/etc/gateway.pem"}))


def test_the_same_plan_gives_the_same_bytes() -> None:
    first, second = (nginx_bundle(a_plan(gateway=NGINX)) for _ in range(2))
    assert first.digest == second.digest


def test_a_layout_without_nginx_is_refused() -> None:
    with pytest.raises(ValueError, match="nginx"):
        gateway(a_plan(gateway=NGINX), a_layout())


@pytest.mark.parametrize("change", [{"routing": "prefix-affinity"}, {"discovery": "dns-srv"}])
def test_so_is_what_it_cannot_do(change: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="nginx"):
        files(gateway=change)


@pytest.mark.parametrize("timing", ["connect_ms", "queue_s", "server_s", "client_s", "request_s", "gateway_stop_s"])
def test_every_timing_comes_from_the_plan(timing: str) -> None:
    assert re.search(r"\b7373", config(timings={timing: 7373}))


@pytest.mark.parametrize("timing", ["check_ms", "check_fast_ms", "check_timeout_ms", "check_fall", "check_rise"])
def test_so_do_those_of_the_keeper(timing: str) -> None:
    settings = json.loads(files(timings={timing: 7373})["programs/keeper/keeper.json"])
    assert settings[timing] == 7373


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"bind": "10.7.3.73"}, "listen 10.7.3.73:"),
        ({"port": 7373}, ":7373 reuseport"),
        ({"stats_port": 7373}, "127.0.0.1:7373 reuseport"),
        ({"routing": "session"}, "hash $fleet_affinity consistent;"),
        ({"routing": "session", "session_header": "X-Chat-7373"}, "$http_x_chat_7373"),
        ({"maxconn": 7373}, f"worker_connections {3 * (7373 + 2 * 16 + 16)};"),
        ({"server_maxconn": (("chat", 7373),)}, f"max_conns={7373 + 16}"),
        ({"max_body_bytes": 7373}, "client_max_body_size 7373;"),
        ({"server_weights": (("chat-0", 73),)}, "weight=73 "),
        ({"tls": "/etc/7373.pem"}, "ssl_certificate /etc/7373.pem;"),
        ({"proxy_protocol": True}, " proxy_protocol;"),
        ({"key_limits": KEYS}, "limit_conn keys-7373 7373;"),
    ],
)
def test_so_does_everything_of_the_gateway(change: Mapping[str, Any], wanted: str) -> None:
    assert wanted in config(gateway=change)
    assert wanted not in config()


def test_the_template_has_no_durations_of_its_own() -> None:
    for name in ("nginx.conf.j2", "engines.conf.j2"):
        text = (NODECONFIG / "gateway/nginx" / name).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        assert [line for line in lines if re.search(r"(?<![\w}])\d+(ms|s|m|h)\b", line)] == []


def test_a_new_timing_or_key_is_taken_up_without_a_restart() -> None:
    """Only a changed unit makes the apply program restart a service; else it reloads it."""
    changes: list[dict[str, Any]] = [
        {},
        {"timings": {"gateway_stop_s": 900}},
        {"timings": {"check_ms": 60}},
        {"gateway": {"keys": ()}},
        {"gateway": {"key_limits": KEYS}},
    ]
    for program in ("nginx", "keeper"):
        assert len({files(**change)[f"programs/{program}/program.ini"] for change in changes}) == 1


def test_only_the_hashes_of_keys_are_rendered_and_only_for_the_keeper() -> None:
    ((_, sha256),) = a_plan().gateway.keys
    assert [path for path, text in files().items() if sha256 in text] == ["programs/keeper/keeper.json"]


def test_every_engine_starts_out_of_rotation() -> None:
    servers = [line for line in config(engines=64).splitlines() if line.startswith("    server 127.0.0.1:")]
    assert len(servers) == 64
    assert all(line.endswith(" down;") for line in servers)


def test_what_is_deployed_tells_its_ports() -> None:
    plan = a_plan(gateway=NGINX)
    text = files()["programs/nginx/nginx.conf"]
    found = {server: int(match[1]) for server, (_, p) in ON_NGINX.items() if (match := re.search(p, text))}
    assert found == {"gateway": plan.gateway.port, "gateway statistics": plan.gateway.stats_port}
