"""Which of the candidates a model gets, why the others lost, and what would do where none can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.plan.candidates import SIZES, Ask, Candidate, World, candidates, evaluate, rank
from infra.plan.entries import LEVELS
from infra.plan.model import ChoicePlan
from infra.plan.money import usd
from infra.plan.remedies import remedies

if TYPE_CHECKING:
    from infra.config import ModelConfig, PoolConfig
    from infra.plan.ledger import Ledger
    from infra.plan.model import Quantization

SHOWN = 3
"""Other candidates that are shown beside the chosen one."""


@dataclass(frozen=True)
class Limits:
    """What the stack file leaves open for one model."""

    levels: Sequence[Quantization]
    gpus: Sequence[str]
    sizes: Sequence[int]

    def allow(self, found: Candidate) -> bool:
        """Whether a candidate is what the stack file asks for."""
        return not self.broken(found)

    def broken(self, found: Candidate) -> str:
        """What the stack file asks for instead, or ""."""
        if found.gpu not in self.gpus:
            return f"the pool has {' or '.join(self.gpus)}"
        if found.level not in self.levels:
            return f"the stack file asks for `quantization: {self.levels[0]}`"
        if found.tensor_parallel_size not in self.sizes:
            return f"the stack file asks for `tensor-parallel-size: {self.sizes[0]}`"
        return ""


def limits(wanted: ModelConfig, gpus: Sequence[str]) -> Limits:
    """What a model's config leaves open."""
    levels = LEVELS if wanted.quantization == "auto" else (wanted.quantization,)
    sizes = SIZES if wanted.tensor_parallel_size is None else (wanted.tensor_parallel_size,)
    return Limits(levels, gpus, sizes)


@dataclass(frozen=True)
class Choice:
    """The best candidate of a model, and all that were looked at."""

    ask: Ask
    best: Candidate
    others: Sequence[Candidate]
    """Best first; allowed or not."""
    limits: Limits


def choose(ask: Ask, allowed: Limits, pool: PoolConfig, world: World) -> Choice:
    """The best candidate that the stack file allows, beside all others; it has an obstacle if none can be."""
    inside = ranked(ask, allowed, pool, world)
    free = pool.model_copy(update={"gpu": None, "instance": None, "nodes": "auto"})
    # A cluster has the GPUs that it has.
    everything = candidates(ask, free, world, tuple(world.gpus) if world.region else allowed.gpus)
    outside = [found for found in everything if not allowed.allow(found)]
    others = sorted([*inside[1:], *outside], key=lambda found: (rank(found), -found.stage))
    return Choice(ask, inside[0], others, allowed)


def ranked(ask: Ask, allowed: Limits, pool: PoolConfig, world: World) -> list[Candidate]:
    """What the stack file allows, best first; the first has an obstacle if none can be."""
    inside = [
        evaluate(ask, pool, world, level, gpu, size)
        for gpu in allowed.gpus
        for level in allowed.levels
        for size in allowed.sizes
        if size <= world.domain(gpu, pool) or len(allowed.sizes) == 1
    ]
    inside.sort(key=lambda found: (rank(found), -found.stage))
    if inside[0].obstacle:
        inside.sort(key=_hopeful)
    return inside


def _hopeful(found: Candidate) -> tuple[int, bool, int]:
    """Of several that cannot be, the one to speak of: that came farthest, is legal, and has the most memory."""
    return -found.stage, _illegal(found), -found.tensor_parallel_size


def _illegal(found: Candidate) -> bool:
    return "divided" in found.obstacle


# Words


def explain(choice: Choice) -> tuple[ChoicePlan, ...]:
    """The chosen candidate and the best others, each with the reason why it lost."""
    shown, seen = [choice.best], {(choice.best.gpu, choice.best.level)}
    for other in choice.others:
        if (other.gpu, other.level) not in seen and len(shown) <= SHOWN:
            seen.add((other.gpu, other.level))
            shown.append(other)
    return tuple(_row(choice, found) for found in shown)


def _row(choice: Choice, found: Candidate) -> ChoicePlan:
    speed = found.speed
    return ChoicePlan(
        model=choice.ask.model,
        chosen=found is choice.best,
        gpu=found.gpu,
        quantization=found.level,
        format=found.served.format if found.served else None,
        tensor_parallel_size=found.tensor_parallel_size,
        instance=found.packing.instance if found.packing else None,
        nodes=found.packing.nodes if found.packing else None,
        engines=found.engines,
        concurrency=found.concurrency,
        output_tokens_s=speed.output_tokens_s if speed else None,
        ttft_s=speed.ttft_s if speed else None,
        tpot_s=speed.tpot_s if speed else None,
        usd_per_hour=found.usd_per_hour,
        usd_per_mtok=found.usd_per_mtok,
        verdict=_verdict(choice, found),
    )


def _verdict(choice: Choice, found: Candidate) -> str:
    if found is choice.best:
        return "chosen" + (f", although it {found.slow}" if found.slow else "")
    if found.obstacle:
        return found.obstacle
    if found.slow:
        return found.slow
    price, best = found.usd_per_mtok, choice.best.usd_per_mtok
    compared = ""
    if price is not None and best:
        more = 100 * (price / best - 1)
        compared = f"{usd(price)} a Mtok, {abs(more):.0f} % {'more' if more >= 0 else 'less'}"
    if not (asked := choice.limits.broken(found)):
        return compared or "needs more GPUs for the same"
    return f"{asked} ({compared})" if compared else asked


def refuse(choice: Choice, pool: PoolConfig, world: World, ledger: Ledger) -> None:
    """Say why no candidate can be, and what could."""
    found, ask = choice.best, choice.ask
    at = f"models.{ask.model}"
    where = f"{found.gpu} x {found.tensor_parallel_size}" if found.tensor_parallel_size > 1 else found.gpu
    fixes = [] if found.fix else list(remedies(choice, pool, world))
    fix = f"would fit: {', or '.join(fixes)}" if fixes else found.fix or "a smaller model, or other GPUs"
    if found.served is None:
        fix = f"{fix}; {_other_entry(ask, world)}"
        ledger.refuse(f"{at}.{_key_of_entry(found)}", found.obstacle, fix)
    elif found.fit is not None and found.stage <= 3:  # noqa: PLR2004 - it did not come farther than memory
        key = "tensor-parallel-size" if _illegal(found) else "context"
        if found.obstacle.startswith("its KV cache"):
            key = "concurrency"
        if found.fit.pool_bytes <= 0:
            key = "weights"
        ledger.refuse(f"{at}.{key}", f"on {where}: {found.obstacle}", fix)
    else:
        key, _, problem = found.obstacle.partition(": ")
        path = key if key.startswith("models.") else f"pools.{ask.pool}.{key}"
        ledger.refuse(path, problem, fix)


def _other_entry(ask: Ask, world: World) -> str:
    """Where another format of a model is, or how it comes to be there."""
    entry = world.lock.models[ask.base]
    if base := entry.variant_of or entry.made_from:
        return f"`weights: {base}` stands for all of its formats"
    return f"`fleet lock add hf://ORG/NAME --variant-of {ask.base}` adds an entry"


def _key_of_entry(found: Candidate) -> str:
    return "weights" if found.level == "none" else "quantization"
