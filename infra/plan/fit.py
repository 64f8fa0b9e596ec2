"""Does a model fit on a GPU, or on a tensor-parallel group of them, and how much cache is left? All sizes are bytes.

    pool = utilisation x total - weights - activation - non-torch memory - CUDA graphs (from 0.21)

as vLLM computes it (vllm/v1/worker/gpu_worker.py, `determine_available_memory`), with each term predicted by the module
that has its formula.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.catalog.memory import GIB, Regime
from infra.plan.kv_cache import KvCache, kv_cache, kv_width
from infra.plan.overhead import activation_bytes, graph_bytes, non_torch_bytes
from infra.plan.weights_memory import weights_per_gpu
from infra.weights.facts import WIDTH, ModelFacts

VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to it before it is divided."""


@dataclass(frozen=True)
class Engine:
    """What one vLLM server is asked to be."""

    facts: ModelFacts
    weights_bytes: int
    """Of all GPUs together, as loaded."""
    gpu_bytes: int
    """Total memory of one GPU as CUDA reports it."""
    utilization: float
    """`--gpu-memory-utilization`."""
    context: int
    """Tokens, `--max-model-len`."""
    sequences: int
    """`--max-num-seqs`."""
    batched_tokens: int
    """`--max-num-batched-tokens`."""
    kv_dtype: str = "auto"
    dtype: str = ""
    """What the engine computes in; empty: as the model says."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    eager: bool = False


@dataclass(frozen=True)
class Fit:
    """What becomes of it, on the GPU that has least room."""

    weights_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    graph_bytes: int
    pool_bytes: int
    """What is left for the KV cache; negative where weights alone are too large."""
    kv_bytes_per_token: int
    """What one more token of a long sequence takes."""
    kv_tokens: int
    """As vLLM prints it."""
    max_concurrency: float
    """Sequences of a full context that fit at once."""
    misfit: str
    """Why vLLM would not start; empty if it fits."""


def fit(engine: Engine, regime: Regime) -> Fit:
    """Predict how an engine uses the memory of its GPUs, and whether it starts."""
    facts, tp, pp = engine.facts, engine.tensor_parallel_size, engine.pipeline_parallel_size
    width = WIDTH[engine.dtype or facts.dtype]
    weights = weights_per_gpu(facts, engine.weights_bytes, tp, pp)
    activation = activation_bytes(facts, regime, width, engine.sequences, engine.batched_tokens, tp)
    non_torch = non_torch_bytes(regime, tp)
    graphs = 0 if engine.eager else graph_bytes(facts, regime, engine.sequences, pp)
    pool = round(engine.utilization * engine.gpu_bytes) - weights - activation - non_torch
    if regime.graphs_in_budget:
        pool -= graphs
    cache = cache_of(engine, regime)
    tokens = cache.tokens(pool, engine.context, engine.batched_tokens, by_group=regime.group_tokens)
    return Fit(
        weights_bytes=weights,
        activation_bytes=activation,
        non_torch_bytes=non_torch,
        graph_bytes=graphs,
        pool_bytes=pool,
        kv_bytes_per_token=cache.token_bytes,
        kv_tokens=tokens,
        max_concurrency=cache.concurrency(pool, engine.context, engine.batched_tokens),
        misfit=illegal(facts, tp, engine.context) or _misfit(engine, cache, pool, graphs),
    )


def cache_of(engine: Engine, regime: Regime) -> KvCache:
    """The layout of an engine's KV cache on one of its GPUs."""
    width = kv_width(engine.dtype or engine.facts.dtype, engine.kv_dtype)
    sizes = engine.tensor_parallel_size, engine.pipeline_parallel_size
    return kv_cache(engine.facts, width, *sizes, regime.state_blocks)


def illegal(facts: ModelFacts, tensor_parallel_size: int, context: int) -> str:
    """Why vLLM refuses a shape before it looks at memory, or ""."""
    heads, kv_heads, tp = facts.attention_heads, facts.kv_heads, tensor_parallel_size
    vocabulary = -(-facts.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if context > facts.max_positions:
        return f"the model takes {facts.max_positions} tokens, not {context}"
    if heads % tp:
        return f"{heads} attention heads cannot be divided by tensor parallel size {tp}"
    if facts.mla is None and kv_heads % tp and tp % kv_heads:
        return f"{kv_heads} KV heads cannot be divided by tensor parallel size {tp}, nor repeated for it"
    if vocabulary % tp:
        return f"a vocabulary of {facts.vocab_size} cannot be divided by tensor parallel size {tp}"
    return ""


def _misfit(engine: Engine, cache: KvCache, pool: int, graphs: int) -> str:
    if pool <= 0:
        return (
            f"weights and activations need {-pool / GIB:.1f} GiB more than vLLM may use of a GPU:"
            " nothing is left for a KV cache"
        )
    needed = cache.sequence_bytes(engine.context, engine.batched_tokens)
    if needed > pool:
        return f"one request of {engine.context} tokens needs {needed / GIB:.2f} GiB of KV cache, not {pool / GIB:.2f}"
    if engine.facts.recurrent and engine.sequences > cache.capacity(pool):
        return f"{engine.sequences} sequences need a state block each; there are {cache.capacity(pool)}"
    outside = engine.gpu_bytes - round(engine.utilization * engine.gpu_bytes)
    if graphs > outside:
        return f"CUDA graphs take {graphs / GIB:.1f} GiB outside the budget; {outside / GIB:.1f} are left there"
    return ""


def largest_concurrency(engine: Engine, tokens: int, regime: Regime) -> int:
    """How many requests of so many tokens fit at once; 0 if the engine does not start."""
    found = fit(engine, regime)
    if found.misfit:
        return 0
    return int(cache_of(engine, regime).concurrency(found.pool_bytes, tokens, engine.batched_tokens))
