"""What the weights of a model take on each GPU. Each formula stands here once. All sizes are bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from infra.weights.facts import WIDTH, expert_parameters

if TYPE_CHECKING:
    from infra.weights.facts import ModelFacts

BITS = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "fp8": 8.0,
    "w8a8-int8": 8.0,
    "w8a16": 8.0,
    # 16-bit scales, one for 128 numbers, and 4-bit zero points.
    "w4a16": 4.0 + 16 / 128 + 4 / 128,
    "awq": 4.0 + 16 / 128 + 4 / 128,
    "gptq": 4.0 + 16 / 128 + 4 / 128,
    "bnb-4bit": 4.0 + 32 / 64,
    # 8-bit scales, one for 32 numbers and one for 16.
    "mxfp4": 4.0 + 8 / 32,
    "nvfp4": 4.0 + 8 / 16,
}
"""Bits that one parameter takes in a matrix that is quantised, scales included."""
REPLICATED = 32 << 20
"""Norms, rotary tables and buffers that every GPU holds whole: 0.02 to 0.06 GiB in start-up logs."""
MXFP4_MULTIPLE = 256
"""The experts' kernels pad their matrices so (gpt-oss-20b takes 13.47 GiB and has 12.82)."""


def table_parameters(facts: ModelFacts) -> int:
    """Of the embedding and the output layer, or of the one table where they are tied: these are not quantised."""
    return facts.vocab_size * facts.hidden_size * (1 if facts.tied_embeddings else 2)


def stored_bytes(facts: ModelFacts, format_: str) -> int:
    """Bytes of all weights in a format, computed from the shape: matrices are quantised, tables are not."""
    wide = BITS[format_] if format_ in WIDTH_FORMATS else 16.0
    tables = table_parameters(facts)
    narrow = expert_parameters(facts) if format_ == "mxfp4" and facts.experts else facts.parameters - tables
    rest = facts.parameters - narrow
    return round((narrow * BITS[format_] + rest * wide) / 8)


WIDTH_FORMATS = frozenset({"fp32", "bf16", "fp16"})
"""Formats that are not quantised."""


def weights_bytes(facts: ModelFacts, format_: str, *, stored: bool) -> int:
    """Bytes of all weights once they are loaded.

    Args:
        facts: Of the model.
        format_: What the engine holds them in.
        stored: The checkpoint itself has that format: then its own size counts.
    """
    if not stored:
        return stored_bytes(facts, format_)
    size = facts.weights_bytes
    table = facts.vocab_size * facts.hidden_size * WIDTH[facts.dtype]
    once = facts.parameters * WIDTH[facts.dtype]
    if facts.tied_embeddings and abs(size - once - table) < table // 20:
        size -= table  # the file holds the one table twice
    if format_ == "mxfp4" and facts.experts:
        inner = facts.experts.intermediate_size
        padded = math.ceil(inner / MXFP4_MULTIPLE) * MXFP4_MULTIPLE / inner
        size += round(expert_parameters(facts) * BITS[format_] / 8 * (padded - 1))
    return size


def weights_per_gpu(facts: ModelFacts, total: int, tensor_parallel_size: int, pipeline_parallel_size: int = 1) -> int:
    """Of the GPU that holds most.

    Matrices are divided among the tensor-parallel group; keys and values are not where it is larger than their heads,
    and MLA's way down is whole everywhere (`ReplicatedLinear`). Of a pipeline's stages the first has the embedding and
    the last the output layer.
    """
    tables = min(total, facts.vocab_size * facts.hidden_size * 2 * (1 if facts.tied_embeddings else 2))
    matrices = total - tables
    stage = math.ceil(facts.layers / pipeline_parallel_size) / facts.layers
    share = matrices * stage + (tables if pipeline_parallel_size == 1 else tables / (1 if facts.tied_embeddings else 2))
    whole = _whole_parameters(facts, tensor_parallel_size) * stage * matrices / max(1, facts.parameters)
    return round(share / tensor_parallel_size + whole * (1 - 1 / tensor_parallel_size)) + REPLICATED


def _whole_parameters(facts: ModelFacts, tensor_parallel_size: int) -> float:
    """Parameters that a tensor-parallel group does not divide."""
    if facts.mla:
        return (
            facts.layers
            * facts.hidden_size
            * (facts.mla.kv_lora_rank + facts.mla.qk_rope_head_dim + facts.mla.q_lora_rank)
        )
    extra = max(0.0, 1 - facts.kv_heads / tensor_parallel_size)
    return extra * facts.attention_layers * facts.hidden_size * 2 * facts.kv_heads * facts.head_dim
