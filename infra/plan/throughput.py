"""How fast does an engine answer under a load? The formulas of a step are in roofline.py; here is how steps share time.

Each formula stands here once. All times are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra.plan.model import SpeedPlan
from infra.plan.roofline import Engine

if TYPE_CHECKING:
    from infra.catalog import Gpu
    from infra.catalog.efficiency import Efficiency
    from infra.weights.facts import ModelFacts

P95 = 1.645
"""Standard deviations above the mean that 95 % of a normal distribution lie below."""


@dataclass(frozen=True)
class Load:
    """What clients ask of one engine: requests that are all alike, so many at once, the next as soon as one is done."""

    prompt_tokens: int
    answer_tokens: int
    concurrency: int
    cached_tokens: int = 0
    """Of the prompt: found in the prefix cache."""


@dataclass(frozen=True)
class Benchmark:
    """What was measured of one configuration under one load (stacks/benchmarks.yaml)."""

    name: str
    """For `SpeedPlan.basis`."""
    facts: ModelFacts
    format_: str
    gpu: Gpu
    tensor_parallel_size: int
    kv_cache_dtype: str
    max_num_batched_tokens: int
    load: Load
    output_tokens_s: float
    ttft_s: float
    ttft_p95_s: float
    tpot_s: float
    tpot_p95_s: float


def steady_state(engine: Engine, load: Load, error_percent: int, basis: str) -> SpeedPlan:
    """An engine that always has as many requests as the load says (continuous batching: Yu et al., Orca, 2022).

    In one cycle each of them is answered once: answer - 1 steps decode all of them, and each prompt is read once,
    beside the others; where prompts need more steps than that, the rest are steps of their own. Requests a second =
    concurrency / cycle. By Little's law a request takes one cycle; what is not time to the first token is time between
    tokens.

    A prompt waits for the step under way and for prompts before it: prompts come at random and take equally long, an
    M/D/1 queue (mean by Pollaczek-Khinchine, its tail exponential), but never for more than all others.
    """
    count = load.concurrency
    decode = engine.decode_step_s(count, load.prompt_tokens + load.answer_tokens / 2)
    together = max(1.0, count / max(1, load.answer_tokens - 1))  # requests that end with the same step
    prefill, steps = engine.prefill_s(load.prompt_tokens, load.cached_tokens, count - 1, together)
    request = engine.efficiency.request_s.value
    new = max(1, load.prompt_tokens - load.cached_tokens)
    cycle = (load.answer_tokens - 1) * decode + count * prefill
    own, wait, wait_p95, under_way = prefill, 0.0, 0.0, 0.0
    if count > 1:
        more = max(1, count * new / engine.batched_tokens) - (load.answer_tokens - 1)
        cycle += max(0, more) * engine.decode_step_s(1, load.prompt_tokens)
        under_way = decode
        own += steps * decode
        served = prefill + decode * min(1.0, new / engine.batched_tokens)
        busy = min(0.98, count * served / cycle)
        scale = served / (2 * (1 - busy))
        wait = min((count - 1) * served, busy * scale)
        wait_p95 = min((count - 1) * served, scale * max(0.0, math.log(busy / 0.05)))
    ttft = request + under_way / 2 + wait + own
    ttft_p95 = request + under_way * 0.95 + wait_p95 + own
    tpot = decode
    if load.answer_tokens > 1:
        tpot = max(decode, (cycle + request - ttft) / (load.answer_tokens - 1))
    else:  # all of a request is time to its first token
        ttft = cycle + request
    requests_s = count / (cycle + request)
    return SpeedPlan(
        ttft_s=ttft,
        ttft_p95_s=max(ttft, ttft_p95),
        tpot_s=tpot,
        # A request meets about as many prompts of others as there are others.
        tpot_p95_s=decode + (tpot - decode) * (1 + P95 / math.sqrt(max(1, count - 1))),
        output_tokens_s=requests_s * load.answer_tokens,
        prefill_tokens_s=engine.prefill_tokens_s(load.prompt_tokens, load.cached_tokens),
        requests_s=requests_s,
        measured=False,
        error_percent=error_percent,
        basis=basis,
    )


def estimate(  # noqa: PLR0913, PLR0917 - a configuration has so many parts
    facts: ModelFacts,
    format_: str,
    gpu: Gpu,
    tensor_parallel_size: int,
    load: Load,
    efficiency: Efficiency,
    benchmarks: Sequence[Benchmark] = (),
    *,
    kv_cache_dtype: str = "auto",
    max_num_batched_tokens: int = 0,
) -> SpeedPlan:
    """How fast one engine is under a load: as measured, if that very configuration was, else as computed.

    Args:
        facts: Of the model; its size in another format is computed from its shape.
        format_: What the weights are stored as. It must run on the GPU.
        gpu: Of the catalog.
        tensor_parallel_size: GPUs that share each layer.
        load: Not more requests at once than the KV cache holds; what waits for room is not in the estimate.
        efficiency: Of the catalog.
        benchmarks: What was measured with the engine version of the stack.
        kv_cache_dtype: `--kv-cache-dtype`.
        max_num_batched_tokens: As the flag; 0: vLLM's default for this GPU.

    Raises:
        KeyError: The format does not run on the GPU.
    """
    engine = Engine(facts, format_, gpu, tensor_parallel_size, efficiency, kv_cache_dtype, max_num_batched_tokens)
    known = efficiency.error_percent
    computed = steady_state(
        engine, load, known.value, f"estimate: calibrated roofline, nine of ten within {known.value} %"
    )
    for found in benchmarks:
        if _same(found, engine, load):
            return _measured(found, computed)
    return computed


def _same(found: Benchmark, engine: Engine, load: Load) -> bool:
    return (
        found.load == load
        and found.format_ == engine.format_
        and found.tensor_parallel_size == engine.tensor_parallel_size
        and found.kv_cache_dtype == engine.kv_cache_dtype
        and found.max_num_batched_tokens == engine.batched_tokens
        and found.gpu == engine.gpu
        and found.facts == engine.facts
    )


def _measured(found: Benchmark, computed: SpeedPlan) -> SpeedPlan:
    """What was measured; only how fast prompts alone are read is still computed, and less by the error of that."""
    return computed.model_copy(
        update={
            "ttft_s": found.ttft_s,
            "ttft_p95_s": found.ttft_p95_s,
            "tpot_s": found.tpot_s,
            "tpot_p95_s": found.tpot_p95_s,
            "output_tokens_s": found.output_tokens_s,
            "requests_s": found.output_tokens_s / found.load.answer_tokens,
            "prefill_tokens_s": computed.prefill_tokens_s / (1 + computed.error_percent / 100),
            "measured": True,
            "error_percent": 0,
            "basis": f"measured: {found.name}",
        }
    )


def concurrency_within(  # noqa: PLR0913, PLR0917 - likewise
    facts: ModelFacts,
    format_: str,
    gpu: Gpu,
    tensor_parallel_size: int,
    load: Load,
    efficiency: Efficiency,
    *,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    kv_cache_dtype: str = "auto",
    max_num_batched_tokens: int = 0,
) -> int:
    """The most requests at once, up to those of the load, with which 95 % of them are as fast as was promised.

    0: not even one alone. Each further request makes all of them slower, so the border is found by halving.

    Args:
        facts: As of `estimate`, and so are the others.
        format_: Likewise.
        gpu: Likewise.
        tensor_parallel_size: Likewise.
        load: Its concurrency is the limit.
        efficiency: Of the catalog.
        ttft_s: Promise for the time to the first token; None: nothing is promised.
        tpot_s: Promise for the time between tokens.
        kv_cache_dtype: `--kv-cache-dtype`.
        max_num_batched_tokens: As the flag; 0: vLLM's default for this GPU.
    """
    engine = Engine(facts, format_, gpu, tensor_parallel_size, efficiency, kv_cache_dtype, max_num_batched_tokens)

    def kept(count: int) -> bool:
        speed = steady_state(engine, replace(load, concurrency=count), 0, "")
        return speed.ttft_p95_s <= (ttft_s or math.inf) and speed.tpot_p95_s <= (tpot_s or math.inf)

    good, bad = 0, load.concurrency + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if kept(middle) else (good, middle)
    return good
