"""How a pool gets its nodes: the rungs of its ladder in order, each with types, zones and an expected price."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from infra.plan.model import RungPlan
from infra.plan.timings import DRAIN_LIMIT_S, SPOT_NOTICE_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infra.catalog import Instance
    from infra.config import PoolConfig, Rung
    from infra.plan.ledger import Ledger
    from infra.plan.model import AwsTimings
    from infra.plan.nodes import Packing
    from infra.plan.packing import Demand
    from infra.plan.work import Work

PAID_ANYWAY = {"reservation", "capacity-block"}
"""Billed whether or not a node uses it (EC2 guide, 2026-11)."""


@dataclass(frozen=True)
class Pool:
    """What a pool is planned from, and where what is said of it goes."""

    name: str
    wanted: PoolConfig
    gpu: str
    """Key of the catalog."""
    demands: Sequence[Demand]
    """The engines of every model that uses the pool."""
    ledger: Ledger

    def at(self, key: str) -> str:
        """Path of one of its keys."""
        return f"pools.{self.name}.{key}"

    def because(self, key: str, value: object, reason: str) -> None:
        """Note where a value came from."""
        self.ledger.because(self.at(key), value, reason)

    def note(self, key: str, message: str) -> None:
        """Note what the user should know."""
        self.ledger.note(self.at(key), message)

    def refuse(self, key: str, problem: str, fix: str) -> None:
        """Note that it cannot be."""
        self.ledger.refuse(self.at(key), problem, fix)


def plan_zones(pool: Pool, instance: str, zones: Sequence[str], region: str) -> tuple[str, ...]:
    """The zones that a pool uses: all in which its instance type is offered, or as many of them as the config wants."""
    wanted, names = pool.wanted.zones, ", ".join(zones)
    if wanted is None:
        reason = f"all that offer {instance} in {region}: the more, the likelier there is capacity"
        pool.because("zones", names, reason)
        return tuple(zones)
    if wanted > len(zones):
        problem = f"{wanted}: {region} offers {instance} in {len(zones)}: {names}"
        pool.refuse("zones", problem, f"at most `zones: {len(zones)}`")
    used = tuple(zones[:wanted])
    reason = f"written in the stack file: {wanted} of {len(zones)} that offer {instance}"
    pool.because("zones", ", ".join(used), reason)
    return used


def plan_rungs(
    pool: Pool, packing: Packing, stand_ins: Mapping[str, Instance], zones: Sequence[str]
) -> tuple[RungPlan, ...]:
    """Every rung of a pool's ladder.

    Args:
        pool: All its rungs are offered for the type of the packing.
        packing: The nodes.
        stand_ins: Other types that hold the same slots: on the spot market, more types are more capacity.
        zones: Of the pool.
    """
    ladder = pool.wanted.capacity
    rungs = tuple(_rung(rung, packing, stand_ins, zones) for rung in ladder)
    for index, plan in enumerate(rungs):
        where = f"{_name(plan)}: {', '.join(plan.instances)} in {', '.join(plan.zones)}"
        pool.because(f"capacity.{index}", where, f"${plan.usd_per_hour:.2f} an hour for a node: {plan.basis}")
    _check_zones(pool, zones)
    _note_ladder(pool, rungs)
    return rungs


def _check_zones(pool: Pool, zones: Sequence[str]) -> None:
    """A reservation is in one zone, which has to be one of the network's."""
    for index, rung in enumerate(pool.wanted.capacity):
        if rung.zone and rung.zone not in zones:
            problem = f"zone {rung.zone}: the pool is in {', '.join(zones)}"
            pool.refuse(f"capacity.{index}", problem, "one of these, or more `zones`")
        elif rung.kind in PAID_ANYWAY and rung.zone is None and len(zones) > 1:
            said = (
                "does not say its zone: the group looks for it in all, and what fails in one is tried in the next; add"
            )
            pool.note(f"capacity.{index}", f"{said} `zone: {zones[0]}`, for example")


def _rung(rung: Rung, packing: Packing, stand_ins: Mapping[str, Instance], zones: Sequence[str]) -> RungPlan:
    price = packing.node_usd_per_hour
    types, basis = [packing.instance], "on demand"
    if rung.kind == "spot":
        types += [name for name, row in stand_ins.items() if "spot" in row.offers]
        price *= rung.max_share or 1
        basis = f"at most, {rung.max_share or 1:.0%} of the price on demand; the market decides"
    elif rung.kind == "reservation":
        basis = "the price on demand, used or not"
    elif rung.kind == "capacity-block":
        basis = "the price on demand stands in: a block is paid in advance, at the price of its offer"
    return RungPlan(
        kind=rung.kind,
        id=rung.id,
        instances=tuple(types),
        zones=(rung.zone,) if rung.zone else tuple(zones),
        usd_per_hour=price,
        basis=basis,
    )


def _name(rung: RungPlan) -> str:
    return f"{rung.kind} {rung.id}" if rung.id else rung.kind


def _cost_of_use(rung: RungPlan) -> float:
    """What one more node on this rung costs: nothing where it is paid anyway; spot is never dearer than on demand."""
    if rung.kind in PAID_ANYWAY:
        return 0.0
    return rung.usd_per_hour - (0.01 if rung.kind == "spot" else 0)


def _note_ladder(pool: Pool, rungs: Sequence[RungPlan]) -> None:
    """Say what is remarkable about the ladder as a whole."""
    for first, then in pairwise(rungs):
        if _cost_of_use(first) > _cost_of_use(then):
            paid = "is paid for in any case" if then.kind in PAID_ANYWAY else f"costs ${then.usd_per_hour:.2f} at most"
            dearer = f"{_name(first)}, ${first.usd_per_hour:.2f} an hour for a node, comes before {_name(then)}"
            pool.note("capacity", f"{dearer}, which {paid}: that serves only where the other has no capacity")
    dearest = max(rungs, key=lambda rung: rung.usd_per_hour)
    if dearest.usd_per_hour > rungs[0].usd_per_hour:
        counted = f"the cost counts {_name(rungs[0])}, ${rungs[0].usd_per_hour:.2f} an hour for a node"
        pool.note("capacity", f"{counted}; nodes that come from {_name(dearest)} cost ${dearest.usd_per_hour:.2f}")
    if rungs[-1].kind == "capacity-block":
        pool.note("capacity", "a capacity block ends on its day, and no rung after it gives nodes from then on")
    if all(rung.kind == "spot" for rung in rungs):
        pool.note("capacity", "spot alone: when AWS wants its nodes back, no other rung stands in")


def check_drain(model: str, work: Work, ledger: Ledger) -> None:
    """Refuse answers for which no node and no gateway of AWS can wait."""
    if max(work.generation, work.silence) <= DRAIN_LIMIT_S:
        return
    longest = work.answer_within(DRAIN_LIMIT_S)
    ledger.refuse(
        f"models.{model}.max-answer",
        f"an update cannot drain: {work.largest.answer} tokens may take {math.ceil(work.generation)} s on a slow"
        f" machine, and AWS lets nothing wait for longer than {DRAIN_LIMIT_S} s",
        f"at most `max-answer: {longest}`" if longest else "a smaller `context` or `concurrency`",
    )


def note_spot(model: str, work: Work, aws: AwsTimings, ledger: Ledger) -> None:
    """Say which answers are cut when a spot node is taken away."""
    whole = work.answer_within(aws.spot_drain_s)
    if whole < work.largest.answer:
        ledger.note(
            f"models.{model}.max-answer",
            f"a spot node is gone {SPOT_NOTICE_S} s after the notice, and answers have {aws.spot_drain_s} s of these:"
            f" what lacks more than {whole} tokens then may be cut off on a slow machine",
        )
