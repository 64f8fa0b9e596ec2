"""What a fleet costs: by the hour, by the month, and by the token. Pure: prices, plans and speeds are handed in.

A fleet is rented whole, and several models share it. The rules by which its price is divided are these, and no others:
a pool among its models by the GPUs that they hold, idle ones along with them; everything else among the models by their
parts of the pools; a model's part among prompts and answers by the engines' time for each.
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
CERTAINTY: Mapping[str, Literal["at most", "about"]] = {"spot": "at most", "capacity-block": "about"}
"""What the price of a rung is, where it is no price that AWS names."""


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
    share: float = 1.0
    """Of all hours, in which it is rented: the price is that on average."""


@dataclass(frozen=True)
class Charged:
    """What is charged beside machines, all the time."""

    name: str
    """Of the line."""
    what: str
    """What it is made of."""
    usd_per_hour: float
    price: str
    """Where the price is from."""


@dataclass(frozen=True)
class Fall:
    """What the fleet costs when pools are not on the first rung of their ladders."""

    certainty: Literal["", "at most", "about"] = ""
    """Of the price of the first rungs."""
    more_usd_per_hour: float = 0.0
    """With every pool on its dearest rung."""
    dearest: tuple[tuple[str, str], ...] = ()
    """(pool, rung) where that is not the first one."""


NO_FALL = Fall()


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
    share: float = 1.0
    """Of all hours, in which they are there."""

    @property
    def capacity(self) -> float:
        """Requests a month that its engines answer without a pause."""
        return self.share * capacity(self.speed, self.engines)


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
    if pool.share < 1:
        price = f"{price}; on average, its hours are {pool.share:.0%} of all"
    each = pool.share * pool.usd_per_hour / pool.nodes
    return Rented(pool.name, pool.instance or pool.gpu, pool.nodes, each, price, pool.gpus_per_node, pool.share)


def host_rent(
    use: Literal["gateway", "monitor"], count: int, region: str, services: Mapping[str, Service]
) -> Rented | None:
    """The gateways or the monitor; None if the catalog has no price in this region."""
    for name, row in services.items():
        if row.use == use and region in row.usd_per_hour:
            return Rented(use, name, count, row.usd_per_hour[region], f"{region}, on demand, {row.date}")
    return None


def fall(pools: Sequence[PoolPlan]) -> Fall:
    """What the price of the first rungs is worth, and what the dearest ones cost."""
    firsts = {CERTAINTY.get(pool.rungs[0].kind, "") for pool in pools if pool.rungs}
    found = [(pool, max(pool.rungs, key=lambda rung: rung.usd_per_hour)) for pool in pools if pool.rungs]
    dearer = [(pool, rung) for pool, rung in found if rung.usd_per_hour > pool.rungs[0].usd_per_hour]
    return Fall(
        certainty="about" if "about" in firsts else "at most" if "at most" in firsts else "",
        more_usd_per_hour=sum(
            pool.share * ((pool.highest_usd_per_hour or 0) - (pool.usd_per_hour or 0)) for pool, _ in dearer
        ),
        dearest=tuple((pool.name, rung.kind) for pool, rung in dearer),
    )


# The plan


def plan_cost(  # noqa: PLR0913 - what a cost is made of
    rented: Sequence[Rented],
    served: Sequence[Served],
    others: Sequence[Hosted],
    *,
    charged: Sequence[Charged] = (),
    by_use: Sequence[str] = (),
    fall: Fall = NO_FALL,
) -> CostPlan:
    """Add it up, divide it among the models, and compare each with every hosted API.

    Args:
        rented: Every pool, the gateways, the monitor.
        served: Every model.
        others: What it is compared with.
        charged: What is charged beside them all the time; none: machines alone are counted.
        by_use: What is charged by use, in words.
        fall: What later rungs cost.
    """
    machines = [
        CostLine(
            name=it.name,
            instance=it.instance,
            count=it.count,
            usd_per_hour_each=it.usd_per_hour,
            usd_per_hour=it.count * it.usd_per_hour,
            price=it.price,
        )
        for it in rented
    ]
    rest = [
        CostLine(
            name=it.name,
            instance=it.what,
            count=0,
            usd_per_hour_each=it.usd_per_hour,
            usd_per_hour=it.usd_per_hour,
            price=it.price,
        )
        for it in charged
    ]
    lines = (*machines, *rest)
    total = sum(line.usd_per_hour for line in lines)
    pools = {it.name: it for it in rented if it.gpus}
    shared = total - sum(it.count * it.usd_per_hour for it in pools.values())
    return CostPlan(
        usd_per_hour=total,
        usd_per_month=per_month(total),
        certainty=fall.certainty,
        dearest_usd_per_hour=total + fall.more_usd_per_hour,
        dearest=fall.dearest,
        lines=lines,
        models=tuple(_model(it, pools[it.pool], _parts(it, served, pools), shared, others) for it in served),
        by_use=tuple(by_use),
        assumptions=_assumptions(charged, by_use, [it.name for it in rented if it.share < 1]),
    )


def _assumptions(charged: Sequence[Charged], by_use: Sequence[str], scheduled: Sequence[str]) -> tuple[str, ...]:
    counted = f"Counted are machines, {', '.join(it.name for it in charged)}; nobody's time, and no taxes."
    kept = "The model cache counts the weights of this plan once; those of models that were replaced stay in it too."
    return (
        f"A month has {HOURS_PER_MONTH} hours, and everything is rented for all of them"
        + (f" but {', '.join(scheduled)}, rented in the hours of its schedule." if scheduled else "."),
        *((counted, kept) if charged else (MACHINES_ONLY,)),
        *((f"Charged by use, and not counted: {'; '.join(by_use)}.",) if by_use else ()),
        *RULES,
    )


MACHINES_ONLY = "Machines only: no data transfer, disks, load balancer, snapshots or logs, and nobody's time."
RULES = (
    "A pool is divided among its models by the GPUs that they hold, idle ones along with them.",
    "Everything else is divided among the models by their parts of the pools.",
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


def _model(it: Served, pool: Rented, parts: tuple[float, float], shared: float, others: Sequence[Hosted]) -> ModelCost:
    of_pool, share = parts
    usd_per_hour = of_pool + share * shared
    traffic, month = it.traffic, per_month(usd_per_hour)
    own = SelfHosted(
        engines=it.engines,
        usd_per_month=month,
        fixed_usd=per_month(share * shared),
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
