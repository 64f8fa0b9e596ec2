"""The KV cache: what a token costs, and how many fit. Each formula stands here once. All sizes are bytes, on one GPU.

vLLM cuts the pool into blocks of tokens. Layers of one kind form groups; every group has its own table of blocks, and
all draw from one pool, so that a block is as large in every group (vllm/v1/core/kv_cache_utils.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.weights.facts import ModelFacts

BLOCK_TOKENS = 16
"""`--block-size` on a GPU where none is given."""
FEW_MORE = 1.5
"""Up to so many times as many layers, groups are padded to the larger number and not to the smaller one."""


@dataclass(frozen=True)
class Group:
    """A table of blocks: layers of one kind that share it."""

    window: int | None
    """Tokens that it looks back over; None: all."""
    block_tokens: int
    """0: blocks are states of sequences, however long these are."""
    state_blocks: int = 0
    """Of one sequence, in a group of recurrent layers: prefix caching keeps the state before the last one too."""

    def blocks(self, length: int, batched_tokens: int) -> int:
        """Blocks that one sequence of so many tokens holds at most, its step under way included."""
        if self.block_tokens == 0:
            return self.state_blocks
        if self.window is None:
            return math.ceil(length / self.block_tokens)
        # A window need not begin where a block does.
        return math.ceil(min(self.window - 1 + batched_tokens, length) / self.block_tokens) + 1


@dataclass(frozen=True)
class KvCache:
    """The layout of one model's cache on one GPU."""

    groups: tuple[Group, ...]
    block_bytes: int
    """Of one block, all layers of a group together."""
    block_tokens: int
    """Of the smallest block."""
    token_bytes: int
    """What one more token costs when a sequence is long: only layers that look back over everything grow."""

    def capacity(self, pool: int) -> int:
        """Blocks in a pool of so many bytes."""
        return max(0, pool) // self.block_bytes

    def blocks_per_sequence(self, length: int, batched_tokens: int) -> int:
        """Blocks that one sequence of so many tokens holds at most."""
        return sum(group.blocks(length, batched_tokens) for group in self.groups)

    def sequence_bytes(self, length: int, batched_tokens: int) -> int:
        """The same in bytes."""
        return self.blocks_per_sequence(length, batched_tokens) * self.block_bytes

    def concurrency(self, pool: int, length: int, batched_tokens: int) -> float:
        """Sequences of so many tokens that fit at once: what vLLM prints as maximum concurrency."""
        return self.capacity(pool) / self.blocks_per_sequence(length, batched_tokens)

    def tokens(self, pool: int, length: int, batched_tokens: int, *, by_group: bool) -> int:
        """What vLLM prints as the size of its cache.

        Args:
            pool: Bytes.
            length: `--max-model-len`.
            batched_tokens: `--max-num-batched-tokens`.
            by_group: As up to 0.20: blocks divided by groups. From 0.21: concurrency times length.
        """
        if by_group:
            return self.capacity(pool) // len(self.groups) * self.block_tokens
        return int(self.concurrency(pool, length, batched_tokens) * length)


def kv_width(dtype: str, kv_dtype: str) -> float:
    """Bytes of one number in the cache: `--kv-cache-dtype`, or the type the engine computes in."""
    text = kv_dtype.lower()
    if "fp8" in text or "int8" in text:
        return 1
    if "nvfp4" in text:
        return 0.5625  # four bits, and an 8-bit scale for sixteen of them
    return {"float32": 4, "fp32": 4}.get(dtype, 2)


def row_bytes(facts: ModelFacts, width: float, tensor_parallel_size: int, *, sliding: bool = False) -> int:
    """What one token leaves in one attention layer, on one GPU.

    MHA, GQA, MQA: 2 x KV heads x head dimension x width; KV heads are divided among the group, and each GPU has one at
    least. MLA: (rank + rope dimension) x width, whole on every GPU (vllm/v1/kv_cache_interface.py).
    """
    if facts.mla:
        return round((facts.mla.kv_lora_rank + facts.mla.qk_rope_head_dim) * width)
    heads, dimension = facts.kv_heads, facts.head_dim
    if not sliding:
        heads, dimension = facts.global_kv_heads or heads, facts.global_head_dim or dimension
    return round(2 * max(1, heads // tensor_parallel_size) * dimension * width)


def kv_cache(
    facts: ModelFacts,
    width: float,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    state_blocks: int = 2,
) -> KvCache:
    """The layout of a model's cache on the GPU that has most of its layers.

    Args:
        facts: Of the model.
        width: Bytes of one number.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: GPUs that the layers are spread over.
        state_blocks: That one sequence holds in a group of recurrent layers.
    """
    full, sliding, recurrent = _layers(facts, pipeline_parallel_size)
    rows = {
        kind: row_bytes(facts, width, tensor_parallel_size, sliding=kind == "sliding")
        for kind, count in (("full", full), ("sliding", sliding))
        if count
    }
    state = facts.recurrent.state_bytes // tensor_parallel_size if facts.recurrent else 0
    page = BLOCK_TOKENS * max(rows.values(), default=0)
    if state > page:  # the block grows until a state goes into it
        smallest = min(rows.values(), default=0) or state
        page = math.ceil(state / (BLOCK_TOKENS * smallest)) * BLOCK_TOKENS * smallest
    counts = [count for count in (full, sliding, recurrent) if count]
    size = _group_size(counts)
    window = facts.sliding.window if facts.sliding else None
    groups = [Group(None, page // rows["full"])] * math.ceil(full / size) if full else []
    groups += [Group(window, page // rows["sliding"])] * math.ceil(sliding / size) if sliding else []
    groups += [Group(None, 0, state_blocks)] * math.ceil(recurrent / size) if recurrent else []
    return KvCache(
        groups=tuple(groups),
        block_bytes=page * size,
        block_tokens=min((group.block_tokens for group in groups if group.block_tokens), default=1),
        token_bytes=full * rows["full"] if full else sliding * rows.get("sliding", 0),
    )


def _layers(facts: ModelFacts, pipeline_parallel_size: int) -> tuple[int, int, int]:
    """Layers of each kind on the GPU that has most."""
    kinds = (
        facts.full_layers,
        facts.sliding.layers if facts.sliding else 0,
        facts.recurrent.layers if facts.recurrent else 0,
    )
    full, sliding, recurrent = (math.ceil(count / pipeline_parallel_size) for count in kinds)
    return full, sliding, recurrent


def _group_size(counts: list[int]) -> int:
    """Layers in a group: as many as the rarest kind has, unless the others have hardly more."""
    return max(counts) if max(counts) < FEW_MORE * min(counts) else min(counts)
