"""Every way to serve a model on GPUs, what becomes of it, and which is best. Pure, and the same for all targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra.plan.entries import LEVELS, Served, served
from infra.plan.fit import Engine, Fit, cache_of, fit
from infra.plan.kv_cache import KvCache
from infra.plan.money import HOURS_PER_MONTH
from infra.plan.nodes import Misfit, Packing, cheapest
from infra.plan.overhead import batch_defaults
from infra.plan.packing import Demand
from infra.plan.throughput import Load, concurrency_within, estimate
from infra.plan.traffic import UTILISATION
from infra.plan.weights_memory import weights_bytes

if TYPE_CHECKING:
    from infra.benchmarks import Benchmark
    from infra.catalog import Gpu, Instance
    from infra.catalog.efficiency import Efficiency
    from infra.catalog.gpu_start import GpuStart
    from infra.catalog.memory import Regime
    from infra.config import PoolConfig
    from infra.plan.model import Quantization, SpeedPlan
    from infra.weights.lock import WeightsLock

SIZES = (1, 2, 4, 8)
"""Tensor parallel sizes that are tried: one engine never leaves its node."""
DEFAULT_CONCURRENCY = 64
LEAST_ENGINES = 2
"""One serves while the other is updated."""
PROCESSES_RAM = 8 << 30
"""Host memory of one engine's processes: torch, CUDA and pinned buffers. From memory of such hosts, not measured."""
SAFE = 0.95
"""Of the tokens that the cache is predicted to hold: predictions were within 5 % for dense models."""


@dataclass(frozen=True)
class World:
    """What planning looks things up in."""

    gpus: Mapping[str, Gpu]
    instances: Mapping[str, Instance]
    """With the stack's own prices."""
    region: str
    """Of AWS; empty on a cluster, whose nodes have no instance type."""
    lock: WeightsLock
    regime: Regime
    """How the pinned vLLM uses memory."""
    efficiency: Efficiency
    start: GpuStart
    benchmarks: Sequence[Benchmark] = ()

    def domain(self, gpu: str, pool: PoolConfig) -> int:
        """The most GPUs that one engine can have."""
        if not self.region:
            return pool.gpus_per_node or SIZES[-1]
        named = self.instances.get(pool.instance or "")
        if named is not None and named.gpu == gpu:
            return named.gpus_per_domain
        return max((row.gpus_per_domain for row in self.instances.values() if row.gpu == gpu), default=1)


@dataclass(frozen=True)
class Ask:
    """What a user wants of one model, defaults filled in where they do not depend on the GPU."""

    model: str
    base: str
    """Entry of the lock."""
    context: int
    typical: int
    """Tokens of a usual request, prompt and answer."""
    prompt: int
    answer: int
    """Of a mean request: what speed and price are computed for."""
    concurrency: int | None
    engines: int | None
    requests_per_month: int | None
    ttft_s: float | None
    tpot_s: float | None
    utilization: float
    kv_dtype: str = "auto"
    batched_tokens: int | None = None
    eager: bool = False
    sleep: bool = False
    pool: str = ""
    """Its name."""
    shares: bool = False
    """Other models use its nodes as well: it pays for its GPUs, and not for whole nodes."""


@dataclass(frozen=True)
class Candidate:
    """One way to serve a model. What could not be computed is None."""

    level: Quantization
    gpu: str
    tensor_parallel_size: int
    served: Served | None = None
    engine: Engine | None = None
    fit: Fit | None = None
    holds: int = 0
    """Usual requests that the KV cache of one engine holds."""
    concurrency: int = 0
    speed: SpeedPlan | None = None
    engines: int = 0
    packing: Packing | None = None
    usd_per_hour: float | None = None
    usd_per_mtok: float | None = None
    """Of prompts and answers together, at the traffic; at full load where none is stated."""
    obstacle: str = ""
    """Why it cannot be; empty if it can."""
    fix: str = ""
    slow: str = ""
    """How it misses the promised latency; empty if it keeps it."""
    stage: int = 0
    """How far it came: of several that cannot be, the one that came farthest says most."""

    @property
    def gpus(self) -> int:
        """Of all engines."""
        return self.engines * self.tensor_parallel_size

    @property
    def chosen(self) -> tuple[Served, Engine]:
        """What is served and how, of a candidate that came so far."""
        assert self.served is not None  # noqa: S101 - for the type checker
        assert self.engine is not None  # noqa: S101 - likewise
        return self.served, self.engine


def candidates(ask: Ask, pool: PoolConfig, world: World, gpus: Sequence[str]) -> list[Candidate]:
    """Every level of quantisation on every GPU at every tensor parallel size."""
    return [
        evaluate(ask, pool, world, level, gpu, size)
        for gpu in gpus
        for level in LEVELS
        for size in SIZES
        if size <= world.domain(gpu, pool)
    ]


def evaluate(  # noqa: PLR0913, PLR0917 - the question, one by one
    ask: Ask, pool: PoolConfig, world: World, level: Quantization, gpu: str, size: int
) -> Candidate:
    """What becomes of one way to serve a model."""
    found = Candidate(level, gpu, size)
    what = served(ask.base, level, world.gpus[gpu], world.lock)
    if isinstance(what, str):
        return replace(found, obstacle=what)
    found = _fitted(replace(found, served=what), what, ask, world)
    if found.obstacle:
        return found
    found = _timed(found, ask, world)
    return _priced(found, ask, pool, world)


def _fitted(found: Candidate, what: Served, ask: Ask, world: World) -> Candidate:
    """Does it fit, and for how many requests?"""
    entry, gpu = world.lock.models[what.entry], world.gpus[found.gpu]
    wanted = ask.concurrency or DEFAULT_CONCURRENCY
    _, default = batch_defaults(world.regime, gpu.memory_bytes, ask.context, a100="A100" in gpu.product)
    engine = Engine(
        facts=entry.facts,
        weights_bytes=weights_bytes(entry.facts, what.format, stored=not what.online),
        gpu_bytes=gpu.memory_bytes,
        utilization=ask.utilization,
        context=ask.context,
        sequences=wanted,
        batched_tokens=max(ask.batched_tokens or default, wanted),
        kv_dtype=ask.kv_dtype,
        tensor_parallel_size=found.tensor_parallel_size,
        eager=ask.eager,
    )
    result = fit(engine, world.regime)
    found = replace(found, engine=engine, fit=result, stage=1)
    if result.misfit:
        return replace(found, obstacle=result.misfit, stage=2 if result.pool_bytes > 0 else 1)
    holds = _holds(cache_of(engine, world.regime), result.pool_bytes, ask.typical, engine.batched_tokens)
    found = replace(found, holds=holds, concurrency=min(wanted, max(1, holds)), stage=3)
    if ask.concurrency and holds < ask.concurrency:
        return replace(
            found, obstacle=f"its KV cache holds {holds} requests of {ask.typical} tokens, not {ask.concurrency}"
        )
    return found


def _holds(cache: KvCache, pool: int, tokens: int, batched_tokens: int) -> int:
    return int(SAFE * cache.concurrency(pool, tokens, batched_tokens))


def _timed(found: Candidate, ask: Ask, world: World) -> Candidate:
    """How fast is it, and how many requests may run at once if the promise is to be kept?"""
    within, slow = found.concurrency, ""
    if ask.ttft_s or ask.tpot_s:
        within = _within(found, ask, world)
    if within < found.concurrency:
        wishes = (
            f"ttft_p95 {ask.ttft_s:g} s" if ask.ttft_s else "",
            f"tpot_p95 {1000 * ask.tpot_s:g} ms" if ask.tpot_s else "",
        )
        wish = " and ".join(filter(None, wishes))
        if within == 0:
            slow = f"misses {wish} even with one request at a time"
        elif ask.concurrency:
            slow = f"misses {wish} at {found.concurrency} requests at once; keeps it up to {within}"
        else:
            found = replace(found, concurrency=within)
    return replace(found, speed=_speed(found, ask, world), slow=slow, stage=4)


def _within(found: Candidate, ask: Ask, world: World) -> int:
    """Requests at once with which the promise is kept."""
    what, engine = found.chosen
    return concurrency_within(
        engine.facts,
        what.format,
        world.gpus[found.gpu],
        found.tensor_parallel_size,
        Load(ask.prompt, ask.answer, found.concurrency),
        world.efficiency,
        ttft_s=ask.ttft_s,
        tpot_s=ask.tpot_s,
        kv_cache_dtype=engine.kv_dtype,
        max_num_batched_tokens=engine.batched_tokens,
    )


def _speed(found: Candidate, ask: Ask, world: World) -> SpeedPlan:
    what, engine = found.chosen
    return estimate(
        engine.facts,
        what.format,
        world.gpus[found.gpu],
        found.tensor_parallel_size,
        Load(ask.prompt, ask.answer, found.concurrency),
        world.efficiency,
        world.benchmarks,
        kv_cache_dtype=engine.kv_dtype,
        max_num_batched_tokens=engine.batched_tokens,
    )


def _priced(found: Candidate, ask: Ask, pool: PoolConfig, world: World) -> Candidate:
    """How many engines, on which nodes, at what price?"""
    speed = found.speed
    assert speed is not None  # noqa: S101 - for the type checker: `evaluate` has set it
    mean = (ask.requests_per_month or 0) / (HOURS_PER_MONTH * 3600)
    engines = ask.engines or max(LEAST_ENGINES, math.ceil(mean / (UTILISATION * speed.requests_s)))
    found = replace(found, engines=engines)
    if world.region:
        packing = cheapest(pool, found.gpu, world.instances, world.region, [demand(found, ask, world)])
        if isinstance(packing, Misfit):
            return replace(found, obstacle=f"{packing.path}: {packing.problem}", fix=packing.fix)
        usd = packing.usd_per_hour
        if ask.shares:
            usd = found.gpus * packing.node_usd_per_hour / world.instances[packing.instance].gpus
        found = replace(found, packing=packing, usd_per_hour=usd, stage=5)
    elif pool.usd_per_hour is not None:
        per_node = max(1, (pool.gpus_per_node or SIZES[-1]) // found.tensor_parallel_size)
        found = replace(found, usd_per_hour=math.ceil(engines / per_node) * pool.usd_per_hour, stage=5)
    if found.usd_per_hour is None:
        return found
    served_s = min(mean, engines * speed.requests_s) if ask.requests_per_month else engines * speed.requests_s
    mtok_per_hour = served_s * 3600 * (ask.prompt + ask.answer) / 1e6
    return replace(found, usd_per_mtok=found.usd_per_hour / mtok_per_hour if mtok_per_hour else None)


def demand(found: Candidate, ask: Ask, world: World) -> Demand:
    """What the engines of a candidate take from their nodes."""
    what, engine = found.chosen
    entry = world.lock.models[what.entry]
    return Demand(
        model=ask.model,
        tensor_parallel_size=found.tensor_parallel_size,
        engines=found.engines,
        disk_bytes=entry.size,
        ram_bytes=PROCESSES_RAM * found.tensor_parallel_size + (engine.weights_bytes if ask.sleep else 0),
        sleeps=ask.sleep,
    )


def rank(found: Candidate) -> tuple[bool, bool, float, float, int, int]:
    """The better first: what can be, what keeps the promise, the price of a token; then fewer GPUs, more bits."""
    price = found.usd_per_mtok if found.usd_per_mtok is not None else math.inf
    per_gpu = found.gpus / found.speed.requests_s / found.engines if found.speed and found.engines else math.inf
    return (
        bool(found.obstacle),
        bool(found.slow),
        round(price, 6),
        per_gpu,
        found.tensor_parallel_size,
        LEVELS.index(found.level),
    )
