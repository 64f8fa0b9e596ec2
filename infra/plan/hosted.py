"""Where self-hosting begins to pay. A fleet costs the same whatever its traffic, until it is full and has to grow.

    cost of a month = hosts that do not grow + nodes x price of a node
    break-even      = cost of a month / price of a request at the hosted API

A break-even that the fleet cannot serve is none: then the fleet has to grow until what it serves pays for it, which
never happens if a full node answers a request for more than the hosted price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from infra.plan.model import HostedCost
from infra.plan.money import usd

if TYPE_CHECKING:
    from infra.catalog import HostedPrice

MILLION = 1_000_000
SIZES = ("small", "large", "")


class Price(Protocol):
    """Dollars per million tokens."""

    @property
    def input_usd_per_mtok(self) -> float:
        """Of prompts."""

    @property
    def output_usd_per_mtok(self) -> float:
        """Of answers."""


@dataclass(frozen=True)
class Hosted:
    """One model at a hosted API."""

    name: str
    """`provider/model`."""
    size: str
    """`small`, `large`, or empty where it is not known."""
    input_usd_per_mtok: float
    output_usd_per_mtok: float
    price: str
    """Where the price is from."""

    def request(self, prompt_tokens: int, answer_tokens: int) -> float:
        """Dollars for one request."""
        return (prompt_tokens * self.input_usd_per_mtok + answer_tokens * self.output_usd_per_mtok) / MILLION


def hosted(catalog: Mapping[str, HostedPrice], overrides: Mapping[str, Price]) -> tuple[Hosted, ...]:
    """Every hosted model, small and cheap ones first; `prices.hosted` of the stack goes before the catalog."""
    prices = {
        name: Hosted(name, row.size, row.input_usd_per_mtok, row.output_usd_per_mtok, f"{row.source}, {row.date}")
        for name, row in catalog.items()
    }
    for name, price in overrides.items():
        size = prices[name].size if name in prices else ""
        prices[name] = Hosted(name, size, price.input_usd_per_mtok, price.output_usd_per_mtok, f"prices.hosted.{name}")
    return tuple(
        sorted(prices.values(), key=lambda it: (SIZES.index(it.size), it.input_usd_per_mtok, it.output_usd_per_mtok))
    )


@dataclass(frozen=True)
class SelfHosted:
    """What one model's engines cost in a month, what they can do, and how they grow."""

    engines: int
    usd_per_month: float
    fixed_usd: float
    """The part of it that does not grow: gateways, monitor."""
    node_usd: float
    """One more node, for a month."""
    engines_per_node: int
    engine_requests: float
    """Requests that one engine answers in a month without a pause."""

    @property
    def capacity(self) -> float:
        """Requests that all of them answer in a month."""
        return self.engines * self.engine_requests

    @property
    def usd_per_request_when_full(self) -> float:
        """What a request costs on a node that never waits."""
        return self.node_usd / (self.engines_per_node * self.engine_requests)


class BreakEven(NamedTuple):
    """Where both cost the same."""

    requests: float
    """A month."""
    engines: int
    nodes: int | None
    """None: the fleet as it is; else how many nodes there have to be, engines on every GPU."""


def break_even(own: SelfHosted, usd_per_request: float) -> BreakEven | None:
    """Requests a month at which both cost the same; None: at no number."""
    if not usd_per_request:
        return None
    requests = own.usd_per_month / usd_per_request
    if requests <= own.capacity:
        return BreakEven(requests, own.engines, None)
    # k full nodes pay if fixed + k x node <= k x engines of a node x requests of an engine x price of a request.
    gain = own.engines_per_node * own.engine_requests * usd_per_request - own.node_usd
    if gain <= 0:
        return None
    nodes = max(1, math.ceil(own.fixed_usd / gain))
    requests = (own.fixed_usd + nodes * own.node_usd) / usd_per_request
    return BreakEven(requests, math.ceil(requests / own.engine_requests), nodes)


def compare(own: SelfHosted, requests: int, tokens: tuple[int, int], other: Hosted, error_percent: int) -> HostedCost:
    """One model's traffic at one hosted API.

    Args:
        own: What serves it now.
        requests: Its traffic in a month.
        tokens: Of one request: prompt, answer.
        other: The hosted model.
        error_percent: Of what the engines can do.
    """
    each = other.request(*tokens)
    found = break_even(own, each)
    return HostedCost(
        name=other.name,
        size=other.size,
        usd_per_month=requests * each,
        usd_per_request=each,
        break_even_requests=math.ceil(found.requests) if found else None,
        break_even_engines=found.engines if found else None,
        verdict=_verdict(own, requests, each, found, error_percent),
        price=other.price,
    )


def _verdict(own: SelfHosted, requests: int, each: float, found: BreakEven | None, error_percent: int) -> str:
    if not each:
        return "never: hosted is free"
    if found is None:
        full = own.usd_per_request_when_full
        close = full <= each * (1 + error_percent / 100)
        words = f"never: a full node answers a request for {usd(full)}, hosted it costs {usd(each)}"
        return f"perhaps {words}, and the estimate may be wrong by {error_percent} %" if close else words
    if found.requests <= requests <= own.capacity:
        return f"pays now: saves {usd(requests * each - own.usd_per_month)} a month"
    busy = found.requests / (found.engines * own.engine_requests)
    words = f"pays from {math.ceil(found.requests):,} requests a month, at {busy:.0%} utilisation"
    if found.nodes is None:
        return words
    return f"{words}, with {found.engines} engines on {found.nodes} {'node' if found.nodes == 1 else 'nodes'}"
