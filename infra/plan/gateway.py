"""The numbers of the gateway: how much it lets in, how much it lets wait, how much it holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from infra.config import ENCRYPTED
from infra.plan.model import AlertThresholds, GatewayPlan
from infra.plan.timings import queue_length

if TYPE_CHECKING:
    from collections.abc import Mapping

    from infra.config import StackConfig
    from infra.plan.ledger import Ledger
    from infra.plan.model import Timings

KIB, MIB = 1 << 10, 1 << 20
BIND = "127.0.0.1"
BYTES_PER_TOKEN = 32
"""Of JSON: four characters of text, each up to six bytes when it is escaped, and what is around them."""
DEFAULT_BODY = MIB
LARGEST_READ_BODY = MIB
"""Where there are several models, `model` is read from the body: the gateway holds the whole of each request."""
SINGLE_MODEL_BUFFER = 64 * KIB
"""Half of it bounds requests that do not state their length."""
HEADERS = 32 * KIB
QUEUE_MEMORY = 128 * MIB
FASTEST_REQUEST_S = 1
"""A slot serves one request a second at best; more that wait would only wait in vain."""
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
            problem = (
                "too much where there are several models: the gateway reads a whole body to find out which is meant"
            )
            ledger.refuse("gateway.max-body", problem, f"at most {LARGEST_READ_BODY // MIB}MiB")
        return given
    needed = max(sizing.context for sizing in models.values()) * BYTES_PER_TOKEN
    default = max(DEFAULT_BODY, math.ceil(needed / MIB) * MIB)
    if several:
        default = min(default, LARGEST_READ_BODY)
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
) -> GatewayPlan:
    """The gateway.

    `server_maxconn`: an engine gets what it can run at once. The rest waits in the gateway, where it has a deadline and
    goes to the engine that is free first (measured: least connections with such a limit beat every other policy).
    `queue`, for each model: what its engines serve within `queue_s` at the rate that is expected (`rates`, requests a
    second), or could if all requests were short; the deadline does the rest. Less if waiting bodies would take more
    than 128 MiB.
    `maxconn`: all that is served or waits, and clients that are idle; so it is the queue that refuses, with an answer.
    """
    body = max_body_bytes(config.gateway.max_body, models, ledger)
    several = len(models) > 1
    buffer = math.ceil((body + HEADERS) / (16 * KIB)) * 16 * KIB if several else SINGLE_MODEL_BUFFER
    slots = {name: sizing.engines * sizing.concurrency for name, sizing in models.items()}
    if rates:
        waiting = max(queue_length(rate, timings.queue_s) for rate in rates.values())
        reason = f"what is served in {timings.queue_s} s at the expected rate"
    else:
        waiting = max(slots.values()) * timings.queue_s // FASTEST_REQUEST_S
        reason = f"what could be served in {timings.queue_s} s if all requests were short"
    queue = min(waiting, QUEUE_MEMORY // buffer)
    for name, sizing in models.items():
        ledger.because(
            f"gateway.server-maxconn.{name}", sizing.concurrency, "what one engine runs at once: its concurrency"
        )
    ledger.because("gateway.queue", queue, reason if queue == waiting else "waiting requests may take 128 MiB")
    if ENCRYPTED in config.api_keys.values():
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
        keys=tuple(sorted(config.api_keys.items())),
    )


def thresholds(models: Mapping[str, Served], ttft_p95_s: float) -> AlertThresholds:
    """What alerts compare with: the promise, and as many requests waiting as are being served."""
    slots = min(sizing.engines * sizing.concurrency for sizing in models.values())
    return AlertThresholds(ttft_p95_s=ttft_p95_s, queue_waiting=slots)
