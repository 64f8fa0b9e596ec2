"""What an engine takes on a GPU beside weights and KV cache. Each formula stands here once. All sizes: bytes, one GPU.

vLLM measures it at start: it runs a batch of the largest size through the model and then samples for as many sequences
as may run (`profile_run`); what was in use at most is not given to the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.catalog.memory import GIB

if TYPE_CHECKING:
    from infra.catalog.memory import Regime
    from infra.weights.facts import ModelFacts, Vision

LARGE_GPU = 70 * GIB
LARGEST_GPU = 160 * GIB
LARGE = (1024, 8192)
"""Sequences and tokens of a batch on a large GPU that is no A100 (vllm/engine/arg_utils.py, `get_batch_defaults`)."""
SMALL = (256, 2048)
LONG_PROMPT = 32_768
"""Before chunked prefill was the rule, it was used for contexts that are longer."""
CAPTURED = 512
"""Largest batch that has a CUDA graph (`max_cudagraph_capture_size`)."""


def batch_defaults(regime: Regime, gpu_bytes: int, context: int, *, a100: bool) -> tuple[int, int]:
    """`--max-num-seqs` and `--max-num-batched-tokens` where none are given."""
    if not regime.chunked_prefill:
        return SMALL[0], max(SMALL[1], context) if context <= LONG_PROMPT else SMALL[1]
    if not regime.large_defaults or gpu_bytes < LARGE_GPU or a100:
        return SMALL
    return (LARGE[0], 2 * LARGE[1]) if gpu_bytes >= LARGEST_GPU and regime.graphs_in_budget else LARGE


def activation_bytes(  # noqa: PLR0913, PLR0917 - the engine's settings, one by one
    facts: ModelFacts, regime: Regime, width: int, sequences: int, batched_tokens: int, tensor_parallel_size: int
) -> int:
    """The most that is in use at once beside the weights: in a layer of a full batch, or in the sampler after it."""
    hidden = batched_tokens * facts.hidden_size * width
    logits = sequences * facts.vocab_size
    sampler = hidden + logits * width + regime.sampler_copies * logits * 4
    layer = layer_bytes(facts, width, batched_tokens, tensor_parallel_size)
    encoder, pictures = vision_bytes(facts.vision, width, batched_tokens, facts.hidden_size) if facts.vision else (0, 0)
    return round(max(encoder, pictures + max(sampler, layer)))


def vision_bytes(vision: Vision, width: int, batched_tokens: int, hidden_size: int) -> tuple[int, int]:
    """A batch full of pictures, one at least: in a layer of the encoder, and what is kept of them for the model.

    vLLM profiles with as many pictures of the largest size as a batch takes. Of a patch there are the residual, input,
    queries, keys, values and output, and the MLP before and after its activation.
    """
    pictures = max(1, batched_tokens // vision.tokens)
    patch = 6 * vision.hidden_size + 2 * vision.intermediate_size
    return pictures * vision.patches * patch * width, pictures * vision.tokens * hidden_size * width


def layer_bytes(facts: ModelFacts, width: int, batched_tokens: int, tensor_parallel_size: int) -> int:
    """A layer with a full batch: residual, input and output, and the MLP's gate, up and their product.

    With experts each token is there once for every expert that it goes through.
    """
    inner = facts.intermediate_size
    if facts.experts:
        routed = facts.experts.active * facts.experts.intermediate_size + facts.experts.shared_intermediate_size
        inner = max(routed, inner if facts.experts.layers < facts.layers else 0)
    copies = 4 + (facts.experts.active if facts.experts else 0)
    heads = (facts.attention_heads + 2 * facts.kv_heads) * facts.head_dim
    widest = max(3 * inner, 2 * heads)
    return round(batched_tokens * width * (copies * facts.hidden_size + widest / tensor_parallel_size))


def non_torch_bytes(regime: Regime, tensor_parallel_size: int) -> int:
    """CUDA context, libraries and, in a group, NCCL with the buffers of its all-reduce."""
    by_size = {1: regime.non_torch_gib, 2: regime.non_torch_pair_gib}
    return round(by_size.get(tensor_parallel_size, regime.non_torch_group_gib) * GIB)


def graph_bytes(facts: ModelFacts, regime: Regime, sequences: int, pipeline_parallel_size: int = 1) -> int:
    """All captured CUDA graphs: measured per layer, at 256 and at 1,024 sequences."""
    mib = regime.graph_mib_per_layer_large if sequences >= CAPTURED else regime.graph_mib_per_layer
    return round(mib * (1 << 20) * facts.layers / pipeline_parallel_size)
