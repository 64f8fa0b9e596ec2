"""The rendered files by themselves: HAProxy takes them, they are as expected, and every number is the plan's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.paths import NODECONFIG
from infra.render.gateway import gateway
from tests.render.gateways import Gateway, tool
from tests.render.plans import a_layout, a_plan, counter

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("chat", "embed", "coder")


def config(**plan: Any) -> str:
    return gateway(a_plan(**plan), a_layout()).files["programs/haproxy/haproxy.cfg"]


@pytest.mark.parametrize("engines", [1, 2, 64])
@pytest.mark.parametrize("models", [1, 3])
def test_haproxy_takes_it_without_a_warning(root: Path, models: int, engines: int) -> None:
    result = Gateway(root, a_plan(MODELS[:models], engines, port=counter(20000)), tool("haproxy")).check()
    assert result.returncode == 0, result.stderr
    assert not re.search("WARNING|ALERT", result.stderr), result.stderr


@pytest.mark.parametrize(("models", "engines"), [(1, 1), (1, 2), (3, 2), (1, 3)])
def test_it_is_as_expected(golden: Callable[[Path, str], None], models: int, engines: int) -> None:
    text = config(models=MODELS[:models], engines=engines)
    golden(GOLDEN / f"haproxy-{models}x{engines}.cfg", text)


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
    ],
)
def test_so_does_every_number_of_the_gateway(change: Mapping[str, Any]) -> None:
    (value,) = change.values()
    wanted = {"round-robin": "balance roundrobin", (("chat", 7373),): "maxconn 7373"}.get(value, str(value))
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
