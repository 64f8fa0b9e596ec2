"""The numbers of the gateway: how much it lets in, how much it lets wait, how much it holds."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Protocol

from infra.config import ENCRYPTED
from infra.findings import did_you_mean
from infra.plan.engines import names
from infra.plan.model import AlertThresholds, DnsPlan, GatewayPlan, KeyPlan
from infra.plan.proxy_features import on_nginx
from infra.plan.timings import queue_length

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from infra.config import StackConfig
    from infra.plan.ledger import Ledger
    from infra.plan.model import ModelPlan, Timings
    from infra.weights.lock import WeightsLock

KIB, MIB = 1 << 10, 1 << 20
BIND = "127.0.0.1"
BYTES_PER_TOKEN = 32
"""Of JSON: four characters of text, each up to six bytes when it is escaped, and what is around them."""
DEFAULT_BODY = MIB
DEFAULT_READ_BODY = MIB
LARGEST_READ_BODY = 4 * MIB
"""Where there are several models, `model` is read from the body: the gateway holds the whole of each request. No more
than 1 MiB by default, as few have need of more and all pay for it: so many fewer requests may wait. What is larger than
4 MiB takes the path of its model, /models/NAME/v1, and is not read."""
LISTENING = frozenset(
    f"{name}ForConditionalGeneration"
    for name in (
        *("CohereAsr", "FireRedASR2", "FunASR", "Gemma3n", "GlmAsr", "GraniteSpeech", "GraniteSpeechPlus"),
        *("MossTranscribeDiarize", "Qwen3ASR", "Qwen3OmniMoe", "Voxtral", "Whisper"),
    )
) | {"MoonshotKimiaForCausalLM"}
"""Architectures for which vLLM 0.32 has /v1/audio (those that implement its SupportsTranscription)."""
SINGLE_MODEL_BUFFER = 64 * KIB
"""Half of it bounds requests that do not state their length."""
HEADERS = 32 * KIB
QUEUE_MEMORY = 128 * MIB
FASTEST_REQUEST_S = 1
"""A slot serves one request a second at best; more that wait would only wait in vain."""
BYTES_PER_ENGINE = 128
"""In an answer of the DNS: a record of where it is, and one of that name's address (75 measured)."""
LARGEST_ANSWER = 65_535
"""Bytes of a datagram."""
IDLE_CLIENTS = 256
"""Connections that are kept alive and ask for nothing."""


class Served(Protocol):
    """What the gateway has to know of one model."""

    @property
    def context(self) -> int:
        """Tokens."""

    @property
    def concurrency(self) -> int:
        """Requests that one engine runs at once."""

    @property
    def engines(self) -> int:
        """How many there are."""


def max_body_bytes(given: int | None, models: Mapping[str, Served], ledger: Ledger) -> int:
    """Largest request that the gateway takes."""
    several = len(models) > 1
    if given is not None:
        ledger.given("gateway.max-body", f"{given} bytes")
        if several and given > LARGEST_READ_BODY:
            most = f"{LARGEST_READ_BODY // MIB}MiB"
            ledger.note("gateway.max-body", f"requests over {most} must say their model in the path: /models/NAME/v1")
        return given
    needed = max(sizing.context for sizing in models.values()) * BYTES_PER_TOKEN
    default = max(DEFAULT_BODY, math.ceil(needed / MIB) * MIB)
    if several:
        default = min(default, DEFAULT_READ_BODY)
    ledger.because(
        "gateway.max-body", f"{default // MIB}MiB", f"{BYTES_PER_TOKEN} bytes a token of context, at least 1MiB"
    )
    return default


def plan_gateway(  # noqa: PLR0913 - everything that it depends on
    config: StackConfig,
    models: Mapping[str, Served],
    ports: Mapping[str, int],
    timings: Timings,
    ledger: Ledger,
    *,
    bind: str = BIND,
    rates: Mapping[str, float] | None = None,
    srv_name: str | None = None,
    audio: Iterable[str] = (),
    hosts: int = 1,
) -> GatewayPlan:
    """The gateway.

    `server_maxconn`: an engine gets what it can run at once. The rest waits in the gateway, where it has a deadline and
    goes to the engine that is free first (measured: least connections with such a limit beat every other policy).
    `queue`, for each model: what its engines serve within `queue_s` at the rate that is expected (`rates`, requests a
    second), or could if all requests were short; the deadline does the rest. Less if waiting bodies would take more
    than 128 MiB.
    `maxconn`: all that is served or waits, and clients that are idle; so it is the queue that refuses, with an answer.
    `audio`: the models that listen.
    `gateways`: of several, all count together what a key does; there is room for one more while one is replaced.
    `srv`: where ready engines are registered in the DNS, they are found there; `srv_name` has `{model}` for the model.
    """
    body = max_body_bytes(config.gateway.max_body, models, ledger)
    several = len(models) > 1
    read = min(body, LARGEST_READ_BODY)
    buffer = math.ceil((read + HEADERS) / (16 * KIB)) * 16 * KIB if several else SINGLE_MODEL_BUFFER
    slots = {name: sizing.engines * sizing.concurrency for name, sizing in models.items()}
    if rates:
        waiting = max(queue_length(rate, timings.queue_s) for rate in rates.values())
        reason = f"what is served in {timings.queue_s} s at the expected rate"
    else:
        waiting = max(slots.values()) * timings.queue_s // FASTEST_REQUEST_S
        reason = f"what could be served in {timings.queue_s} s if all requests were short"
    if config.gateway.proxy == "nginx":
        waiting, reason = 0, "nginx has none: requests wait in the engines"
    queue = min(waiting, QUEUE_MEMORY // buffer)
    on_nginx(config, models, ledger, srv=srv_name is not None)
    for name, sizing in models.items():
        ledger.because(
            f"gateway.server-maxconn.{name}", sizing.concurrency, "what one engine runs at once: its concurrency"
        )
    ledger.because("gateway.queue", queue, reason if queue == waiting else "waiting requests may take 128 MiB")
    keys = plan_keys(config, models)
    if any(key.sha256 == ENCRYPTED for key in keys):
        ledger.note("api-keys", "some hashes are encrypted: only Pulumi can read them, so this plan does not have them")
    return GatewayPlan(
        proxy=config.gateway.proxy,
        bind=bind,
        port=ports["gateway"],
        stats_port=ports["gateway-stats"],
        routing=config.gateway.routing,
        maxconn=sum(slots.values()) + len(models) * queue + IDLE_CLIENTS,
        server_maxconn=tuple((name, sizing.concurrency) for name, sizing in models.items()),
        queue=queue,
        max_body_bytes=body,
        buffer_bytes=buffer,
        route_by_body=several,
        keys=tuple((key.name, key.sha256) for key in keys),
        key_limits=keys if any(key.limited for key in keys) else (),
        session_header=config.gateway.session_header,
        server_weights=_weights(config, models, ledger),
        tls=config.gateway.tls.certificate if config.gateway.tls else None,
        proxy_protocol=config.gateway.proxy_protocol,
        audio=tuple(audio),
        discovery="dns-srv" if srv_name else "static",
        srv=_srv(models, srv_name) if srv_name else (),
        dns=_dns(models, ports) if srv_name else DnsPlan(),
        gateways=hosts + 1 if hosts > 1 else 1,
        peers_port=ports["gateway-peers"] if hosts > 1 else 0,
    )


def listening(models: Iterable[ModelPlan], lock: WeightsLock) -> list[str]:
    """The models whose engines have /v1/audio."""
    return [model.name for model in models if lock.models[model.weights].facts.architecture in LISTENING]


def _weights(config: StackConfig, models: Mapping[str, Served], ledger: Ledger) -> tuple[tuple[str, int], ...]:
    """The weights of single engines, each of which there is."""
    known = [engine for name, sizing in models.items() for engine in names(name, sizing.engines)]
    for name in config.gateway.weights:
        if name not in known:
            ledger.refuse(f"gateway.weights.{name}", "there is no such engine", did_you_mean(name, known))
    return tuple(sorted(config.gateway.weights.items()))


def _srv(models: Mapping[str, Served], srv_name: str) -> tuple[tuple[str, str, int], ...]:
    """Where each model's engines are found, and room for as many as there are while an update replaces some.

    Of a model's name a label of the DNS can have letters, digits and hyphens only.
    """
    return tuple(
        (name, srv_name.format(model=re.sub("[._]", "-", name)), sizing.engines + max(2, sizing.engines // 4))
        for name, sizing in models.items()
    )


def _dns(models: Mapping[str, Served], ports: Mapping[str, int]) -> DnsPlan:
    """How the gateway asks where engines are.

    Where it has a nameserver of its own (nodeconfig/agent/fleet_agent/names.py), all of a model's engines are in one
    answer. Else the answer is as large as such answers usually may be.
    """
    if "gateway-names" not in ports:
        return DnsPlan()
    most = max(sizing.engines + max(2, sizing.engines // 4) for sizing in models.values())
    payload = min(LARGEST_ANSWER, max(DnsPlan().payload_bytes, most * BYTES_PER_ENGINE))
    return DnsPlan(nameservers=(f"{BIND}:{ports['gateway-names']}",), payload_bytes=payload)


def plan_keys(config: StackConfig, models: Mapping[str, Served]) -> tuple[KeyPlan, ...]:
    """The API keys by name. A key for all models is for any: nothing has to be looked up for it."""
    return tuple(
        KeyPlan(
            name=name,
            sha256=key.hash,
            models=tuple(sorted(set(key.models))) if key.models and set(key.models) != set(models) else None,
            rpm=key.rpm,
            concurrency=key.concurrency,
            expires=key.expires,
        )
        for name, key in sorted(config.api_keys.items())
    )


def thresholds(config: StackConfig, models: Mapping[str, Served], ttft_p95_s: float) -> AlertThresholds:
    """What alerts compare with: the promises, and as many requests waiting as are being served."""
    slo = config.slo
    return AlertThresholds(
        ttft_p95_s=ttft_p95_s,
        queue_waiting=min(sizing.engines * sizing.concurrency for sizing in models.values()),
        tpot_p95_s=slo.tpot_p95,
        # 99.9 % leaves 0.001, and not 0.0010000000000000009.
        failing=None if slo.availability is None else round(1 - slo.availability / 100, 6),
    )
