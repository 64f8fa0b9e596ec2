"""What planning needs to know of a model, read from its published config.json.

Names of keys are those of transformers; a model with several parts has the decoder's in `text_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

Config = Mapping[str, Any]
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


class ModelFacts(Strict):
    """What planning needs to know of a model, from its config.json."""

    architecture: str
    """`LlamaForCausalLM` …"""
    layers: PositiveInt
    """Of all kinds."""
    mlp_layers: NonNegativeInt = 0
    """Layers that are an MLP alone; where there are any, no other layer has one (Nemotron-H)."""
    hidden_size: PositiveInt
    intermediate_size: NonNegativeInt = 0
    """Of the MLP of a layer without experts; 0: not known, or no such layer."""
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
        return (
            self.layers
            - self.mlp_layers
            - (self.sliding.layers if self.sliding else 0)
            - (self.recurrent.layers if self.recurrent else 0)
        )


# Reading a config.json. Every spelling of a key is here, once.

_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_query_groups"),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_hidden_size"),
    "positions": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "active": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "experts_per_token"),
    "expert_size": ("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size"),
}
_RECURRENT = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "linear"})
_LOCAL = frozenset({"sliding_attention", "chunked_attention", "sliding", "local"})
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4}
"""One layer in so many looks back over everything, where the config does not say: the default of the architecture."""
ANY_RESOLUTION = 65_536
"""Patches of the largest picture where an encoder takes any size: 12.8 million pixels (Qwen2-VL and its successors)."""
_UNSCALED_ROPE = frozenset({"default", "mrope", "llama3", "longrope", "su"})
"""Ways of stretching positions that `max_position_embeddings` already counts (vllm/config/model.py)."""
_TIED = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "cohere", "cohere2", "gpt2"})
"""Model types whose embeddings are tied where the config does not say."""
_UNGATED = frozenset(
    {"phi", "gpt2", "gpt_neox", "opt", "falcon", "starcoder2", "gpt_bigcode", "nemotron", "bloom", "mpt"}
)
"""Model types whose MLP has two matrices: all others have three, one of them a gate."""


def decoder(config: Config) -> dict[str, Any]:
    """The keys that describe the language model, whichever part of the config they are in."""
    merged = dict(config)
    for part in _PARTS:
        if isinstance(inner := config.get(part), Mapping):
            merged |= decoder(inner)
    return merged


def facts_from_config(config: Config, weights_bytes: int | None = None) -> ModelFacts:
    """Everything that planning needs to know of a model.

    Args:
        config: A published config.json.
        weights_bytes: Bytes of all safetensors files, where known; else as many as the parameters take.

    Raises:
        KeyError: A key that is needed is missing; the message names it.
        ValueError: It is no decoder language model of known shape.
    """
    text = decoder(config)
    layers, hidden, heads = _need(text, "layers"), _need(text, "hidden"), _need(text, "heads")
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in WIDTH:
        raise ValueError(f"its dtype {dtype} is none of {', '.join(WIDTH)}")
    kinds = _layer_kinds(text, layers)
    sliding, recurrent = _sliding(text, kinds), _recurrent(text, kinds)
    tied = text.get("tie_word_embeddings")
    fields: dict[str, Any] = {
        "architecture": str((config.get("architectures") or [text.get("model_type", "unknown")])[0]),
        "layers": layers,
        "mlp_layers": kinds.get("mlp", 0),
        "hidden_size": hidden,
        "intermediate_size": _mlp_size(text, hidden),
        "attention_heads": heads,
        "kv_heads": _kv_heads(text, heads),
        "head_dim": _find(text, "head_dim") or hidden // heads,
        "global_kv_heads": text.get("num_global_key_value_heads"),
        "global_head_dim": text.get("global_head_dim"),
        "mla": _mla(text),
        "sliding": sliding,
        "recurrent": recurrent,
        "experts": _experts(text, layers),
        "vision": (vision := _vision(config)),
        "vocab_size": _need(text, "vocab"),
        "max_positions": _positions(text),
        "dtype": dtype,
        "tied_embeddings": text.get("model_type") in _TIED if tied is None else bool(tied),
        "gated": text.get("model_type") not in _UNGATED,
    }
    gated = fields.pop("gated")
    extra = _vision_parameters(vision) if vision else 0
    if text.get("attn_output_gate") or "linear_num_value_heads" in text:  # queries bring a gate of their own size
        extra += (layers - (recurrent.layers if recurrent else 0)) * hidden * heads * fields["head_dim"]
    shape = ModelFacts(**fields, parameters=1, weights_bytes=1)
    parameters = count_parameters(shape, gated=gated) + extra
    size = weights_bytes or parameters * WIDTH[dtype]
    return shape.model_copy(update={"parameters": parameters, "weights_bytes": size})


def _find(text: Config, name: str) -> int | None:
    for key in _SPELLINGS[name]:
        value = text.get(key)
        if isinstance(value, list) and value:  # one number a layer: the largest decides
            value = max(item for item in value if isinstance(item, int))
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _need(text: Config, name: str) -> int:
    value = _find(text, name)
    if value is None:
        raise KeyError(_SPELLINGS[name][0])
    return value


def _kv_heads(text: Config, heads: int) -> int:
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return _find({key: value for key, value in text.items() if key == "multi_query_group_num"}, "kv_heads") or 1
    return _find(text, "kv_heads") or heads


def _mlp_size(text: Config, hidden: int) -> int:
    return _find(text, "intermediate") or 4 * hidden


def _positions(text: Config) -> int:
    """As vLLM derives it: positions that YaRN and its like stretch are counted stretched."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    positions = _need(text, "positions")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = rope.get("factor")
    if kind in _UNSCALED_ROPE or not isinstance(factor, int | float):
        return positions
    if kind == "yarn":
        positions = rope.get("original_max_position_embeddings") or positions
    return int(positions * factor)


def _mla(text: Config) -> Mla | None:
    if not isinstance(text.get("kv_lora_rank"), int):
        return None
    return Mla(
        kv_lora_rank=text["kv_lora_rank"],
        qk_rope_head_dim=text["qk_rope_head_dim"],
        qk_nope_head_dim=text["qk_nope_head_dim"],
        v_head_dim=text["v_head_dim"],
        q_lora_rank=text.get("q_lora_rank") or 0,
    )


def _layer_kinds(text: Config, layers: int) -> dict[str, int]:  # noqa: PLR0911 - one line for each way to say it
    """How many layers are `sliding` and `recurrent`; all others look back over everything."""
    names = text.get("layer_types") or text.get("layers_block_type") or text.get("block_types")
    if isinstance(names, list):
        return {
            "sliding": sum(name in _LOCAL for name in names),
            "recurrent": sum(name in _RECURRENT for name in names),
        }
    if isinstance(pattern := text.get("hybrid_override_pattern"), str):  # Nemotron-H: M mamba, * attention, - MLP
        return {"sliding": 0, "recurrent": pattern.count("M"), "mlp": pattern.count("-")}
    if isinstance(every := text.get("full_attention_interval"), int):
        return {"sliding": 0, "recurrent": layers - layers // every}
    if isinstance(period := text.get("attn_layer_period"), int):  # Jamba
        return {"sliding": 0, "recurrent": layers - len(range(text.get("attn_layer_offset", 0), layers, period))}
    if isinstance(local := text.get("no_rope_layers"), list) and text.get("attention_chunk_size"):  # Llama 4
        return {"sliding": sum(bool(layer) for layer in local), "recurrent": 0}
    every = text.get("sliding_window_pattern") or _PATTERNS.get(str(text.get("model_type")))
    if isinstance(every, int) and every > 1 and text.get("sliding_window"):
        return {"sliding": layers - layers // every, "recurrent": 0}
    if text.get("sliding_window") and text.get("use_sliding_window") is not False:
        return {"sliding": layers, "recurrent": 0}
    return {"sliding": 0, "recurrent": 0}


def _sliding(text: Config, kinds: Mapping[str, int]) -> Sliding | None:
    window = text.get("sliding_window") or text.get("attention_chunk_size")
    if not kinds["sliding"] or not isinstance(window, int) or window >= _positions(text):
        return None
    return Sliding(layers=kinds["sliding"], window=window)


def _recurrent(text: Config, kinds: Mapping[str, int]) -> Recurrent | None:
    """State of one sequence in one layer: what the convolution still needs, and what the recurrence keeps.

    Shapes: vllm/model_executor/layers/mamba/mamba_utils.py.
    """
    if not kinds["recurrent"]:
        return None
    width = WIDTH.get(str(text.get("mamba_ssm_dtype") or text.get("dtype") or text.get("torch_dtype")), 2)
    if "linear_num_value_heads" in text:  # gated delta network
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        convolved, kernel = 2 * keys + values, text["linear_conv_kernel_dim"]
        kept = values * text["linear_key_head_dim"]
        projected = 2 * keys + 3 * values + 2 * text["linear_num_value_heads"]
    else:
        heads = text.get("mamba_num_heads") or text.get("mamba_n_heads")
        state = text.get("ssm_state_size") or text.get("mamba_d_state") or text.get("state_size")
        kernel = text.get("conv_kernel") or text.get("mamba_d_conv") or 4
        if not isinstance(state, int):
            raise KeyError("ssm_state_size")
        if heads:  # Mamba 2
            inner = heads * (text.get("mamba_head_dim") or text["mamba_d_head"])
            convolved = inner + 2 * (text.get("n_groups") or text.get("mamba_n_groups") or 1) * state
            projected = 2 * inner + convolved + heads
        else:  # Mamba 1
            inner = text.get("mamba_expand", 2) * _need(text, "hidden")
            convolved, projected = inner, 3 * inner
        kept = inner * state
    return Recurrent(
        layers=kinds["recurrent"],
        state_bytes=convolved * (kernel - 1) * 2 + kept * width,
        parameters=_need(text, "hidden") * projected,
    )


def _experts(text: Config, layers: int) -> Experts | None:
    count = _find(text, "experts")
    if count is None or count < 2:  # noqa: PLR2004 - one expert is a plain MLP
        return None
    size = _find(text, "expert_size") or _need(text, "intermediate")
    dense = int(text.get("first_k_dense_replace") or 0) + len(text.get("mlp_only_layers") or ())
    every = text.get("interleave_moe_layer_step") or text.get("decoder_sparse_step") or text.get("moe_layer_freq") or 1
    every = every if isinstance(every, int) else 1
    shared = text.get("shared_expert_intermediate_size") or text.get("shared_intermediate_size")
    number = text.get("n_shared_experts") or text.get("num_shared_experts") or 0
    return Experts(
        count=count,
        active=min(count, _find(text, "active") or 1),
        layers=max(1, (layers - dense) // every),
        intermediate_size=size,
        shared_intermediate_size=int(shared if shared is not None else number * size),
    )


def _vision(config: Config) -> Vision | None:
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping):
        return None
    depth, hidden = _find(tower, "layers") or tower.get("depth"), tower.get("embed_dim") or tower.get("hidden_size")
    if not isinstance(depth, int) or not isinstance(hidden, int):
        return None
    side, patch = tower.get("image_size"), tower.get("patch_size") or 14
    patches = (side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) else ANY_RESOLUTION
    merge = tower.get("spatial_merge_size") or config.get("spatial_merge_size") or 2
    return Vision(
        layers=depth,
        hidden_size=hidden,
        intermediate_size=tower.get("intermediate_size") or int(tower.get("mlp_ratio", 4) * hidden),
        patches=patches,
        tokens=config.get("mm_tokens_per_image") or max(1, patches // merge**2),
    )


def _vision_parameters(vision: Vision) -> int:
    """Attention and MLP of the encoder's layers."""
    return vision.layers * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)


def count_parameters(facts: ModelFacts, *, gated: bool = True) -> int:
    """Of the language model: embeddings, attention, MLPs, experts. Norms and biases (<0.1 %) are left out."""
    experts = facts.experts
    matrices = 3 if gated else 2
    tables = facts.vocab_size * facts.hidden_size * (1 if facts.tied_embeddings else 2)
    dense = facts.mlp_layers or facts.layers - (experts.layers if experts else 0)
    mlps = dense * matrices * facts.hidden_size * facts.intermediate_size
    return tables + mlps + expert_parameters(facts) + _attention_parameters(facts)


def expert_parameters(facts: ModelFacts, active: int | None = None) -> int:
    """Parameters of the experts, routed and shared, and of their routers; with `active`, of that many routed ones."""
    if facts.experts is None:
        return 0
    experts = facts.experts
    routed = (experts.count if active is None else min(active, experts.count)) * experts.intermediate_size
    return experts.layers * facts.hidden_size * (3 * (routed + experts.shared_intermediate_size) + experts.count)


def active_parameters(facts: ModelFacts) -> int:
    """Parameters that one token is multiplied with: all but the experts that it does not go through."""
    if facts.experts is None:
        return facts.parameters
    return facts.parameters - expert_parameters(facts) + expert_parameters(facts, facts.experts.active)


def _attention_parameters(facts: ModelFacts) -> int:
    recurrent = 0
    if facts.recurrent:
        recurrent = facts.recurrent.layers * facts.recurrent.parameters
    layers = facts.layers - facts.mlp_layers - (facts.recurrent.layers if facts.recurrent else 0)
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
