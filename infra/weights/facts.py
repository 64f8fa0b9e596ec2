"""What planning needs to know of a model. `infra/weights/config_json.py` reads it from a published config.json."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number."""


class Strict(BaseModel):
    """Base of the facts: immutable, no unknown keys, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Mla(Strict):
    """Multi-head latent attention: a token leaves one compressed row in the cache, not keys and values of each head."""

    kv_lora_rank: PositiveInt
    qk_rope_head_dim: PositiveInt
    qk_nope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    q_lora_rank: NonNegativeInt = 0
    """0: queries are not compressed."""


class Sliding(Strict):
    """Layers that look back over a window only."""

    layers: PositiveInt
    window: PositiveInt
    """Tokens."""


class Recurrent(Strict):
    """Layers that keep a state of fixed size per sequence, not a row per token: Mamba, gated delta networks."""

    layers: PositiveInt
    state_bytes: PositiveInt
    """Of one sequence in one such layer, all heads together."""
    parameters: NonNegativeInt = 0
    """Of the recurrence of one such layer: its ways in and out. 0: not known."""
    beside_attention: bool = False
    """Every layer is both at once (Falcon-H1), and has a row per token too."""


class Vision(Strict):
    """The encoder of a model that also takes pictures."""

    layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    patches: PositiveInt
    """Of the largest picture."""
    tokens: PositiveInt
    """That it becomes in the language model."""


class Experts(Strict):
    """A mixture of experts in place of one MLP."""

    count: PositiveInt
    active: PositiveInt
    """Experts that one token goes through, besides the shared ones."""
    layers: PositiveInt
    intermediate_size: PositiveInt
    """Of one expert."""
    shared_intermediate_size: NonNegativeInt = 0
    """Of all shared experts of a layer together."""
    latent_size: NonNegativeInt = 0
    """Dimensions that routed experts work in, where they are fewer (Nemotron 3 Super); 0: those of the model."""


class ModelFacts(Strict):
    """What planning needs to know of a model, from its config.json."""

    architecture: str
    """`LlamaForCausalLM` …"""
    layers: Annotated[int, Field(gt=0, le=1000)]
    """Of all kinds."""
    mlp_layers: NonNegativeInt = 0
    """Layers that are an MLP or experts alone; where there are any, no other layer has one (Nemotron-H)."""
    cacheless_layers: NonNegativeInt = 0
    """Layers that use the cache of an earlier one (gemma-3n) or have no attention (Nemotron-NAS)."""
    hidden_size: PositiveInt
    intermediate_size: NonNegativeInt = 0
    """Of the MLP of a layer without experts; 0: not known, or no such layer."""
    gated: bool = True
    """An MLP has three matrices, one of them a gate; else two."""
    attention_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    global_kv_heads: PositiveInt | None = None
    """Of full-attention layers, where sliding ones have another number."""
    global_head_dim: PositiveInt | None = None
    """Likewise."""
    mla: Mla | None = None
    sliding: Sliding | None = None
    recurrent: Recurrent | None = None
    experts: Experts | None = None
    vision: Vision | None = None
    vocab_size: PositiveInt
    max_positions: PositiveInt
    """Tokens of prompt and answer together that the model was trained for."""
    dtype: Literal["bfloat16", "float16", "float32"]
    """What the weights that are not quantised are stored in."""
    tied_embeddings: bool
    """The output layer is the embedding table, stored once."""
    parameters: PositiveInt
    weights_bytes: Annotated[int, Field(gt=0)]
    """Bytes of all tensors as stored."""

    @property
    def full_layers(self) -> int:
        """Layers whose cache grows with every token."""
        return self.attention_layers - self.cacheless_layers - (self.sliding.layers if self.sliding else 0)

    @property
    def attention_layers(self) -> int:
        """Layers that attend to tokens, all of them or a window."""
        recurrent = self.recurrent.layers if self.recurrent and not self.recurrent.beside_attention else 0
        return self.layers - self.mlp_layers - recurrent


def count_parameters(facts: ModelFacts) -> int:
    """Of the language model: embeddings, attention, MLPs, experts. Norms and biases (<0.1 %) are left out."""
    experts = facts.experts
    tables = facts.vocab_size * facts.hidden_size * (1 if facts.tied_embeddings else 2)
    dense = (facts.mlp_layers or facts.layers) - (experts.layers if experts else 0)
    mlps = dense * _matrices(facts) * facts.hidden_size * facts.intermediate_size
    return tables + mlps + expert_parameters(facts) + _attention_parameters(facts)


def expert_parameters(facts: ModelFacts, active: int | None = None) -> int:
    """Parameters of the experts, routed and shared, and of their routers; with `active`, of that many routed ones."""
    if facts.experts is None:
        return 0
    experts = facts.experts
    routed = (experts.count if active is None else min(active, experts.count)) * experts.intermediate_size
    routed *= _matrices(facts) * (experts.latent_size or facts.hidden_size)
    shared = _matrices(facts) * experts.shared_intermediate_size * facts.hidden_size
    return experts.layers * (routed + shared + facts.hidden_size * (experts.count + 2 * experts.latent_size))


def _matrices(facts: ModelFacts) -> int:
    """Of one MLP or expert."""
    return 3 if facts.gated else 2


def _attention_parameters(facts: ModelFacts) -> int:
    recurrent = 0
    if facts.recurrent:
        recurrent = facts.recurrent.layers * facts.recurrent.parameters
    layers = facts.attention_layers
    if facts.mla:
        return layers * _mla_parameters(facts, facts.mla) + recurrent
    width = facts.head_dim * (2 * facts.attention_heads + 2 * facts.kv_heads)
    return layers * facts.hidden_size * width + recurrent


def _mla_parameters(facts: ModelFacts, mla: Mla) -> int:
    heads, queries = facts.attention_heads, facts.attention_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    down = facts.hidden_size * (mla.kv_lora_rank + mla.qk_rope_head_dim + mla.q_lora_rank)
    up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    up += (mla.q_lora_rank or facts.hidden_size) * queries
    return down + up + heads * mla.v_head_dim * facts.hidden_size
