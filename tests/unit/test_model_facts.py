"""Facts of models from their config.json: shapes as published, bytes of a token worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from infra.fit_models import checkpoint_format
from infra.plan.kv_cache import kv_cache
from infra.weights.config_json import facts_from_config

HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LLAMA = {
    **HEADS,
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}
GEMMA_3 = {  # the text_config of gemma-3-12b-it has no head_dim, vocabulary or context: its class has
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
LLAMA_4 = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "attention_chunk_size": 8192,
        "no_rope_layers": [],
        "interleave_moe_layer_step": 1,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384,
        "num_hidden_layers": 48,
        **HEADS,
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "vocab_size": 202_048,
        "max_position_embeddings": 10_485_760,
    },
}
NEMOTRON_H = {
    "model_type": "nemotron_h",
    **HEADS,
    "hidden_size": 4480,
    "intermediate_size": 15_680,
    "num_attention_heads": 40,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "mamba_head_dim": 80,
    "mamba_num_heads": 128,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "mlp_hidden_act": "relu2",
    "vocab_size": 131_072,
    "max_position_embeddings": 131_072,
}
NEMOTRON_3 = {
    **NEMOTRON_H,
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_head_dim": 64,
    "mamba_num_heads": 64,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
}
JAMBA = {
    **LLAMA,
    "model_type": "jamba",
    "vocab_size": 65_536,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
FALCON_H1 = {
    **LLAMA,
    "model_type": "falcon_h1",
    "num_hidden_layers": 44,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "hidden_size": 3072,
    "intermediate_size": 12_288,
    "vocab_size": 130_048,
    "mamba_d_conv": 4,
    "mamba_d_head": 128,
    "mamba_d_ssm": 3072,
    "mamba_d_state": 256,
    "mamba_n_groups": 1,
    "mamba_n_heads": 24,
}
KIMI_LINEAR = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [layer for layer in range(1, 28) if layer not in {4, 8, 12, 16, 20, 24, 27}],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
    "moe_intermediate_size": 1024,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 163_840,
    "model_max_length": 1_048_576,
}
DBRX = {
    "model_type": "dbrx",
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "max_seq_len": 32_768,
    "attn_config": {"kv_n_heads": 8, "model_type": ""},
    "ffn_config": {"ffn_hidden_size": 10_752, "moe_num_experts": 16, "moe_top_k": 4},
    "vocab_size": 100_352,
}
LFM2 = {
    **LLAMA,
    "model_type": "lfm2",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "vocab_size": 65_536,
    "conv_L_cache": 3,
    "layer_types": ["full_attention" if layer in {2, 5, 8, 10, 12, 14} else "conv" for layer in range(16)],
}
NAS = {  # Llama-3.3-Nemotron-Super: 49 of its 80 layers attend
    **LLAMA,
    "model_type": "nemotron-nas",
    "hidden_size": 8192,
    "intermediate_size": None,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": None,
    "block_configs": [
        {"attention": {"n_heads_in_group": 8 if layer < 49 else None}, "ffn": {"ffn_mult": 5.25 if layer < 49 else 1.0}}
        for layer in range(80)
    ],
}
GEMMA_3N = {  # of 35 layers the last 15 use the cache of an earlier one
    "model_type": "gemma3n",
    "text_config": {
        **LLAMA,
        "model_type": "gemma3n_text",
        "hidden_size": 2048,
        "intermediate_size": [16_384] * 35,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_kv_shared_layers": 15,
        "sliding_window": 512,
        "layer_types": ([*["sliding_attention"] * 4, "full_attention"]) * 7,
    },
}


@pytest.mark.parametrize(
    ("config", "token_bytes", "billions"),
    [
        (LLAMA, 32 * 2 * 8 * 128 * 2, 8.03),
        ({**LLAMA, "num_key_value_heads": 32}, 32 * 2 * 32 * 128 * 2, 8.84),
        ({**LLAMA, "num_key_value_heads": None, "multi_query": True}, 32 * 2 * 1 * 128 * 2, 7.79),
        (GEMMA_3, 8 * 2 * 8 * 256 * 2, 11.77),  # every sixth of 48 layers; 12.2 with its encoder of pictures
        (LLAMA_4, 12 * 2 * 8 * 128 * 2, 107.8),  # every fourth
        (NEMOTRON_H, 4 * 2 * 8 * 128 * 2, 8.89),
        (NEMOTRON_3, 6 * 2 * 2 * 128 * 2, 31.6),
        (JAMBA, 4 * 2 * 8 * 128 * 2, 51.6),
        (FALCON_H1, 44 * 2 * 2 * 128 * 2, 7.59),  # every layer attends, and has a state beside it
        (KIMI_LINEAR, 7 * (512 + 64) * 2, 49.1),
        (DBRX, 40 * 2 * 8 * 128 * 2, 132.0),
        (LFM2, 6 * 2 * 8 * 64 * 2, 1.17),
        (NAS, 49 * 2 * 8 * 128 * 2, 49.9),
        (GEMMA_3N, 4 * 2 * 2 * 256 * 2, None),  # the full ones of the first 20
    ],
)
def test_a_token_in_every_kind_of_model(config: dict[str, Any], token_bytes: int, billions: float | None) -> None:
    facts = facts_from_config(config)
    assert kv_cache(facts, 2).token_bytes == token_bytes
    if billions is not None:
        assert facts.parameters / 1e9 == pytest.approx(billions, rel=0.035)


def test_a_layer_with_attention_and_a_state_has_both_in_the_cache() -> None:
    facts = facts_from_config(FALCON_H1)
    assert facts.recurrent is not None
    # Convolution: 3 tokens of 3,072 + 2 x 256 channels; state: 24 heads x 128 x 256.
    assert facts.recurrent.state_bytes == 3 * (3072 + 512) * 2 + 24 * 128 * 256 * 2
    groups = kv_cache(facts, 2).groups
    assert [group.block_tokens for group in groups] == [1568, 0]


def test_stretched_positions_are_counted_once() -> None:
    assert facts_from_config(GEMMA_3).max_positions == 131_072
    yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    assert facts_from_config({**LLAMA, "rope_scaling": yarn}).max_positions == 131_072
    assert facts_from_config({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}).max_positions == 262_144


def test_numbers_are_of_16_bits_where_a_config_does_not_say() -> None:
    silent = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    assert facts_from_config(silent).dtype == "bfloat16"


GROUP = {"weights": {"num_bits": 4, "type": "int"}}


@pytest.mark.parametrize(
    ("quantization", "format_"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": {"a": GROUP}}, "w4a16"),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "sparsity_config": {"format": "dense"}}, ""),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 8}, "w8a16"),
        ({"quant_method": "auto-round", "bits": 4}, "w4a16"),
        ({"quant_method": "moe_wna16", "bits": 4}, "w4a16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bnb-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "w8a16"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "w4a16"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "w4a16"),
        ("awq", "awq"),
    ],
)
def test_formats_of_quantised_checkpoints(quantization: Any, format_: str) -> None:
    assert checkpoint_format({"quantization_config": quantization}, "model") == format_
