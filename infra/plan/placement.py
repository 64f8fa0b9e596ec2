"""What a pool is made of: nodes, the engines on each, the ways to get them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from infra.plan.capacity import Pool, plan_rungs, plan_zones
from infra.plan.ledger import gib
from infra.plan.model import PoolPlan, SchedulePlan, SlotPlan
from infra.plan.nodes import GB, Misfit, NodeChoice, Packing, cheapest, counted, disk_bytes, engines
from infra.plan.packing import Demand, fewest_nodes, fewest_unlike_nodes, per_node
from infra.plan.timings import min_healthy_percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infra.catalog import Instance
    from infra.config import PoolConfig
    from infra.plan.ledger import Ledger

__all__ = ["Demand", "Misfit", "Packing", "cheapest", "place", "place_on_cluster"]

DEFAULT_GPUS_PER_NODE = 8


def place(  # noqa: PLR0913, PLR0917 - everything that a pool depends on
    name: str,
    wanted: PoolConfig,
    gpu: str,
    instances: Mapping[str, Instance],
    region: str,
    demands: Sequence[Demand],
    ledger: Ledger,
) -> PoolPlan | None:
    """Decide everything about a pool of AWS.

    Args:
        name: Of the pool.
        wanted: What the config says of it.
        gpu: Key of the catalog.
        instances: The catalog, with the stack's own prices.
        region: Of AWS.
        demands: The engines of every model that uses the pool.
        ledger: Gets what is refused, remarkable or decided.

    Returns:
        The pool; None if it cannot be, as the ledger says.
    """
    pool = Pool(name, wanted, gpu, demands, ledger)
    if not wanted.capacity:
        pool.refuse("capacity", "has no rung", "`capacity: [on-demand]`, or remove the line to get that")
        return None
    if not demands:
        _refuse_unused(pool)
        return None
    packings = NodeChoice(wanted, gpu, instances, region, demands).packings()
    if isinstance(packings, Misfit):
        path = packings.path if packings.path.startswith("models.") else pool.at(packings.path)
        ledger.refuse(path, packings.problem, packings.fix)
        return None
    best, *others = packings
    row = instances[best.instance]
    _explain_instance(pool, packings)
    _explain_nodes(pool, best.nodes)
    _explain_room(pool, best, row)
    _note_likeness(pool, best, row)
    zones = plan_zones(pool, best.instance, row.zones[region], region)
    alike = {other.instance: instances[other.instance] for other in others if other.slots == best.slots}
    stand_ins = {name: other for name, other in alike.items() if other.gpus == row.gpus}
    rungs = plan_rungs(pool, best, stand_ins, zones)
    return PoolPlan(
        name=name,
        gpu=gpu,
        instance=best.instance,
        nodes=best.nodes,
        gpus_per_node=row.gpus,
        slots=best.slots,
        engines=tuple((demand.model, best.nodes * per_node(demand, best.nodes)) for demand in demands),
        zones=zones,
        rungs=rungs,
        weights_bytes=sum(demand.disk_bytes for demand in demands),
        weights_on="nvme" if best.weights_on_nvme else "volume",
        volume_bytes=best.volume_bytes,
        min_healthy_percent=min_healthy_percent(best.nodes),
        usd_per_hour=best.nodes * rungs[0].usd_per_hour,
        schedule=_schedule(pool, best.nodes),
    )


def _schedule(pool: Pool, nodes: int) -> SchedulePlan | None:
    wanted = pool.wanted.schedule
    if wanted is None:
        return None
    plan = SchedulePlan(days=wanted.days, start=wanted.from_, end=wanted.to, time_zone=wanted.time_zone)
    models = ", ".join(f"`{demand.model}`" for demand in pool.demands)
    pool.note("schedule", f"outside of these hours, {1 - plan.share:.0%} of a week, nothing serves {models}")
    pool.because(
        "schedule", f"{counted(nodes, 'node')} for {plan.share * 168:g} of 168 hours", "written in the stack file"
    )
    return plan


def place_on_cluster(
    name: str, wanted: PoolConfig, gpu: str, demands: Sequence[Demand], ledger: Ledger
) -> PoolPlan | None:
    """Decide about a pool of a Kubernetes cluster: how many of its nodes have to be there.

    The cluster's scheduler finds the places, so that nodes need not be alike. Arguments and result as of `place`.
    """
    pool = Pool(name, wanted, gpu, demands, ledger)
    if not demands:
        _refuse_unused(pool)
        return None
    gpus = wanted.gpus_per_node or DEFAULT_GPUS_PER_NODE
    reason = "written in the stack file" if wanted.gpus_per_node else "default: as most nodes with such GPUs have"
    pool.because("gpus-per-node", gpus, reason)
    fewest = fewest_unlike_nodes(demands, gpus, gpus)
    if fewest is None:
        widest = max(demands, key=lambda demand: demand.tensor_parallel_size)
        problem = f"{widest.tensor_parallel_size} GPUs: a node has {gpus}"
        fix = f"at most `tensor-parallel-size: {gpus}`, or `gpus-per-node` if nodes have more"
        ledger.refuse(f"models.{widest.model}.tensor-parallel-size", problem, fix)
        return None
    nodes = fewest if wanted.nodes == "auto" else wanted.nodes
    if nodes < fewest:
        problem = f"{counted(nodes, 'node')}, each with {counted(gpus, 'GPU')}, do not hold {engines(demands)}"
        pool.refuse("nodes", problem, f"`nodes: {fewest}`")
    volume = disk_bytes(demands)
    if wanted.disk is not None and wanted.disk < volume:
        problem = f"{wanted.disk / GB:.0f} GB do not hold the weights of its models and those of an update"
        pool.refuse("disk", problem, f"at least `disk: {math.ceil(volume / GB)}GB`")
    _explain_nodes(pool, nodes)
    pool.note("nodes", "the plan does not know the cluster's nodes: their memory, disks and zones are not checked")
    return PoolPlan(
        name=name,
        gpu=gpu,
        instance=None,
        nodes=nodes,
        gpus_per_node=gpus,
        slots=(),
        engines=tuple((demand.model, demand.engines) for demand in demands),
        zones=(),
        rungs=(),
        weights_bytes=sum(demand.disk_bytes for demand in demands),
        weights_on="volume",
        volume_bytes=wanted.disk or volume,
        min_healthy_percent=min_healthy_percent(nodes),
        usd_per_hour=None if wanted.usd_per_hour is None else nodes * wanted.usd_per_hour,
    )


def _refuse_unused(pool: Pool) -> None:
    fix = f"give a model `pool: {pool.name}`, or remove the pool"
    pool.ledger.refuse(f"pools.{pool.name}", "no model uses this pool", fix)


# Why


def _explain_instance(pool: Pool, packings: Sequence[Packing]) -> None:
    best, *others = packings
    reason = f"the cheapest that holds the engines: {best.nodes} x ${best.node_usd_per_hour:.2f} an hour"
    costs = ", ".join(f"{other.nodes} x {other.instance} ${other.usd_per_hour:.2f}" for other in others[:3])
    if pool.wanted.instance is not None:
        reason = "written in the stack file"
    elif costs:
        reason += f"; then {costs}"
    pool.because("instance", best.instance, reason)


def _explain_nodes(pool: Pool, nodes: int) -> None:
    auto = f"the fewest that hold {engines(pool.demands)}"
    pool.because("nodes", nodes, auto if pool.wanted.nodes == "auto" else "written in the stack file")
    percent = min_healthy_percent(nodes)
    at_once = nodes - math.ceil(nodes * percent / 100)
    reason = f"an update takes {counted(at_once, 'node')} at once and never a spare one"
    pool.because("min-healthy-percent", percent, reason)
    if nodes == 1:
        names = " and ".join(f"`{demand.model}`" for demand in pool.demands)
        pool.note("nodes", f"one node: while it is replaced or lost, nothing serves {names}")


def _explain_room(pool: Pool, best: Packing, row: Instance) -> None:
    places = ", ".join(f"{slot.model} on GPU {_range(slot)}" for slot in best.slots)
    pool.because("slots", places, f"on every node; first fit decreasing, {row.gpus_per_domain} GPUs to a domain")
    ram = sum(demand.ram_bytes * per_node(demand, best.nodes) for demand in pool.demands)
    pool.because("ram", gib(ram), f"host memory that the engines of a node need, of {gib(row.memory_bytes)}")
    where = "local disks" if best.weights_on_nvme else "root volume"
    reason = f"on the {where}: weights, the largest once more while it is updated, and compiled kernels"
    pool.because("weights", f"{disk_bytes(pool.demands) / GB:.0f} GB", reason)
    reason = "written in the stack file" if pool.wanted.disk else "root volume: system, driver and vLLM"
    pool.because("disk", f"{best.volume_bytes / GB:.0f} GB", reason)


def _range(slot: SlotPlan) -> str:
    return f"{slot.gpus[0]}" if len(slot.gpus) == 1 else f"{slot.gpus[0]}-{slot.gpus[-1]}"


def _note_likeness(pool: Pool, best: Packing, row: Instance) -> None:
    """Say what it costs that all nodes carry the same: GPUs that are idle, engines and nodes that nobody asked for."""
    idle = row.gpus - sum(len(slot.gpus) for slot in best.slots)
    if idle:
        message = f"{idle} of {row.gpus} GPUs of each node are idle, {idle * best.nodes} in all, and paid for"
        pool.note("nodes", message)
    for demand in pool.demands:
        running = best.nodes * per_node(demand, best.nodes)
        if running > demand.engines:
            message = f"{running} engines run, not {demand.engines}: all nodes of a pool carry the same"
            pool.ledger.note(f"models.{demand.model}.engines", message)
    unlike = fewest_unlike_nodes(pool.demands, row.gpus, row.gpus_per_domain)
    alike = fewest_nodes(pool.demands, row.gpus, row.gpus_per_domain)
    if unlike and alike and unlike < alike <= best.nodes:
        fix = "`engines` that the nodes divide, or pools of their own, save the difference"
        pool.note("nodes", f"{alike} nodes are needed as all carry the same; {unlike} have GPUs enough: {fix}")
