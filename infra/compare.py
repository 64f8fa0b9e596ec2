"""The worked example: what so many requests a month cost at hosted APIs, and on GPUs that one rents.

`fleet compare` prints it. The numbers are those of `fleet plan`: the same functions on the same catalog.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.catalog import gpus, hosted_prices, instances, vllm_cpu
from infra.catalog.efficiency import efficiency
from infra.catalog.memory import memory_catalog
from infra.findings import ConfigError, Finding, did_you_mean
from infra.plan import fit
from infra.plan.cost import SECONDS_PER_MONTH, Rented, Served, Traffic, plan_cost
from infra.plan.hosted import Hosted, hosted
from infra.plan.model import Frozen, ModelCost, SpeedPlan
from infra.plan.money import HOURS_PER_MONTH
from infra.plan.throughput import Load, estimate
from infra.plan.traffic import ANSWER_TOKENS, PROMPT_TOKENS
from infra.plan.weights_memory import weights_bytes

if TYPE_CHECKING:
    from infra.catalog import Gpu, Instance
    from infra.weights.lock import LockEntry, WeightsLock

REQUESTS = 100_000
REGION = "us-east-1"
MOST_AT_ONCE = 64
"""More requests at once make single streams slow."""
BATCHED_TOKENS = 8192
"""`--max-num-batched-tokens`, vLLM's default on these GPUs."""


@dataclass(frozen=True)
class Setup:
    """One model on one GPU."""

    name: str
    weights: str
    """An entry of models.lock.yaml."""
    gpu: str
    """Key of the catalog."""


SETUPS = (
    Setup("Llama 3.3 70B", "llama-3.3-70b-instruct-fp8", "h100-80gb"),
    Setup("Llama 3.1 8B", "llama-3.1-8b-instruct", "a100-40gb"),
)


class HostedBill(Frozen):
    """The traffic at one hosted API."""

    name: str
    size: str
    input_usd_per_mtok: float
    output_usd_per_mtok: float
    usd_per_request: float
    usd_per_month: float
    price: str


class SetupBill(Frozen):
    """The traffic on GPUs of one kind, as many as it needs."""

    name: str
    weights: str
    format: str
    gpu: str
    """As `nvidia-smi` calls it."""
    instance: str
    """The cheapest that has such a GPU: less cannot be rented."""
    gpus: int
    """Of the instance."""
    usd_per_hour: float
    """Of the instance."""
    price: str
    concurrency: int
    speed: SpeedPlan
    instances: int
    rent: ModelCost
    """Whole instances are paid for this model, other GPUs idle."""
    share: ModelCost
    """Its other GPUs are paid for by someone else."""


class Comparison(Frozen):
    """The whole example."""

    region: str
    requests: int
    prompt_tokens: int
    answer_tokens: int
    hosted: tuple[HostedBill, ...]
    setups: tuple[SetupBill, ...]
    assumptions: tuple[str, ...]


def compare(
    lock: WeightsLock,
    requests: int = REQUESTS,
    prompt_tokens: int = PROMPT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    region: str = REGION,
) -> Comparison:
    """Work it out from the catalog and the lock.

    Raises:
        ConfigError: The region has no such GPU, the lock has no such model, or a request is too long.
    """
    traffic = Traffic(requests, prompt_tokens, answer_tokens)
    others = hosted(hosted_prices(), {})
    bills = tuple(_bill(setup, lock, traffic, region, others) for setup in SETUPS)
    return Comparison(
        region=region,
        requests=requests,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        hosted=tuple(_hosted(other, traffic) for other in others),
        setups=bills,
        assumptions=_assumptions(traffic, bills),
    )


def _hosted(other: Hosted, traffic: Traffic) -> HostedBill:
    each = other.request(traffic.prompt_tokens, traffic.answer_tokens)
    return HostedBill(
        name=other.name,
        size=other.size,
        input_usd_per_mtok=other.input_usd_per_mtok,
        output_usd_per_mtok=other.output_usd_per_mtok,
        usd_per_request=each,
        usd_per_month=each * traffic.requests,
        price=other.price,
    )


def _bill(setup: Setup, lock: WeightsLock, traffic: Traffic, region: str, others: Sequence[Hosted]) -> SetupBill:
    if setup.weights not in lock.models:
        where = f"models.lock.yaml: models.{setup.weights}"
        raise ConfigError([Finding(where, "is missing, and the example serves it", "`fleet lock add` adds models")])
    name, instance = cheapest(setup.gpu, instances(), region)
    entry, gpu = lock.models[setup.weights], gpus()[setup.gpu]
    at_once = _at_once(setup, entry, gpu, traffic)
    load = Load(traffic.prompt_tokens, traffic.answer_tokens, at_once)
    speed = estimate(entry.facts, entry.format, gpu, 1, load, efficiency())
    usd_per_hour = instance.usd_per_hour[region]
    price = f"{region}, on demand, {instance.source}, {instance.date}"

    served = Served(setup.name, name, _engines(speed, traffic), 1, speed, traffic)
    nodes = math.ceil(served.engines / instance.gpus)

    def model_cost(count: int, gpus_of_each: int) -> ModelCost:
        rented = Rented(name, name, count, usd_per_hour * gpus_of_each / instance.gpus, price, gpus_of_each)
        return plan_cost([rented], [served], others).models[0]

    return SetupBill(
        name=setup.name,
        weights=setup.weights,
        format=entry.format,
        gpu=gpu.product,
        instance=name,
        gpus=instance.gpus,
        usd_per_hour=usd_per_hour,
        price=price,
        concurrency=at_once,
        speed=speed,
        instances=nodes,
        rent=model_cost(nodes, instance.gpus),
        share=model_cost(served.engines, 1),
    )


def _at_once(setup: Setup, entry: LockEntry, gpu: Gpu, traffic: Traffic) -> int:
    """Requests for which the GPU has memory."""
    regime = memory_catalog().regime(vllm_cpu().version)
    tokens = traffic.prompt_tokens + traffic.answer_tokens
    engine = fit.Engine(
        facts=entry.facts,
        weights_bytes=weights_bytes(entry.facts, entry.format, stored=True),
        gpu_bytes=gpu.memory_bytes,
        utilization=regime.utilization,
        context=tokens,
        sequences=MOST_AT_ONCE,
        batched_tokens=BATCHED_TOKENS,
    )
    at_once = fit.largest_concurrency(engine, tokens, regime)
    if not at_once:
        reason = fit.fit(engine, regime).misfit
        problem = f"{setup.name} in {entry.format} does not fit on one {gpu.product}: {reason}"
        raise ConfigError([Finding("--prompt-tokens", problem, "fewer tokens of prompt or answer")])
    return min(at_once, MOST_AT_ONCE)


def _engines(speed: SpeedPlan, traffic: Traffic) -> int:
    """Engines that can answer it without a pause."""
    return max(1, math.ceil(traffic.requests / (speed.requests_s * SECONDS_PER_MONTH)))


def cheapest(gpu: str, catalog: Mapping[str, Instance], region: str) -> tuple[str, Instance]:
    """The instance type that has one such GPU for the least money.

    Raises:
        ConfigError: There is none in this region.
    """
    having = {name: row for name, row in catalog.items() if row.gpu == gpu}
    offered = {name: row for name, row in having.items() if region in row.usd_per_hour}
    if not offered:
        regions = sorted({other for row in having.values() for other in row.usd_per_hour})
        raise ConfigError([Finding("--region", f"{region} offers no {gpu}", did_you_mean(region, regions))])
    return min(offered.items(), key=lambda item: (item[1].usd_per_hour[region], item[0]))


def _assumptions(traffic: Traffic, bills: Sequence[SetupBill]) -> tuple[str, ...]:
    usual = (traffic.prompt_tokens, traffic.answer_tokens) == (PROMPT_TOKENS, ANSWER_TOKENS)
    mean = " (the means of Azure's conversation trace of November 2023)" if usual else ""
    size = f"{traffic.prompt_tokens:,} tokens of prompt and {traffic.answer_tokens:,} of answer"
    return (
        f"A request has {size}{mean}, and one model's token counts as another's.",
        f"Instances are rented on demand, for all {HOURS_PER_MONTH} hours of a month.",
        *(_of(bill) for bill in bills),
        "What GPUs can do is meant without a pause, and so is where they pay: a month's mean is rather half of that.",
        "Machines only: no gateway, no second engine to update without a break, no data transfer, nobody's time.",
        "Hosted prices are list prices, without discounts for batches or cached prompts.",
        "Nothing is said of quality.",
    )


def _of(bill: SetupBill) -> str:
    """What one setup rests on."""
    idle = bill.instances * bill.gpus - bill.rent.engines
    others = f", of whose GPUs {idle} are idle or paid for by someone else" if idle else ""
    return (
        f"{bill.name} in {bill.format}, an engine on each {bill.gpu}: the least that can be rented is a {bill.instance}"
        f"{others}. {bill.concurrency} requests at once, for which an engine has memory, make "
        f"{bill.speed.output_tokens_s:,.0f} tokens/s ({bill.speed.basis})."
    )
