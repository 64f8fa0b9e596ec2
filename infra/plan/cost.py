"""What a fleet costs: by the hour, by the month, and by the token. Pure: prices, plans and speeds are handed in.

A fleet is rented whole, and several models share it. The rules by which its price is divided are these, and no others:
a pool among its models by the GPUs that they hold, idle ones along with them; gateways and the monitor among the models
by their parts of the pools; a model's part among prompts and answers by the engines' time for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from infra.plan.hosted import MILLION, Hosted, SelfHosted, compare
from infra.plan.model import CostLine, CostPlan, ModelCost
from infra.plan.money import HOURS_PER_MONTH, per_month

if TYPE_CHECKING:
    from infra.catalog import Instance
    from infra.catalog.services import Service
    from infra.plan.ledger import Ledger
    from infra.plan.model import PoolPlan, SpeedPlan

SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600


@dataclass(frozen=True)
class Rented:
    """Machines of one kind that are paid by the hour."""

    name: str
    """A pool's name, `gateway` or `monitor`."""
    instance: str
    count: int
    usd_per_hour: float
    """Of one."""
    price: str
    """Where the price is from."""
    gpus: int = 0
    """Of one; 0: no pool."""


@dataclass(frozen=True)
class Traffic:
    """What clients ask of one model in a month."""

    requests: int
    prompt_tokens: int
    """Of one request."""
    answer_tokens: int


@dataclass(frozen=True)
class Served:
    """One model in one pool."""

    model: str
    pool: str
    engines: int
    gpus: int
    """Of one engine."""
    speed: SpeedPlan
    """At the traffic's prompts and answers."""
    traffic: Traffic

    @property
    def capacity(self) -> float:
        """Requests a month that its engines answer without a pause."""
        return capacity(self.speed, self.engines)


def capacity(speed: SpeedPlan, engines: int) -> float:
    """Requests that so many engines answer in a month without a pause."""
    return engines * speed.requests_s * SECONDS_PER_MONTH


# Prices


def priced(instances: Mapping[str, Instance], overrides: Mapping[str, float], region: str) -> dict[str, Instance]:
    """The catalog with the stack's own prices in one region."""
    return {
        name: row.model_copy(
            update={
                "usd_per_hour": {**row.usd_per_hour, region: overrides[name]},
                "source": f"prices.instances.{name} of the stack file",
            }
        )
        if name in overrides
        else row
        for name, row in instances.items()
    }


def pool_rent(pool: PoolPlan) -> Rented | None:
    """A pool at the price of its first rung; None if nobody knows it."""
    if pool.usd_per_hour is None:
        return None
    price = pool.rungs[0].basis if pool.rungs else f"pools.{pool.name}.usd_per_hour"
    each = pool.usd_per_hour / pool.nodes
    return Rented(pool.name, pool.instance or pool.gpu, pool.nodes, each, price, pool.gpus_per_node)


def host_rent(
    use: Literal["gateway", "monitor"], count: int, region: str, services: Mapping[str, Service]
) -> Rented | None:
    """The gateways or the monitor; None if the catalog has no price in this region."""
    for name, row in services.items():
        if row.use == use and region in row.usd_per_hour:
            return Rented(use, name, count, row.usd_per_hour[region], f"{region}, on demand, {row.date}")
    return None


# The plan


def plan_cost(rented: Sequence[Rented], served: Sequence[Served], others: Sequence[Hosted]) -> CostPlan:
    """Add it up, divide it among the models, and compare each with every hosted API.

    Args:
        rented: Every pool, the gateways, the monitor.
        served: Every model.
        others: What it is compared with.
    """
    lines = tuple(
        CostLine(
            name=it.name,
            instance=it.instance,
            count=it.count,
            usd_per_hour_each=it.usd_per_hour,
            usd_per_hour=it.count * it.usd_per_hour,
            price=it.price,
        )
        for it in rented
    )
    total = sum(line.usd_per_hour for line in lines)
    pools = {it.name: it for it in rented if it.gpus}
    hosts = sum(it.count * it.usd_per_hour for it in rented if not it.gpus)
    return CostPlan(
        usd_per_hour=total,
        usd_per_month=per_month(total),
        lines=lines,
        models=tuple(_model(it, pools[it.pool], _parts(it, served, pools), hosts, others) for it in served),
        assumptions=_ASSUMPTIONS,
    )


_ASSUMPTIONS = (
    f"A month has {HOURS_PER_MONTH} hours, and everything is rented for all of them.",
    "Machines only: no data transfer, disks, load balancer, snapshots or logs, and nobody's time.",
    "A pool is divided among its models by the GPUs that they hold, idle ones along with them.",
    "Gateways and the monitor are divided among the models by their parts of the pools.",
    "A model's part is divided among prompts and answers by the engines' time for each.",
    "Hosted prices are list prices, without discounts for batches or cached prompts, for the same number of tokens.",
    "What rests on speed (capacity, utilisation, break-even) is an estimate, unless the configuration was measured.",
)


def _parts(one: Served, served: Sequence[Served], pools: Mapping[str, Rented]) -> tuple[float, float]:
    """One model's part of its pool, and its part of all pools."""

    def rent(it: Served) -> float:
        held = sum(other.engines * other.gpus for other in served if other.pool == it.pool)
        return pools[it.pool].count * pools[it.pool].usd_per_hour * it.engines * it.gpus / held

    everything = sum(rent(it) for it in served)
    return rent(one), rent(one) / everything if everything else 1 / len(served)


def _model(it: Served, pool: Rented, parts: tuple[float, float], hosts: float, others: Sequence[Hosted]) -> ModelCost:
    of_pool, share = parts
    usd_per_hour = of_pool + share * hosts
    traffic, month = it.traffic, per_month(usd_per_hour)
    own = SelfHosted(
        engines=it.engines,
        usd_per_month=month,
        fixed_usd=per_month(share * hosts),
        node_usd=per_month(pool.usd_per_hour),
        engines_per_node=max(1, pool.gpus // it.gpus),
        engine_requests=it.capacity / it.engines,
    )
    tokens = (traffic.prompt_tokens, traffic.answer_tokens)
    prompts, answers = usd_per_mtok(month, it.speed, traffic, it.capacity)
    return ModelCost(
        model=it.model,
        engines=it.engines,
        requests_per_month=traffic.requests,
        prompt_tokens=traffic.prompt_tokens,
        answer_tokens=traffic.answer_tokens,
        capacity_requests_per_month=int(it.capacity),
        utilisation=traffic.requests / it.capacity,
        usd_per_hour=usd_per_hour,
        usd_per_month=month,
        usd_per_mtok_input=prompts,
        usd_per_mtok_output=answers,
        error_percent=it.speed.error_percent,
        measured=it.speed.measured,
        hosted=tuple(compare(own, traffic.requests, tokens, other, it.speed.error_percent) for other in others),
    )


def note_overload(cost: CostPlan, ledger: Ledger) -> None:
    """Say which models get more traffic than their engines can serve."""
    for it in cost.models:
        if it.utilisation > 1:
            needed = math.ceil(it.engines * it.utilisation)
            words = (
                f"{it.requests_per_month:,} requests a month are {it.utilisation:.0%} of what {it.engines} engines do"
            )
            ledger.note(f"models.{it.model}.traffic", f"{words} without a pause: at least {needed} are needed")


def usd_per_mtok(
    usd_per_month: float, speed: SpeedPlan, traffic: Traffic, capacity: float
) -> tuple[float | None, float | None]:
    """Dollars per million tokens of prompts and of answers, at this traffic; no more is counted than can be served."""
    requests = min(traffic.requests, capacity)
    if not requests:
        return None, None
    share = prompt_share(speed, traffic)
    prompts = usd_per_month * share / (requests * traffic.prompt_tokens) * MILLION
    answers = usd_per_month * (1 - share) / (requests * traffic.answer_tokens) * MILLION
    return prompts, answers


def prompt_share(speed: SpeedPlan, traffic: Traffic) -> float:
    """The part of an engine's time that goes to prompts; the rest goes to answers.

    A request takes an engine that is never idle 1/requests_s; prompt_tokens/prefill_tokens_s of that is its prompt.
    Where the measured whole is less than the computed part (prompts were cached), all tokens count alike.
    """
    share = traffic.prompt_tokens / speed.prefill_tokens_s * speed.requests_s
    return share if share < 1 else traffic.prompt_tokens / (traffic.prompt_tokens + traffic.answer_tokens)
