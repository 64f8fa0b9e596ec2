"""What the plan says of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra import planning, weights
from infra.config import parse
from infra.plan import make_plan
from infra.plan.model import GatewayPlan
from tests.unit.inputs import a_lock, entry, plan

MIB = 1 << 20
TWO: dict[str, Any] = {"chat": {"weights": "small"}, "code": {"weights": "small"}}


def gateway(models: dict[str, Any] | None = None, lock: Any = None, **options: Any) -> GatewayPlan:
    return plan(models or {"chat": {"weights": "small"}}, lock=lock or a_lock(), gateway=options).gateway


def test_by_default_it_is_plain() -> None:
    made = gateway()
    assert (made.routing, made.tls, made.proxy_protocol, made.discovery) == ("least-loaded", None, False, "static")
    assert (made.server_weights, made.srv, made.audio) == ((), (), ())
    assert made.url.startswith("http://127.0.0.1:")


def test_what_is_written_is_taken() -> None:
    asked = {
        "routing": "session",
        "session-header": "X-Chat",
        "weights": {"chat-2": 10},
        "tls": {"certificate": "/etc/gateway.pem"},
    }
    made = gateway({"chat": {"weights": "small", "engines": 2}}, **asked)
    assert (made.routing, made.session_header, made.server_weights) == ("session", "X-Chat", (("chat-2", 10),))
    assert made.tls == "/etc/gateway.pem"
    assert made.url.startswith("https://")


def test_another_certificate_is_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "gateway.pem"
    tls: dict[str, Any] = {"gateway": {"tls": {"certificate": str(pem)}}}
    monkeypatch.setattr(planning, "make_plan", lambda *_: plan({"chat": {"weights": "small"}}, **tls))
    monkeypatch.setattr("infra.targets.local.host.read_host", lambda: None)

    def digest() -> str:
        config = parse({"target": "local", "models": {"chat": {"weights": "small"}}, **tls})
        return planning.plan_config("test", config, a_lock(), {}).gateway.tls_sha256

    assert digest() == "", "the proxy says that there is none"
    pem.write_text("one")
    first = digest()
    pem.write_text("another")
    assert first != digest() != ""


@pytest.mark.parametrize(
    ("written", "body", "buffer"),
    [(None, MIB, MIB), ("512KiB", MIB // 2, MIB // 2), ("4MiB", 4 * MIB, 4 * MIB), ("32MiB", 32 * MIB, 4 * MIB)],
)
def test_of_several_models_a_body_is_read_up_to_4_mib(written: str | None, body: int, buffer: int) -> None:
    made = gateway(TWO, **({"max-body": written} if written else {}))
    assert made.max_body_bytes == body
    assert buffer < made.buffer_bytes < buffer + 64 * 1024
    assert made.queue * made.buffer_bytes <= 128 * MIB


def test_and_larger_ones_are_told_their_path() -> None:
    made = plan(TWO, gateway={"max-body": "32MiB"})
    assert any("/models/NAME/v1" in notice.message for notice in made.notices)
    assert not any("/models/NAME/v1" in notice.message for notice in plan(TWO, gateway={"max-body": "4MiB"}).notices)


def test_of_one_model_none_is_read_whatever_its_size() -> None:
    assert plan(gateway={"max-body": "64MiB"}).gateway.buffer_bytes == 64 * 1024


def test_models_that_listen_are_known_by_their_architecture() -> None:
    lock = a_lock(ears=entry(architecture="WhisperForConditionalGeneration"))
    assert gateway({"chat": {"weights": "small"}, "hear": {"weights": "ears"}}, lock).audio == ("hear",)


POOLS: dict[str, Any] = {"aws": {}, "kubernetes": {"p": {"gpu": "h100-80gb"}}}


@pytest.mark.parametrize(
    ("target", "name"),
    [("aws", "_chat-8b._tcp.test.internal"), ("kubernetes", "_http._tcp.chat-8b.test.svc.cluster.local")],
)
def test_on_gpus_engines_are_found_by_dns(target: str, name: str) -> None:
    config: dict[str, Any] = {
        "target": target,
        "models": {"chat.8b": {"weights": "llama-3.1-8b-instruct"}},
        "pools": POOLS[target],
    }
    made = make_plan("test", parse(config).in_region("us-east-1"), weights.load(), None, {})
    (engines,) = made.engine_sets
    ((model, found_at, slots),) = made.gateway.srv
    assert (made.gateway.discovery, model, found_at) == ("dns-srv", "chat.8b", name)
    assert slots > engines.engines
