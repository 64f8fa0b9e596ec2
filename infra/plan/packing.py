"""Engines onto GPUs onto nodes: pure arithmetic with counts. A pool of 1,000 nodes costs no more than one of 1.

All nodes of a pool are made from one launch template, so that all carry the same engines: of each model its engines
divided by the nodes, rounded up. Therefore the loss of one node never takes the last engine of a model where there are
two nodes, and an update can go node by node.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.plan.model import SlotPlan

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Demand:
    """The engines of one model that a pool has to carry."""

    model: str
    tensor_parallel_size: int
    """GPUs of one engine."""
    engines: int
    disk_bytes: int
    """Of the weights: once for each node, whatever the engines there."""
    ram_bytes: int
    """Host memory of one engine: its processes, and the weights while it sleeps."""
    sleeps: bool = False


def per_node(demand: Demand, nodes: int) -> int:
    """Engines of a model on each of so many nodes."""
    return math.ceil(demand.engines / nodes)


def pack(demands: Sequence[Demand], nodes: int, gpus: int, domain: int) -> tuple[SlotPlan, ...] | None:
    """The places of every engine on one of so many nodes; None if they do not fit.

    First fit decreasing by tensor-parallel size: for sizes that divide each other, as powers of two do, it wastes
    nothing. An engine never leaves its domain, the GPUs that reach each other without crossing between CPU sockets.
    """
    if sum(demand.tensor_parallel_size * per_node(demand, nodes) for demand in demands) > gpus:
        return None
    free = [list(range(first, min(first + domain, gpus))) for first in range(0, gpus, domain)]
    slots = []
    for demand in sorted(demands, key=lambda demand: -demand.tensor_parallel_size):
        size = demand.tensor_parallel_size
        for _ in range(per_node(demand, nodes)):
            room = next((room for room in free if len(room) >= size), None)
            if room is None:
                return None
            slots.append(SlotPlan(model=demand.model, gpus=tuple(room[:size])))
            del room[:size]
    return tuple(slots)


def fewest_nodes(demands: Sequence[Demand], gpus: int, domain: int) -> int | None:
    """Fewest nodes that hold all engines if all carry the same; None if one engine of each model is too much for one.

    By bisection: where n nodes do, more do as well. (With sizes that do not divide each other first fit may miss that
    in rare cases; what it finds is a packing all the same.)
    """
    most = max(demand.engines for demand in demands)
    if pack(demands, most, gpus, domain) is None:
        return None
    return 1 + bisect.bisect_left(range(1, most), x=True, key=lambda n: pack(demands, n, gpus, domain) is not None)


def fewest_unlike_nodes(demands: Sequence[Demand], gpus: int, domain: int) -> int | None:
    """Fewest nodes if each may carry other engines, as under a scheduler; None if an engine is too large for a domain.

    Best fit decreasing, over domains: `free` counts those that have so many GPUs left.
    """
    free: dict[int, int] = {}
    domains = 0
    for demand in sorted(demands, key=lambda demand: -demand.tensor_parallel_size):
        size, left = demand.tensor_parallel_size, demand.engines
        if size > domain:
            return None
        for room, count in sorted(free.items()):
            left -= _fill(free, room, min(count * (room // size), left), size)
        opened = math.ceil(left / (domain // size))
        domains += opened
        free[domain] = free.get(domain, 0) + opened
        _fill(free, domain, left, size)
    return math.ceil(domains * domain / gpus)


def _fill(free: dict[int, int], room: int, engines: int, size: int) -> int:
    """Put engines into domains that have `room`, each as full as it goes. Returns how many engines."""
    if engines:
        fitting = room // size
        full, rest = divmod(engines, fitting)
        free[room] -= math.ceil(engines / fitting)
        for left, count in ((room - fitting * size, full), (room - rest * size, 1 if rest else 0)):
            free[left] = free.get(left, 0) + count
    return engines
