"""Which nodes hold the engines of a pool, with their weights on disk and in host memory, and which are cheapest."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra.config.pools import MAX_NODES
from infra.findings import did_you_mean, show
from infra.plan.ledger import gib
from infra.plan.memory import RESERVE_PERCENT
from infra.plan.model import SlotPlan
from infra.plan.packing import Demand, fewest_nodes, pack, per_node

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infra.catalog import Instance
    from infra.config import PoolConfig

GB = 10**9
IMAGE_BYTES = 100 * GB
"""Of a root volume: system, driver, CUDA and vLLM in its virtual environment take about 60 GB; logs and bundles grow.
From memory of the deep-learning images of AWS, not verified."""
CACHE_BYTES = 10 * GB
"""Compiled graphs and kernels of all models of a node: a few hundred MB each, estimated."""


@dataclass(frozen=True)
class Misfit:
    """Why engines cannot be placed."""

    path: str
    """`models.…`, or else a key of the pool."""
    problem: str
    fix: str


@dataclass(frozen=True)
class Packing:
    """Nodes that hold the engines."""

    instance: str
    nodes: int
    slots: tuple[SlotPlan, ...]
    """On each node."""
    weights_on_nvme: bool
    volume_bytes: int
    """Of the root volume."""
    node_usd_per_hour: float
    """On demand."""

    @property
    def usd_per_hour(self) -> float:
        """Of all nodes."""
        return self.nodes * self.node_usd_per_hour


def cheapest(
    wanted: PoolConfig, gpu: str, instances: Mapping[str, Instance], region: str, demands: Sequence[Demand]
) -> Packing | Misfit:
    """The cheapest nodes for these engines, on demand. Arguments as the fields of `NodeChoice`."""
    found = NodeChoice(wanted, gpu, instances, region, demands).packings()
    return found if isinstance(found, Misfit) else found[0]


def disk_bytes(demands: Sequence[Demand]) -> int:
    """What the weights of one node take: each model once, the largest once more while an update brings it anew."""
    sizes = [demand.disk_bytes for demand in demands]
    return sum(sizes) + max(sizes) + CACHE_BYTES


def where_offered(instances: Mapping[str, Instance]) -> str:
    """Types and their regions, for people."""
    return "; ".join(f"{name} in {', '.join(sorted(row.usd_per_hour))}" for name, row in instances.items())


@dataclass(frozen=True)
class NodeChoice:
    """What there is to choose from."""

    wanted: PoolConfig
    """May name the instance type, the number of nodes, the disk and the ways to get nodes."""
    gpu: str
    """Key of the catalog."""
    instances: Mapping[str, Instance]
    """The catalog, with the stack's own prices."""
    region: str
    """Of AWS."""
    demands: Sequence[Demand]
    """The engines; not empty."""

    def packings(self) -> list[Packing] | Misfit:
        """Every type of nodes that holds the engines, the cheapest first; or why the most likely one does not.

        Of those that cost the same, two nodes come before one, as the loss of one leaves another; then fewer first.
        """
        offered = {name: row for name, row in self.instances.items() if row.gpu == self.gpu and self._is_offered(row)}
        named = self.wanted.instance
        if not offered or named not in {None, *offered}:
            return self._not_offered(offered)
        outcomes = [(self._try(name), row) for name, row in offered.items() if named in {None, name}]
        found = [outcome for outcome, _ in outcomes if isinstance(outcome, Packing)]
        if found:
            spread = any(demand.engines > 1 for demand in self.demands)
            return sorted(found, key=lambda p: (round(p.usd_per_hour, 4), spread and p.nodes == 1, p.nodes, p.instance))
        misfits = [(outcome, row) for outcome, row in outcomes if isinstance(outcome, Misfit)]
        misfit, _ = max(misfits, key=lambda it: (it[1].gpus_per_domain, it[1].gpus, it[1].memory_bytes))
        return self._or_another(misfit) if named else misfit

    def _or_another(self, misfit: Misfit) -> Misfit:
        """The same, with the type that would do in place of the one that the config names."""
        found = replace(self, wanted=self.wanted.model_copy(update={"instance": None})).packings()
        if isinstance(found, Misfit):
            return misfit
        return replace(misfit, fix=f"{misfit.fix}, or `instance: {found[0].instance}`")

    def _is_offered(self, row: Instance) -> bool:
        return self.region in row.usd_per_hour and bool(row.zones.get(self.region))

    def _not_offered(self, offered: Mapping[str, Instance]) -> Misfit:
        """The type that the config names, or every type with the GPU, is not to be had."""
        named, here = self.wanted.instance, ", ".join(offered)
        alike = {name: row for name, row in self.instances.items() if row.gpu == self.gpu}
        elsewhere = where_offered({name: row for name, row in alike.items() if row.usd_per_hour})
        there = sorted({row.gpu for row in self.instances.values() if self._is_offered(row)})
        if named is None:
            problem = f"no instance type in {self.region} has {self.gpu}"
            fix = f"another `gpu`, here: {', '.join(there)}" if there else "another `aws:region`"
            return Misfit("gpu", problem, f"{fix}; or where it is offered: {elsewhere}" if elsewhere else fix)
        if named not in self.instances:
            problem = f"{show(named)} is not in the catalog"
            return Misfit("instance", problem, did_you_mean(named, offered or self.instances))
        if named not in alike:
            problem = f"{named} has {self.instances[named].gpu}, this pool has `gpu: {self.gpu}`"
            return Misfit("instance", problem, f"one of: {here}" if here else f"offered: {elsewhere}")
        fix = f"here: {here}" if here else f"offered: {elsewhere}; other GPUs here: {', '.join(there)}"
        if self.instances[named].zones.get(self.region):
            fix = f"write the price that you pay under `prices.instances`, or {fix}"
            return Misfit("instance", f"the catalog has no price of {named} in {self.region}", fix)
        return Misfit("instance", f"{named} is not offered in {self.region}", fix)

    # One type

    def _try(self, name: str) -> Packing | Misfit:
        row, wanted = self.instances[name], self.wanted
        misfit = (
            self._no_such_rung(name, row) or _too_wide(self.demands, name, row) or _too_many(self.demands, name, row)
        )
        if misfit:
            return misfit
        fewest = fewest_nodes(self.demands, row.gpus, row.gpus_per_domain) or 1
        nodes = fewest if wanted.nodes == "auto" else wanted.nodes
        slots = pack(self.demands, nodes, row.gpus, row.gpus_per_domain)
        if slots is None:
            problem = f"{nodes} x {name}, each with {counted(row.gpus, 'GPU')}, do not hold {engines(self.demands)}"
            fewer = f"fewer `engines`: {fewest} nodes would be needed, and a pool has {MAX_NODES} at most"
            return Misfit("nodes", problem, f"`nodes: {fewest}`" if fewest <= MAX_NODES else fewer)
        on_nvme = row.nvme_bytes >= disk_bytes(self.demands)
        volume = IMAGE_BYTES + (0 if on_nvme else disk_bytes(self.demands))
        price = wanted.usd_per_hour if wanted.usd_per_hour and wanted.instance else row.usd_per_hour[self.region]
        packing = Packing(name, nodes, slots, on_nvme, wanted.disk or volume, price)
        return _ram(self.demands, nodes, name, row) or self._disk(packing, volume, row) or packing

    def _no_such_rung(self, name: str, row: Instance) -> Misfit | None:
        for index, rung in enumerate(self.wanted.capacity):
            if rung.kind not in row.offers:
                fix = f"it is as: {', '.join(row.offers)}"
                return Misfit(f"capacity.{index}", f"{name} is not offered as {rung.kind}", fix)
        return None

    def _disk(self, packing: Packing, needed: int, row: Instance) -> Misfit | None:
        """Weights are on local disks where these are large enough, else on the root volume if the config has one."""
        if self.wanted.disk is None and not packing.weights_on_nvme:
            problem = f"the local disks of {packing.instance}, {row.nvme_bytes / GB:.0f} GB, do not hold "
            return Misfit("disk", problem + _weights(self.demands), f"`disk: {math.ceil(needed / GB)}GB`")
        if packing.volume_bytes < needed:
            what = "" if packing.weights_on_nvme else f" and {_weights(self.demands)}"
            problem = f"{packing.volume_bytes / GB:.0f} GB do not hold the system, {IMAGE_BYTES / GB:.0f} GB{what}"
            return Misfit("disk", problem, f"at least `disk: {math.ceil(needed / GB)}GB`")
        return None


def counted(count: int, what: str) -> str:
    """`1 GPU`, `2 GPUs`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def engines(demands: Sequence[Demand]) -> str:
    """Engines and what they take, for people."""
    return " and ".join(f"{d.engines} x `{d.model}` on {counted(d.tensor_parallel_size, 'GPU')}" for d in demands)


def _too_wide(demands: Sequence[Demand], name: str, row: Instance) -> Misfit | None:
    """A tensor-parallel group that leaves its domain would wait for the slowest link at every layer."""
    widest = max(demands, key=lambda demand: demand.tensor_parallel_size)
    if widest.tensor_parallel_size <= row.gpus_per_domain:
        return None
    return Misfit(
        f"models.{widest.model}.tensor-parallel-size",
        f"{widest.tensor_parallel_size} GPUs: in {name} {row.gpus_per_domain} reach each other directly",
        f"at most `tensor-parallel-size: {row.gpus_per_domain}`",
    )


def _too_many(demands: Sequence[Demand], name: str, row: Instance) -> Misfit | None:
    """All nodes of a pool carry the same engines: one of each model at least."""
    if fewest_nodes(demands, row.gpus, row.gpus_per_domain) is not None:
        return None
    narrowest = min(demands, key=lambda demand: demand.tensor_parallel_size)
    return Misfit(
        f"models.{narrowest.model}.pool",
        f"all nodes of a pool carry the same engines, and {counted(row.gpus, 'GPU')} of {name} do not hold one of each:"
        f" {engines([replace(demand, engines=1) for demand in demands])}",
        f"give `{narrowest.model}` a pool of its own",
    )


def _ram(demands: Sequence[Demand], nodes: int, name: str, row: Instance) -> Misfit | None:
    """Host memory, less a tenth for the system and its file cache, as on a local machine."""
    available = row.memory_bytes * (100 - RESERVE_PERCENT) // 100

    def needed(nodes: int) -> int:
        return sum(demand.ram_bytes * per_node(demand, nodes) for demand in demands)

    if needed(nodes) <= available:
        return None
    most = max(demand.engines for demand in demands)
    enough = bisect.bisect_left(range(nodes, most + 1), -available, key=lambda count: -needed(count)) + nodes
    sleeper = max(demands, key=lambda demand: (demand.sleeps, demand.ram_bytes))
    fixes = ["`sleep: false`"] if sleeper.sleeps else []
    fixes += [f"`nodes: {enough}`"] if enough <= most else []
    fixes = fixes or ["an `instance` with more memory for each GPU, or a lower `tensor-parallel-size`"]
    return Misfit(
        f"models.{sleeper.model}.sleep" if sleeper.sleeps else "instance",
        f"{name} has {gib(available)} of host memory to give (of {gib(row.memory_bytes)}), and the engines of a node"
        f" need {gib(needed(nodes))}{': sleeping ones keep their weights there' if sleeper.sleeps else ''}",
        ", or ".join(fixes),
    )


def _weights(demands: Sequence[Demand]) -> str:
    largest = max(demand.disk_bytes for demand in demands)
    return (
        f"{disk_bytes(demands) / GB:.0f} GB: the weights, {sum(demand.disk_bytes for demand in demands) / GB:.0f} GB,"
        f" the largest once more for an update, {largest / GB:.0f} GB, and {CACHE_BYTES // GB} GB of compiled kernels"
    )
