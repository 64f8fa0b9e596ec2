"""How long does each step of an engine take? A roofline: an operator takes as long as its reading or its arithmetic.

    step = matrices + attention + all-reduces + overhead          operators run one after the other
    operator = max(bytes / (bandwidth x share), flops / (peak x share))

(Williams, Waterman, Patterson: Roofline, CACM 52/4, 2009; for inference: Pope et al., Efficiently Scaling Transformer
Inference, 2022.) The shares are calibrated and stand in catalog/efficiency.yaml. Each formula stands here once. All is
of one GPU of the tensor-parallel group: each does the same at the same time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from infra.plan.kv_cache import kv_width, row_bytes
from infra.plan.overhead import LARGE, LARGE_GPU, SMALL
from infra.plan.weights_memory import BITS, WIDTH_FORMATS, table_parameters
from infra.weights.facts import count_parameters, expert_parameters

if TYPE_CHECKING:
    from infra.catalog import Gpu
    from infra.catalog.efficiency import Efficiency
    from infra.weights.facts import ModelFacts

HOPPER = (9, 0)
"""Compute capability."""
EIGHT_BIT: dict[str, Literal["fp8", "int8"]] = {"fp8": "fp8", "w8a8-int8": "int8"}
"""What formats of eight bits are multiplied in, where that is done in eight bits."""


@dataclass(frozen=True)
class Engine:
    """One vLLM server, and how long everything takes that it does. All times in seconds."""

    facts: ModelFacts
    format_: str
    gpu: Gpu
    tensor_parallel_size: int
    efficiency: Efficiency
    kv_cache_dtype: str = "auto"
    max_num_batched_tokens: int = 0
    """0: vLLM's default for this GPU."""

    @cached_property
    def batched_tokens(self) -> int:
        """`--max-num-batched-tokens`: what one step computes at most."""
        large = self.gpu.memory_bytes >= LARGE_GPU and "A100" not in self.gpu.product
        return self.max_num_batched_tokens or (LARGE if large else SMALL)[1]

    @cached_property
    def _parameters(self) -> tuple[float, float, float]:
        """On this GPU: of the output layer; of all other matrices but routed experts; of routed experts.

        A step reads only some rows of the embedding, and nothing of a vision tower.
        """
        facts, group = self.facts, self.tensor_parallel_size
        table = facts.vocab_size * facts.hidden_size
        routed = expert_parameters(facts) - expert_parameters(facts, 0)
        decoder = count_parameters(facts) if facts.vision else facts.parameters
        matrices = decoder - routed - table_parameters(facts)
        return table / group, matrices / group, routed / group

    @cached_property
    def _weights_bytes_s(self) -> float:
        return self.gpu.bandwidth_bytes_s * self.efficiency.weights_bandwidth.value

    @cached_property
    def _wide_flops(self) -> float:
        return self.gpu.flops["bf16"] * self.efficiency.matrix_flops.value

    @cached_property
    def _matrix_flops(self) -> float:
        """Of the format: native FP8 and INT8 multiply in 8 bits, weight-only formats in 16 after they were made wide.

        Marlin reads narrow weights at full speed, and costs arithmetic once that is what takes the time (Frantar et
        al., MARLIN, 2024; vLLM's quantisation pages say which GPU does which).
        """
        if self.gpu.formats[self.format_] == "weight-only":
            return self._wide_flops * self.efficiency.weight_only_flops.value
        if self.format_ not in EIGHT_BIT:
            return self._wide_flops
        peak = self.gpu.flops[EIGHT_BIT[self.format_]]
        return peak * self.efficiency.matrix_flops.value * self.efficiency.eight_bit_flops.value

    def matrices_s(self, tokens: float, sequences: float) -> float:
        """All matrices once: `tokens` rows through each layer, `sequences` rows through the output layer.

        Bytes are those of the weights: 2 flops a parameter and a token. Quantised models keep the output layer wide.
        """
        head, body, routed = self._parameters
        width = BITS[self.format_] / 8
        wide = width if self.format_ in WIDTH_FORMATS else 2
        seconds = max(body * width / self._weights_bytes_s, 2 * body * tokens / self._matrix_flops)
        seconds += max(head * wide / self._weights_bytes_s, 2 * head * sequences / self._wide_flops)
        if self.facts.experts is None:
            return seconds
        experts, known = self.facts.experts, self.efficiency
        share = experts.active / experts.count
        # A batch reads every expert that one of its tokens goes through: count x (1 - (1 - active / count)^tokens) of
        # them, if tokens choose independently and all experts are as likely. Real routers are uneven and read fewer.
        read = routed * width * (1 - math.pow(1 - share, tokens)) / self._weights_bytes_s
        arithmetic = 2 * routed * share * tokens / (self._matrix_flops * known.expert_flops.value)
        return seconds + max(read, arithmetic) + experts.layers * known.expert_layer_s.value

    @cached_property
    def _rows(self) -> tuple[float, float, float]:
        """Bytes of cache: of one token in full-attention layers, in sliding ones; of a sequence in recurrent layers."""
        facts, group = self.facts, self.tensor_parallel_size
        width = kv_width(self.format_, self.kv_cache_dtype)
        full = facts.full_layers * row_bytes(facts, width, group)
        sliding = facts.sliding.layers * row_bytes(facts, width, group, sliding=True) if facts.sliding else 0
        state = facts.recurrent.layers * facts.recurrent.state_bytes / group if facts.recurrent else 0
        return full, sliding, state

    def cache_read_bytes(self, context: float) -> float:
        """What attention reads to write the next token of a sequence of so many.

        All rows of full layers, those in the window of sliding ones; a recurrent state is read and written.
        """
        full, sliding, state = self._rows
        window = min(context, self.facts.sliding.window) if self.facts.sliding else 0
        return full * context + sliding * window + 2 * state

    def attention_flops(self, context: float, *, decoding: bool) -> float:
        """Of one token that attends to so many: 2 for the scores and 2 for the values, a head and a dimension.

        MLA while decoding works on the compressed row itself (`absorbed`), rank + rope and rank again for each head.
        """
        facts = self.facts
        window = min(context, facts.sliding.window) * facts.sliding.layers if facts.sliding else 0
        if facts.mla is None:
            rows = facts.full_layers * context * (facts.global_head_dim or facts.head_dim) + window * facts.head_dim
            return 4 * facts.attention_heads / self.tensor_parallel_size * rows
        mla = facts.mla
        wide = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
        narrow = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
        rows = (facts.full_layers * context + window) * (narrow if decoding else wide)
        return 2 * facts.attention_heads / self.tensor_parallel_size * rows

    def all_reduce_s(self, tokens: float) -> float:
        """Two all-reduces a layer, after attention and after the MLP, of tokens x hidden size x 2 bytes each.

        (Shoeybi et al., Megatron-LM, 2019.) A ring moves 2 x (group - 1) / group of that through every GPU.
        """
        group, known = self.tensor_parallel_size, self.efficiency
        if group == 1:
            return 0.0
        moved = 2 * (group - 1) / group * tokens * self.facts.hidden_size * 2
        if self.gpu.nvlink_bytes_s is None:
            each = known.pcie_latency_s.value + moved / known.pcie_bytes_s.value
        else:
            each = known.nvlink_latency_s.value + moved / (self.gpu.nvlink_bytes_s * known.nvlink_bandwidth.value)
        return 2 * self.facts.layers * each

    def decode_step_s(self, sequences: float, context: float) -> float:
        """One step in which each of so many sequences of that length gets its next token."""
        known = self.efficiency
        share = known.kv_bandwidth if self.gpu.compute_capability >= HOPPER else known.kv_bandwidth_fa2
        read = self.cache_read_bytes(context) / (self.gpu.bandwidth_bytes_s * share.value)
        arithmetic = self.attention_flops(context, decoding=True) / self._attention_flops_s
        return self._step_s(sequences, sequences) + sequences * (max(read, arithmetic) + known.sequence_s.value)

    @cached_property
    def _attention_flops_s(self) -> float:
        return self.gpu.flops["bf16"] * self.efficiency.attention_flops.value

    def prefill_s(self, tokens: int, cached: int, others: int, together: float = 1) -> tuple[float, int]:
        """Reading a prompt beside so many sequences that decode: seconds that it adds, and steps that it takes.

        Chunked prefill: decoding sequences go first, and prompts get what is left of each step's budget (vLLM,
        Optimization and Tuning). What they add is the difference: weights are read once for both.

        Args:
            tokens: Of the prompt.
            cached: Of these, found in the prefix cache.
            others: Sequences that decode.
            together: Prompts that are read at once, on average: each has its part of what they add.
        """
        new = max(1, tokens - cached)
        steps = math.ceil(new * together / max(1, self.batched_tokens - others))
        step = self._step_s(others + new * together / steps, others + 1)
        if others:
            step -= self._step_s(others, others)
        return steps * step / together + new * self._attending_s(cached + new / 2), steps

    def prefill_tokens_s(self, tokens: int, cached: int) -> float:
        """Tokens of such prompts that are read in a second while every step is full of them."""
        new = max(1, tokens - cached)
        full = self._step_s(self.batched_tokens, 1)
        return 1 / (full / self.batched_tokens + self._attending_s(cached + new / 2))

    def _step_s(self, tokens: float, sequences: float) -> float:
        """A step without its attention: so many rows through each layer, and rows through the output layer."""
        overhead = self.efficiency.step_s.value + self.efficiency.layer_s.value * self.facts.layers
        return self.matrices_s(tokens, sequences) + self.all_reduce_s(tokens) + overhead

    def _attending_s(self, context: float) -> float:
        """Attention of one token of a prompt."""
        return self.attention_flops(context, decoding=False) / self._attention_flops_s
