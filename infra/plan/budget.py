"""Is the fleet within its budget, and what would bring it there?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from infra.plan.money import HOURS_PER_MONTH, usd

if TYPE_CHECKING:
    from infra.config import BudgetConfig
    from infra.plan.cost import Rented, Served
    from infra.plan.ledger import Ledger
    from infra.plan.model import CostPlan

ROUNDING = 1e-9
"""Sums of prices differ in the last bits."""
SHOWN = 2


def check_budget(
    cost: CostPlan | None,
    budget: BudgetConfig,
    rented: Sequence[Rented],
    served: Sequence[Served],
    ledger: Ledger,
) -> None:
    """Refuse a fleet that costs more than its budget, or whose cost nobody knows though it has one.

    Args:
        cost: With every pool on its first rung.
        budget: Of the stack.
        rented: Every pool, the gateways, the monitor.
        served: Every model.
        ledger: Told what is over.
    """
    for key, limit, hours, unit in (
        ("budget.usd_per_hour", budget.usd_per_hour, 1, "/h"),
        ("budget.usd_per_month", budget.usd_per_month, HOURS_PER_MONTH, " a month"),
    ):
        if limit is None:
            continue
        if cost is None:
            fix = "write the price of a node: `pools.NAME.usd_per_hour` or `prices.instances`"
            ledger.refuse(key, "cannot be checked: the price of some nodes is not known", fix)
            continue
        over = cost.usd_per_hour * hours - limit
        if over > limit * ROUNDING:
            problem = f"the fleet costs {usd(cost.usd_per_hour * hours)}{unit}, {usd(over)} over"
            ledger.refuse(key, problem, _fix(key, cost, limit / hours, rented, served))
        elif (dearest := cost.dearest_usd_per_hour * hours) > limit * (1 + ROUNDING):
            rungs = ", ".join(f"`{pool}` from {rung}" for pool, rung in cost.dearest)
            problem = f"is kept with every pool on its first rung; with {rungs} the fleet costs {usd(dearest)}{unit}"
            ledger.note(key, f"{problem}, {usd(dearest - limit)} over")


def _fix(key: str, cost: CostPlan, limit: float, rented: Sequence[Rented], served: Sequence[Served]) -> str:
    """The smallest changes that are enough, as far as they can be seen from here. All in dollars an hour."""
    over = cost.usd_per_hour - limit * (1 + ROUNDING)
    enough = sorted(change for pool in rented if pool.gpus for change in _changes(pool, served, over))
    if enough:
        return " or ".join(words for _, words in enough[:SHOWN])
    fewest = cost.usd_per_hour - sum(it.usd_per_hour * (it.count - _fewest_nodes(it, served)) for it in rented)
    if fewest <= limit:
        return f"fewer engines of several models: with one of each the fleet costs {usd(fewest)}/h"
    hours = HOURS_PER_MONTH if key.endswith("month") else 1
    raised = f"`{key}: {math.ceil(cost.usd_per_hour * hours)}`"
    return f"a cheaper `gpu`, fewer bits (`quantization`), or {raised} ({usd(fewest * hours)} with one engine of each)"


def _changes(pool: Rented, served: Sequence[Served], over: float) -> Iterator[tuple[int, str]]:
    """Changes of one value that save so much: GPUs in use that are lost by it, and the change in words."""
    here = [it for it in served if it.pool == pool.name]
    held = sum(it.engines * it.gpus for it in here)
    enough, saved = _nodes(held, pool)
    if saved >= over:
        yield 0, f"`pools.{pool.name}.nodes: {enough}`, which hold its engines (saves {usd(saved)}/h)"
        return
    for it in here:
        for fewer in range(1, it.engines):
            enough, saved = _nodes(held - fewer * it.gpus, pool)
            if saved >= over:
                change = f"`models.{it.model}.engines: {it.engines - fewer}`"
                nodes = f"pool {pool.name} then needs {enough} of its {pool.count} nodes"
                yield fewer * it.gpus, f"{change}: {nodes} (saves {usd(saved)}/h)"
                break


def _nodes(gpus: int, pool: Rented) -> tuple[int, float]:
    """Nodes that hold so many GPUs, and what is saved by having no more, in dollars an hour."""
    nodes = math.ceil(gpus / pool.gpus)
    return nodes, (pool.count - nodes) * pool.usd_per_hour


def _fewest_nodes(it: Rented, served: Sequence[Served]) -> int:
    """Nodes of a pool with one engine of each model; what is no pool stays."""
    if not it.gpus:
        return it.count
    return min(it.count, math.ceil(sum(other.gpus for other in served if other.pool == it.name) / it.gpus))
