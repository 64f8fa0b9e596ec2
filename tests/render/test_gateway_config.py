"""The rendered files by themselves: HAProxy takes them, they are as expected, and every number is the plan's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.paths import NODECONFIG
from infra.plan.model import DnsPlan
from infra.render.gateway import gateway
from tests.render.gateways import Gateway, tool
from tests.render.plans import a_layout, a_plan, counter

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("chat", "embed", "coder")


def config(**plan: Any) -> str:
    return gateway(a_plan(**plan), a_layout()).files["programs/haproxy/haproxy.cfg"]


FOUND: dict[str, Any] = {
    "discovery": "dns-srv",
    "srv": tuple((model, f"_{model}._tcp.fleet.internal", 66) for model in MODELS),
    "dns": DnsPlan(nameservers=("10.0.0.2:53",)),
}
FEATURES: dict[str, dict[str, Any]] = {
    "prefix-affinity": {"routing": "prefix-affinity", "server_weights": (("chat-0", 10),)},
    "session": {"routing": "session"},
    "proxy-protocol": {"proxy_protocol": True},
    "audio": {"audio": ("chat",)},
    "audio-of-two": {"audio": ("chat", "embed")},
    "dns-prefix-affinity": FOUND | {"routing": "prefix-affinity"},
    "resolv-conf": FOUND | {"dns": DnsPlan()},
}


def check(root: Path, models: int, engines: int, gateway: Mapping[str, Any]) -> None:
    plan = a_plan(MODELS[:models], engines, port=counter(20000), gateway=gateway)
    result = Gateway(root, plan, tool("haproxy")).check()
    assert result.returncode == 0, result.stderr
    assert not re.search("WARNING|ALERT", result.stderr), result.stderr


@pytest.mark.parametrize("discovery", [{}, FOUND], ids=["static", "dns-srv"])
@pytest.mark.parametrize("engines", [1, 2, 64])
@pytest.mark.parametrize("models", [1, 3])
def test_haproxy_takes_it_without_a_warning(
    root: Path, models: int, engines: int, discovery: Mapping[str, Any]
) -> None:
    check(root, models, engines, discovery)


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_and_each_feature(root: Path, models: int, feature: str) -> None:
    check(root, models, 2, FEATURES[feature])


@pytest.mark.parametrize(("models", "engines"), [(1, 1), (1, 2), (1, 3), (1, 64), (3, 1), (3, 2), (3, 64)])
def test_it_is_as_expected(golden: Callable[[Path, str], None], models: int, engines: int) -> None:
    text = config(models=MODELS[:models], engines=engines)
    golden(GOLDEN / f"haproxy-{models}x{engines}.cfg", text)


@pytest.mark.parametrize("engines", [1, 2, 64])
@pytest.mark.parametrize("models", [1, 3])
def test_with_discovery_too(golden: Callable[[Path, str], None], models: int, engines: int) -> None:
    srv = tuple((model, name, engines + 2) for model, name, _ in FOUND["srv"])
    text = config(models=MODELS[:models], engines=0, gateway=FOUND | {"srv": srv})
    golden(GOLDEN / f"haproxy-dns-{models}x{engines}.cfg", text)


def test_and_with_all_that_can_be_asked_for(golden: Callable[[Path, str], None]) -> None:
    features = {
        "routing": "prefix-affinity",
        "server_weights": (("chat-0", 10),),
        "tls": "/etc/vllm-fleet/gateway.pem",
        "proxy_protocol": True,
        "audio": ("embed",),
    }
    golden(GOLDEN / "haproxy-features.cfg", config(models=MODELS, engines=2, gateway=features))


def test_the_same_plan_gives_the_same_bytes() -> None:
    first, second = (gateway(a_plan(), a_layout()) for _ in range(2))
    assert first.digest == second.digest


def test_a_layout_without_haproxy_is_refused() -> None:
    with pytest.raises(ValueError, match="HAProxy"):
        gateway(a_plan(), a_layout(haproxy=None))


@pytest.mark.parametrize(
    "timing",
    [
        "check_ms",
        "check_fast_ms",
        "check_timeout_ms",
        "check_fall",
        "check_rise",
        "connect_ms",
        "queue_s",
        "server_s",
        "client_s",
        "request_s",
        "keep_alive_s",
        "gateway_stop_s",
    ],
)
def test_every_timing_comes_from_the_plan(timing: str) -> None:
    assert re.search(r"\b7373", config(timings={timing: 7373}))


@pytest.mark.parametrize(
    "change",
    [
        {"bind": "10.7.3.73"},
        {"port": 7373},
        {"stats_port": 7373},
        {"routing": "round-robin"},
        {"maxconn": 7373},
        {"server_maxconn": (("chat", 7373),)},
        {"queue": 7373},
        {"max_body_bytes": 7373},
        {"buffer_bytes": 7373},
        {"tls": "/etc/7373.pem"},
        {"routing": "session", "session_header": "X-7373"},
        {"routing": "prefix-affinity", "prefix_bytes": 7373},
        {"routing": "prefix-affinity", "balance_percent": 7373},
        {"server_weights": (("chat-0", 7373),)},
        {"discovery": "dns-srv", "srv": (("chat", "_7373._tcp.x", 4),)},
        {"discovery": "dns-srv", "srv": (("chat", "_chat._tcp.x", 7373),)},
        *(
            {"discovery": "dns-srv", "srv": (("chat", "_chat._tcp.x", 4),), "dns": DnsPlan.model_validate({name: 7373})}
            for name in ("poll_ms", "retry_ms", "retries", "gone_ms", "keep_s", "payload_bytes")
        ),
    ],
)
def test_so_does_every_number_of_the_gateway(change: Mapping[str, Any]) -> None:
    wanted = "balance roundrobin" if change == {"routing": "round-robin"} else str(change.get("bind", 7373))
    assert wanted in config(gateway=change)
    assert wanted not in config()


def test_the_template_has_no_durations_of_its_own() -> None:
    text = (NODECONFIG / "gateway/haproxy.cfg.j2").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert [line for line in lines if re.search(r"(?<![\w}])\d+(ms|s|m|h)\b", line)] == []


def test_a_new_timing_is_taken_up_without_a_restart() -> None:
    """Only a changed unit makes the apply program restart a service; else it reloads it."""
    units = {
        gateway(a_plan(timings=timings), a_layout()).files["programs/haproxy/program.ini"]
        for timings in ({}, {"gateway_stop_s": 900}, {"queue_s": 60})
    }
    assert len(units) == 1


def test_only_the_hashes_of_keys_are_rendered() -> None:
    plan = a_plan()
    files = gateway(plan, a_layout()).files
    ((name, sha256),) = plan.gateway.keys
    assert f"{sha256} {name}\n" in files["programs/haproxy/keys.map"]
    assert [path for path, text in files.items() if sha256 in text] == ["programs/haproxy/keys.map"]
