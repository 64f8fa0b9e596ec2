"""What would do for a model that cannot be served as the stack file asks: the smallest changes, each tried out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from infra.plan.candidates import SIZES, Ask, Candidate, World, candidates, evaluate, rank
from infra.plan.entries import LEVELS

if TYPE_CHECKING:
    from infra.config import PoolConfig
    from infra.plan.choice import Choice
    from infra.plan.model import Quantization

Value = TypeVar("Value")

IN_PLACE = " in place of `instance`"
LEAST_PART = 8
"""A context that is shorter by more than that serves other requests: fewer at once are proposed instead."""
TRIED_CONTEXT = 128
"""Contexts that are proposed are multiples of it."""


def remedies(choice: Choice, pool: PoolConfig, world: World) -> Iterator[str]:
    """Each change of one value with which it can be; one of several values where one is not enough."""
    found = _remedies(choice, pool, world)
    if found or pool.nodes == "auto":
        yield from found
    else:
        eased = pool.model_copy(update={"nodes": "auto"})
        yield from (f"{change} and `nodes: auto`" for change in _remedies(choice, eased, world))


def _remedies(choice: Choice, pool: PoolConfig, world: World) -> list[str]:
    # A cluster has the GPUs that it has.
    free = pool.model_copy(update={"gpu": None, "instance": None}) if world.region else pool
    return list(_of_one_value(choice, pool, free, world)) or list(_of_several(choice, pool, free, world))


def _of_one_value(choice: Choice, pool: PoolConfig, free: PoolConfig, world: World) -> Iterator[str]:
    found, ask, sizes = choice.best, choice.ask, choice.limits.sizes
    level, gpu, size = found.level, found.gpu, found.tensor_parallel_size

    def good(ask: Ask, level: Quantization, gpu: str, size: int) -> bool:
        nodes = pool if gpu == found.gpu else free
        return size <= world.domain(gpu, nodes) and not evaluate(ask, nodes, world, level, gpu, size).obstacle

    if found.fit is not None and found.fit.pool_bytes > 0:
        yield from _smaller(found, ask, good)
    others = sorted(SIZES, key=lambda other: (abs(other - size), other < size))
    yield from _first("tensor-parallel-size", others, lambda other: good(ask, level, gpu, other))
    here = LEVELS.index(level)
    levels = LEVELS[here + 1 :] + LEVELS[:here][::-1]
    yield from _first("quantization", levels, lambda other: any(good(ask, other, gpu, it) for it in sizes))
    if world.region and pool.instance:
        same_gpu = [evaluate(ask, free, world, level, gpu, it) for it in sizes if it <= world.domain(gpu, free)]
        instances = [other.packing.instance for other in sorted(same_gpu, key=rank) if other.packing]
        yield from _first("instance", instances, lambda _: True)
    if world.region:
        gpus = sorted(set(world.gpus) - set(choice.limits.gpus), key=lambda name: world.gpus[name].memory_bytes)
        instead = IN_PLACE if pool.instance else ""
        yield from _first("gpu", gpus, lambda other: any(good(ask, level, other, it) for it in sizes), instead)


def _first(key: str, values: Iterable[Value], good: Callable[[Value], bool], instead: str = "") -> Iterator[str]:
    """The first value of a key with which it can be, as it is written."""
    yield from (f"`{key}: {value}`{instead}" for value in itertools.islice(filter(good, values), 1))


def _of_several(choice: Choice, pool: PoolConfig, free: PoolConfig, world: World) -> Iterator[str]:
    """The best of all that can be, by what is another than the stack file has."""
    gpus = tuple(world.gpus) if world.region else (choice.best.gpu,)
    able = [found for found in candidates(choice.ask, free, world, gpus) if not found.obstacle]
    if not able:
        yield from _smaller_and_fewer(choice, pool, world)
        return
    best = min(able, key=lambda found: (len(_changes(choice, pool, found)), rank(found)))
    changes = _changes(choice, pool, best)
    yield " and ".join(f"`{key}: {value}`" for key, value in changes.items()) + (
        IN_PLACE if pool.instance and "gpu" in changes else ""
    )


def _changes(choice: Choice, pool: PoolConfig, found: Candidate) -> dict[str, str | int]:
    """What is another in a candidate than the stack file has."""
    asked = choice.limits
    changes = {
        "gpu": found.gpu not in asked.gpus and found.gpu,
        "instance": pool.instance and found.packing and found.gpu in asked.gpus and found.packing.instance,
        "quantization": found.level not in asked.levels and found.level,
        "tensor-parallel-size": found.tensor_parallel_size not in asked.sizes and found.tensor_parallel_size,
    }
    return {key: value for key, value in changes.items() if value}


def _smaller_and_fewer(choice: Choice, pool: PoolConfig, world: World) -> Iterator[str]:
    """The longest context that one request has room for, and how many of its usual requests run at once then."""
    found, ask = choice.best, replace(choice.ask, concurrency=None)
    same = (found.level, found.gpu, found.tensor_parallel_size)
    longest = _largest_context(ask, lambda changed: not evaluate(changed, pool, world, *same).obstacle)
    if longest:
        holds = evaluate(_shortened(ask, longest), pool, world, *same).concurrency
        yield f"`context: {longest}` and `concurrency: {holds}`"


def _smaller(found: Candidate, ask: Ask, good: Callable[[Ask, Quantization, str, int], bool]) -> Iterator[str]:
    """Smaller requests, or fewer at once."""
    same = (found.level, found.gpu, found.tensor_parallel_size)
    longest = _largest_context(ask, lambda changed: good(changed, *same))
    if longest and (longest >= ask.context // LEAST_PART or not ask.concurrency):
        at = f" at concurrency {ask.concurrency}" if ask.concurrency else ""
        yield f"`context: {longest}`{at}"
    if found.holds and ask.concurrency and good(replace(ask, concurrency=found.holds), *same):
        yield f"`concurrency: {found.holds}`"


def _largest_context(ask: Ask, good: Callable[[Ask], bool]) -> int:
    """The longest context that fits, in steps."""
    low, high = 0, ask.context // TRIED_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(_shortened(ask, middle * TRIED_CONTEXT)) else (low, middle - 1)
    return low * TRIED_CONTEXT


def _shortened(ask: Ask, context: int) -> Ask:
    """The same with a shorter context; a usual request stays half of it where nobody said otherwise."""
    halved = ask.typical == max(1, ask.context // 2)
    typical = context // 2 if halved else min(ask.typical, context)
    return replace(
        ask, context=context, typical=typical, prompt=min(ask.prompt, context), answer=min(ask.answer, context)
    )
