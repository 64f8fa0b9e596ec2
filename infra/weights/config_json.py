"""Facts of a model, read from its published config.json. Every spelling of a key is here, once.

Names of keys are those of transformers; a model with several parts has the decoder's in `text_config` or the like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.weights.facts import WIDTH, Experts, Mla, ModelFacts, Recurrent, Sliding, Vision, count_parameters

Config = Mapping[str, Any]

_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Parts of a config that describe the language model, and go before what stands around them."""
_ADDED_PARTS = ("attn_config", "ffn_config")
"""Parts with more of its keys (DBRX, MPT)."""
_DEFAULTS = {
    "gemma3_text": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    },
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32_000,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
        "max_position_embeddings": 131_072,
    },
    "falcon": {"max_position_embeddings": 2048},
}
"""What the configuration class in transformers takes where a config is silent, of types that often are.

The `text_config` of gemma-3 and LLaVA has only what differs.
"""
_SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": (
        "num_key_value_heads",
        "num_kv_heads",
        "n_head_kv",
        "multi_query_group_num",
        "num_query_groups",
        "num_attention_groups",
        "kv_n_heads",
    ),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "dense": ("intermediate_size_mlp",),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_hidden_size"),
    "positions": (
        "max_position_embeddings",
        "n_positions",
        "seq_length",
        "max_seq_len",
        "model_max_length",
        "max_sequence_length",
    ),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "active": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts"),
    "expert_size": ("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size"),
}
_RECURRENT = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "linear", "conv"})
_LOCAL = frozenset({"sliding_attention", "chunked_attention", "sliding", "local"})
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4}
"""One layer in so many looks back over everything, where the config does not say: the default of the architecture."""
ANY_RESOLUTION = 65_536
"""Patches of the largest picture where an encoder takes any size: 12.8 million pixels (Qwen2-VL and its successors)."""
_UNSCALED_ROPE = frozenset({"default", "mrope", "llama3", "longrope", "su", "yarn", "deepseek_yarn"})
"""Ways of stretching positions that `max_position_embeddings` already counts (vllm/config/model.py)."""
_TIED = frozenset(
    {"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "cohere", "cohere2"}
    | {"gpt2", "opt", "falcon", "lfm2"}
)
"""Model types whose embeddings are tied where the config does not say."""
_UNGATED = frozenset(
    {"phi", "gpt2", "gpt_neox", "opt", "falcon", "starcoder2", "gpt_bigcode", "nemotron", "bloom", "mpt"}
)
"""Model types whose MLP has two matrices: all others have three, one of them a gate, unless it is a squared ReLU."""
_PARALLEL = frozenset({"falcon_h1"})
"""Model types whose every layer has attention and a recurrence side by side."""
_MLPS = frozenset({"moe", "mlp", "feed_forward"})
_SIGNS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""Letters of `hybrid_override_pattern` (Nemotron-H)."""


def decoder(config: Config) -> dict[str, Any]:
    """The keys that describe the language model, whichever part of the config they are in."""
    merged = dict(config)
    for part in _PARTS:
        if isinstance(inner := config.get(part), Mapping):
            merged |= decoder(inner)
    for part in _ADDED_PARTS:
        if isinstance(inner := merged.get(part), Mapping):
            merged = {**inner, **merged}
    return _DEFAULTS.get(str(merged.get("model_type")), {}) | merged


def facts_from_config(config: Config, weights_bytes: int | None = None) -> ModelFacts:
    """Everything that planning needs to know of a model.

    Args:
        config: A published config.json.
        weights_bytes: Bytes of all safetensors files, where known; else as many as the parameters take.

    Raises:
        KeyError: A key that is needed is missing; the message names it.
        ValueError: It is no decoder language model of known shape.
    """
    if not isinstance(config, Mapping):
        raise ValueError("it is no mapping")  # noqa: TRY004 - what is wrong is the file, not the program
    text = decoder(config)
    names = _layer_names(text)
    layers = _find(text, "layers") or len(names) or _need(text, "layers")
    hidden, heads = _need(text, "hidden"), _need(text, "heads")
    kinds = _layer_kinds(text, names, layers)
    tied = text.get("tie_word_embeddings", text.get("tie_embedding"))
    architectures = config.get("architectures")
    fields: dict[str, Any] = {
        "architecture": str(architectures[0] if isinstance(architectures, list) and architectures else _type(text)),
        "layers": layers,
        "mlp_layers": kinds.get("mlp", 0),
        "cacheless_layers": kinds.get("cacheless", 0),
        "hidden_size": hidden,
        "intermediate_size": _mlp_size(text, hidden),
        "gated": _type(text) not in _UNGATED and text.get("mlp_hidden_act", text.get("hidden_act")) != "relu2",
        "attention_heads": heads,
        "kv_heads": _kv_heads(text, heads),
        "head_dim": _find(text, "head_dim") or hidden // heads,
        "global_kv_heads": text.get("num_global_key_value_heads"),
        "global_head_dim": text.get("global_head_dim"),
        "mla": _mla(text),
        "sliding": _sliding(text, kinds),
        "recurrent": _recurrent(text, kinds),
        "experts": _experts(text, names, layers),
        "vision": _vision(config),
        "vocab_size": _need(text, "vocab"),
        "max_positions": _positions(text),
        "dtype": _dtype(text),
        "tied_embeddings": _type(text) in _TIED if tied is None else bool(tied),
    }
    shape = ModelFacts(**fields, parameters=1, weights_bytes=1)
    if shape.full_layers < 0:
        raise ValueError(f"it has {layers} layers, and lists more than that")
    parameters = count_parameters(shape) + _other_parameters(text, shape)
    size = weights_bytes or parameters * WIDTH[shape.dtype]
    return shape.model_copy(update={"parameters": parameters, "weights_bytes": size})


def _other_parameters(text: Config, shape: ModelFacts) -> int:
    """What only some architectures have, and the count of all others does not know."""
    projection = shape.hidden_size * shape.attention_heads * shape.head_dim
    extra = _vision_parameters(shape.vision) if shape.vision else 0
    if text.get("attn_output_gate") or "linear_num_value_heads" in text:  # queries bring a gate of their own size
        extra += shape.attention_layers * projection
    if "block_configs" in text:  # layers without a cache have no attention at all
        share = 2 + 2 * shape.kv_heads / shape.attention_heads
        extra -= round(shape.cacheless_layers * projection * share)
    return extra


def _type(text: Config) -> str:
    return str(text.get("model_type", "unknown"))


def _dtype(text: Config) -> str:
    """Of what is not quantised. Where a config is silent, vLLM looks at the tensors: bfloat16 in any of today."""
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in WIDTH:
        raise ValueError(f"its dtype {dtype} is none of {', '.join(WIDTH)}")
    return dtype


def _find(text: Config, name: str) -> int | None:
    for key in _SPELLINGS[name]:
        value = text.get(key)
        if isinstance(value, list) and value:  # one number a layer: the largest decides
            value = max((item for item in value if isinstance(item, int)), default=0)
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
    for block in _blocks(text):  # Nemotron-NAS: all layers that attend have as many
        if isinstance(group := block["attention"].get("n_heads_in_group"), int):
            return heads // group
    return _find(text, "kv_heads") or heads


def _blocks(text: Config) -> list[Any]:
    """Layers of Nemotron-NAS, each described on its own."""
    blocks = text.get("block_configs")
    return [block for block in blocks if "attention" in block] if isinstance(blocks, list) else []


def _mlp_size(text: Config, hidden: int) -> int:
    """Of a layer without experts; the mean of Nemotron-NAS, whose layers differ."""
    if blocks := _blocks(text):
        return round(sum(2 / 3 * hidden * (block["ffn"].get("ffn_mult") or 0) for block in blocks) / len(blocks))
    return _find(text, "dense") or _find(text, "intermediate") or 4 * hidden


def _positions(text: Config) -> int:
    """As vLLM derives it: a factor counts where `max_position_embeddings` is that from before the stretching."""
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    positions = _need(text, "positions")
    if not isinstance(rope, Mapping) or _type(text).startswith("gemma3"):
        return positions
    kind, factor = rope.get("rope_type") or rope.get("type") or "default", rope.get("factor")
    if kind in _UNSCALED_ROPE or not isinstance(factor, int | float):
        return positions
    return int(positions * factor)


def _mla(text: Config) -> Mla | None:
    if not text.get("kv_lora_rank"):
        return None
    return Mla(
        kv_lora_rank=text["kv_lora_rank"],
        qk_rope_head_dim=text["qk_rope_head_dim"],
        qk_nope_head_dim=text["qk_nope_head_dim"],
        v_head_dim=text["v_head_dim"],
        q_lora_rank=text.get("q_lora_rank") or 0,
    )


def _layer_names(text: Config) -> list[str]:
    """The kind of each layer, where the config lists them."""
    names = text.get("layer_types") or text.get("layers_block_type") or text.get("block_types")
    if isinstance(names, list):
        return [str(name) for name in names]
    pattern = text.get("hybrid_override_pattern")
    return [_SIGNS.get(sign, sign) for sign in pattern] if isinstance(pattern, str) else []


def _layer_kinds(text: Config, names: list[str], layers: int) -> dict[str, int]:
    """How many layers are of which kind; all others look back over everything and have a cache."""
    kinds = {"sliding": _sliding_layers(text, names, layers), "recurrent": _recurrent_layers(text, names, layers)}
    if blocks := _blocks(text):
        attending = sum(isinstance(block["attention"].get("n_heads_in_group"), int) for block in blocks)
        return {**kinds, "cacheless": layers - attending}
    if names:
        shared = int(text.get("num_kv_shared_layers") or 0)  # the last ones use the cache of an earlier layer
        kept = names[: len(names) - shared]
        return {
            "sliding": sum(name in _LOCAL for name in kept),
            "recurrent": kinds["recurrent"],
            "mlp": sum(name in _MLPS for name in names),
            "cacheless": shared,
        }
    return kinds


def _recurrent_layers(text: Config, names: list[str], layers: int) -> int:  # noqa: PLR0911 - a line for each spelling
    if _type(text) in _PARALLEL:
        return layers
    if names:
        return sum(name in _RECURRENT for name in names)
    if isinstance(every := text.get("full_attention_interval"), int):
        return layers - layers // every
    if isinstance(period := text.get("attn_layer_period"), int):  # Jamba
        return layers - len(range(text.get("attn_layer_offset", 0), layers, period))
    if isinstance(attending := text.get("attn_layer_indices"), list):  # Bamba
        return layers - len(attending)
    if isinstance(linear := text.get("linear_attn_config"), Mapping):  # Kimi Linear
        return len(linear["kda_layers"])
    return 0


def _sliding_layers(text: Config, names: list[str], layers: int) -> int:
    if names:
        return sum(name in _LOCAL for name in names)
    if text.get("attention_chunk_size"):  # Llama 4: layers with positions look back within their chunk
        local = text.get("no_rope_layers")
        every = text.get("no_rope_layer_interval") or 4
        return sum(map(bool, local)) if isinstance(local, list) and local else layers - layers // every
    every = text.get("sliding_window_pattern") or _PATTERNS.get(_type(text))
    if isinstance(every, int) and every > 1 and text.get("sliding_window"):
        return layers - layers // every
    return layers if text.get("sliding_window") and text.get("use_sliding_window") is not False else 0


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
    hidden = _need(text, "hidden")
    width = WIDTH.get(str(text.get("mamba_ssm_dtype") or text.get("dtype") or text.get("torch_dtype")), 2)
    if "linear_num_value_heads" in text:  # gated delta network
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        convolved, kernel = 2 * keys + values, text["linear_conv_kernel_dim"]
        kept = values * text["linear_key_head_dim"]
        projected = 2 * keys + 3 * values + 2 * text["linear_num_value_heads"]
    elif isinstance(linear := text.get("linear_attn_config"), Mapping):  # Kimi delta attention: its state is float32
        inner = linear["num_heads"] * linear["head_dim"]
        convolved, kernel = 3 * inner, linear["short_conv_kernel_size"]
        kept, width, projected = inner * linear["head_dim"], 4, 4 * inner
    elif isinstance(kernel := text.get("conv_L_cache"), int):  # a short convolution alone (LFM2)
        convolved, kept, projected = text.get("conv_dim") or hidden, 0, 4 * hidden
    else:
        convolved, kernel, kept, projected = _mamba(text, hidden)
    return Recurrent(
        layers=kinds["recurrent"],
        state_bytes=convolved * (kernel - 1) * 2 + kept * width,
        parameters=hidden * projected,
        beside_attention=_type(text) in _PARALLEL,
    )


def _mamba(text: Config, hidden: int) -> tuple[int, int, int, int]:
    """Channels that are convolved, over how many tokens, numbers of the state, rows of the ways in and out."""
    heads = text.get("mamba_num_heads") or text.get("mamba_n_heads")
    state = text.get("ssm_state_size") or text.get("mamba_d_state") or text.get("state_size")
    kernel = text.get("conv_kernel") or text.get("mamba_d_conv") or 4
    if not isinstance(state, int):
        raise KeyError("ssm_state_size")
    inner = text.get("mamba_expand", 2) * hidden
    if not heads:  # Mamba 1
        return inner, kernel, inner * state, 3 * inner
    size = text.get("mamba_head_dim") or text.get("mamba_d_head")
    inner = heads * size if isinstance(size, int) else inner
    convolved = inner + 2 * (text.get("n_groups") or text.get("mamba_n_groups") or 1) * state
    return convolved, kernel, inner * state, 2 * inner + convolved + heads


def _experts(text: Config, names: list[str], layers: int) -> Experts | None:
    count = _find(text, "experts")
    if count is None or count < 2:  # noqa: PLR2004 - one expert is a plain MLP
        return None
    size = _find(text, "expert_size") or _need(text, "intermediate")
    keys = ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size")
    shared = next((text[key] for key in keys if text.get(key) is not None), None)
    number = text.get("n_shared_experts") or text.get("num_shared_experts") or _type(text).startswith("llama4")
    return Experts(
        count=count,
        active=min(count, _find(text, "active") or 1),
        layers=names.count("moe") or max(1, _expert_layers(text, layers)),
        intermediate_size=size,
        shared_intermediate_size=int(shared if shared is not None else number * size),
        latent_size=text.get("moe_latent_size") or 0,
    )


def _expert_layers(text: Config, layers: int) -> int:
    if isinstance(period := text.get("expert_layer_period"), int):  # Jamba
        return len(range(text.get("expert_layer_offset", 0), layers, period))
    dense = int(text.get("first_k_dense_replace") or 0) + len(text.get("mlp_only_layers") or ())
    every = text.get("interleave_moe_layer_step") or text.get("decoder_sparse_step") or text.get("moe_layer_freq") or 1
    return (layers - dense) // (every if isinstance(every, int) else 1)


def _vision(config: Config) -> Vision | None:
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping):
        return None
    depth, hidden = _find(tower, "layers") or tower.get("depth"), tower.get("embed_dim") or tower.get("hidden_size")
    if not isinstance(depth, int) or not isinstance(hidden, int):
        return None
    side, patch = tower.get("image_size"), tower.get("patch_size") or 14
    patches = max(1, side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) else ANY_RESOLUTION
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
