"""Does it fit? Hand-computed cases, and the score on engines that really started."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fit_score import score
from infra.catalog.memory import GIB, memory_catalog
from infra.fit_csv import ADDED, predict_file
from infra.plan.fit import Engine, fit, illegal, largest_concurrency
from infra.plan.kv_cache import kv_cache, kv_width, row_bytes
from infra.plan.weights_memory import weights_bytes, weights_per_gpu
from infra.weights.config_json import facts_from_config
from infra.weights.facts import ModelFacts, expert_parameters
from infra.weights.lock import WeightsLock
from tests.shared import shared

CONFIGS = Path(__file__).parent / "fit" / "configs"
REGIME = memory_catalog().regime("0.32.0")
H100 = round(79.19 * GIB)


def facts(name: str, **changes: Any) -> ModelFacts:
    config = json.loads((CONFIGS / f"{name.replace('/', '__')}.json").read_text())
    return facts_from_config(config | changes)


LLAMA = facts("meta-llama/Llama-3.1-8B-Instruct")
GEMMA = facts("google/gemma-3-4b-it")
DEEPSEEK = facts("deepseek-ai/DeepSeek-R1")
HYBRID = facts("Qwen/Qwen3-Next-80B-A3B-Instruct")
GPT_OSS = facts("openai/gpt-oss-120b")


def engine(model: ModelFacts = LLAMA, **changes: Any) -> Engine:
    settings: dict[str, Any] = {
        "facts": model,
        "weights_bytes": model.weights_bytes,
        "gpu_bytes": H100,
        "utilization": 0.92,
        "context": 8192,
        "sequences": 64,
        "batched_tokens": 8192,
    }
    return Engine(**settings | changes)


# Parameters: as the publishers give them.


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03, 8.03),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62, 7.62),
        ("Qwen/Qwen3-0.6B", 0.60, 0.60),
        ("deepseek-ai/DeepSeek-R1", 671.0, 37.5),
        ("moonshotai/Kimi-K2-Thinking", 1026.0, 32.0),
        ("openai/gpt-oss-20b", 20.9, 3.6),
        ("openai/gpt-oss-120b", 116.8, 5.1),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 79.7, 3.5),
    ],
)
def test_parameters_are_counted_as_published(name: str, billions: float, active: float) -> None:
    model = facts(name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    # Publishers count with or without embeddings.
    used = model.parameters - expert_parameters(model)
    used += expert_parameters(model, model.experts.active) if model.experts else 0
    assert used / 1e9 == pytest.approx(active, abs=0.15 * active + 0.6)


# KV cache.


@pytest.mark.parametrize(
    ("model", "kv_dtype", "tensor_parallel_size", "expected"),
    [
        # GQA: 2 x 8 KV heads x 128 x 2 bytes, of one layer.
        (LLAMA, "auto", 1, 4096),
        (LLAMA, "fp8", 1, 2048),
        (LLAMA, "auto", 2, 2048),
        (LLAMA, "auto", 8, 512),
        # 8 KV heads among 16 GPUs: each has one, and it is there twice.
        (LLAMA, "auto", 16, 512),
        # MQA: one KV head stays one.
        (facts("meta-llama/Llama-3.1-8B-Instruct", num_key_value_heads=1), "auto", 8, 512),
        # MHA: 32 heads.
        (facts("meta-llama/Llama-3.1-8B-Instruct", num_key_value_heads=32), "auto", 1, 16384),
        # MLA: 512 + 64 numbers of 2 bytes, whole on every GPU.
        (DEEPSEEK, "auto", 1, 1152),
        (DEEPSEEK, "auto", 8, 1152),
    ],
)
def test_what_a_token_leaves_in_a_layer(
    model: ModelFacts, kv_dtype: str, tensor_parallel_size: int, expected: int
) -> None:
    assert row_bytes(model, kv_width(model.dtype, kv_dtype), tensor_parallel_size) == expected


@pytest.mark.parametrize(
    ("model", "tensor_parallel_size", "per_token"),
    [
        (LLAMA, 1, 32 * 4096),  # 128 KiB
        (DEEPSEEK, 8, 61 * 1152),  # 70,272 bytes, as a Kimi-K2 of 61 layers printed
        (GEMMA, 1, 5 * 2 * 4 * 256 * 2),  # of 34 layers 5 look back over everything
        (HYBRID, 2, 12 * 1024),  # of 48 layers 12 are attention, one KV head a GPU
    ],
)
def test_what_one_more_token_costs(model: ModelFacts, tensor_parallel_size: int, per_token: int) -> None:
    assert kv_cache(model, 2, tensor_parallel_size).token_bytes == per_token


def test_a_hybrid_s_block_grows_until_a_state_goes_into_it() -> None:
    # vLLM 0.10.2 printed: block of 544 tokens, 973,760 tokens and 14.77 x 262,144 in 44.59 GiB at TP 2.
    cache = kv_cache(HYBRID, 2, 2, state_blocks=1)
    pool = round(44.59 * GIB)
    assert cache.block_tokens == 544
    assert cache.tokens(pool, 262_144, 8192, by_group=True) == 973_760
    assert cache.concurrency(pool, 262_144, 8192) == pytest.approx(14.77, abs=0.01)


def test_a_sliding_window_saves_concurrency_not_printed_tokens() -> None:
    # gpt-oss-120b printed 2,640,144 tokens and 284.25 x 16,384 (batches of 2,048): 18 layers of each kind.
    cache = kv_cache(GPT_OSS, 2)
    pool = 2_640_144 // 16 * 2 * cache.block_bytes
    assert cache.tokens(pool, 16_384, 2048, by_group=True) == 2_640_144
    assert cache.concurrency(pool, 16_384, 2048) == pytest.approx(284.25, abs=0.01)


def test_unequal_kinds_of_layers_are_padded_to_equal_groups() -> None:
    # gemma-3-27b: 62 layers, every sixth looks back over everything: 10 and 52, so 7 groups of 10.
    text = {"num_hidden_layers": 62, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024}
    config = json.loads((CONFIGS / "google__gemma-3-4b-it.json").read_text())
    model = facts_from_config(config | {"text_config": config["text_config"] | text})
    assert len(kv_cache(model, 2).groups) == 7
    assert kv_cache(model, 2).block_bytes == 10 * 16 * 2 * 16 * 128 * 2


# Weights.


@pytest.mark.parametrize(
    ("format_", "tensor_parallel_size", "gib"),
    [("bf16", 1, 14.99), ("bf16", 2, 7.51), ("bf16", 4, 3.77), ("fp8", 1, 8.49), ("w4a16", 1, 5.38)],
)
def test_weights_of_llama_8b_as_logs_have_them(format_: str, tensor_parallel_size: int, gib: float) -> None:
    size = weights_bytes(LLAMA, format_, stored=format_ == "bf16")
    assert weights_per_gpu(LLAMA, size, tensor_parallel_size) / GIB == pytest.approx(gib, rel=0.01)


def test_of_a_pipeline_the_stage_with_a_table_is_the_largest() -> None:
    assert weights_per_gpu(LLAMA, LLAMA.weights_bytes, 1, 4) / GIB == pytest.approx(4.26, rel=0.01)


# Legality.


@pytest.mark.parametrize(
    ("name", "tensor_parallel_size", "legal"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8, True),
        ("meta-llama/Llama-3.1-8B-Instruct", 16, True),
        ("meta-llama/Llama-3.1-8B-Instruct", 3, False),
        ("meta-llama/Llama-3.1-8B-Instruct", 64, False),
        ("Qwen/Qwen2.5-7B-Instruct", 4, True),
        ("Qwen/Qwen2.5-7B-Instruct", 7, False),
        ("Qwen/Qwen2.5-7B-Instruct", 8, False),
        ("Qwen/Qwen3-14B-AWQ", 5, False),
        ("deepseek-ai/DeepSeek-R1", 8, True),
    ],
)
def test_tensor_parallel_sizes(name: str, tensor_parallel_size: int, *, legal: bool) -> None:
    assert (illegal(facts(name), tensor_parallel_size, 2048) == "") is legal


def test_a_context_over_the_model_s_maximum_is_illegal() -> None:
    assert illegal(LLAMA, 1, 131_072) == ""
    assert "131072" in illegal(LLAMA, 1, 131_073)


# Fit.


def test_the_terms_add_up_to_the_budget() -> None:
    found = fit(engine(), REGIME)
    terms = found.weights_bytes + found.activation_bytes + found.non_torch_bytes + found.graph_bytes + found.pool_bytes
    assert terms == round(0.92 * H100)
    assert not found.misfit


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"utilization": 0.2}, "more than vLLM may use"),
        ({"utilization": 0.25, "context": 131_072}, "one request of 131072 tokens needs 16.00 GiB"),
        ({"tensor_parallel_size": 3}, "attention heads"),
        ({"context": 200_000}, "131072 tokens, not 200000"),
    ],
)
def test_a_misfit_says_why(changes: dict[str, Any], why: str) -> None:
    assert why in fit(engine(**changes), REGIME).misfit


def test_a_hybrid_needs_a_block_of_state_for_each_sequence() -> None:
    tight = engine(HYBRID, gpu_bytes=round(139.8 * GIB), tensor_parallel_size=2, utilization=0.585, context=4096)
    assert not fit(tight, REGIME).misfit
    many = fit(engine(HYBRID, **(vars(tight) | {"sequences": 4000, "facts": HYBRID})), REGIME).misfit
    assert "state block" in many or "more than vLLM may use" in many


@given(
    context=st.integers(128, 131_072),
    sequences=st.integers(1, 1024),
    tensor_parallel_size=st.sampled_from([1, 2, 4, 8]),
    utilization=st.floats(0.3, 0.97),
)
def test_more_memory_never_holds_less(
    context: int, sequences: int, tensor_parallel_size: int, utilization: float
) -> None:
    small = engine(
        context=context, sequences=sequences, tensor_parallel_size=tensor_parallel_size, utilization=utilization
    )
    large = Engine(**vars(small) | {"gpu_bytes": 2 * H100})
    assert fit(large, REGIME).kv_tokens >= fit(small, REGIME).kv_tokens
    assert largest_concurrency(large, context, REGIME) >= largest_concurrency(small, context, REGIME)


# The command.


def write(path: Path, **row: str) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, row)
        writer.writeheader()
        writer.writerow(row)


def predicted(tmp_path: Path, **row: str) -> dict[str, str]:
    write(tmp_path / "in.csv", **row)
    predict_file(tmp_path / "in.csv", tmp_path / "out.csv", CONFIGS, WeightsLock(models={}))
    with (tmp_path / "out.csv").open(newline="") as stream:
        (answer,) = csv.DictReader(stream)
    return answer


def test_a_row_is_kept_and_gets_predictions(tmp_path: Path) -> None:
    answer = predicted(tmp_path, id="x", model="meta-llama/Llama-3.1-8B-Instruct", gpu="H100 80GB", vllm_version="0.32")
    assert answer["id"] == "x"
    assert set(ADDED) < set(answer)
    assert answer["predicted_outcome"] == "ok"
    assert float(answer["predicted_max_concurrency"]) == pytest.approx(3.5, abs=0.1)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"model": "", "gpu": "H100"}, "not named"),
        ({"model": "nobody/nothing", "gpu": "H100"}, "no config of it"),
        ({"model": "meta-llama/Llama-3.1-8B-Instruct", "gpu": "Abacus 3000"}, "memory of the GPU"),
    ],
)
def test_a_row_that_cannot_be_predicted_says_why(tmp_path: Path, row: dict[str, str], why: str) -> None:
    answer = predicted(tmp_path, **row)
    assert why in answer["predicted_note"]
    assert not answer["predicted_outcome"]


def test_a_card_that_is_too_small_is_taken_for_one_of_several(tmp_path: Path) -> None:
    row = {"model": "unsloth/Llama-3.1-70B-Instruct", "gpu": "H100", "max_model_len": "4096", "vllm_version": "0.31"}
    assert "taken to be 2" in predicted(tmp_path, **row)["predicted_note"]
    assert predicted(tmp_path, **row, tp="1")["predicted_outcome"] == "misfit"


def test_a_format_in_the_name_counts(tmp_path: Path) -> None:
    row = {"gpu": "H100", "max_model_len": "4096", "vllm_version": "0.31"}
    plain = predicted(tmp_path, **row, model="Llama-3.1-8B-Instruct")
    eight = predicted(tmp_path, **row, model="someone/Llama-3.1-8B-Instruct-FP8")
    assert float(eight["predicted_weights_gib"]) == pytest.approx(8.49, abs=0.05)
    assert float(plain["predicted_weights_gib"]) == pytest.approx(14.99, abs=0.05)
    assert "does not say how" in predicted(tmp_path, **row, model="Llama-3.1-8B-Instruct (quantised)")["predicted_note"]


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("tp", "0", "tp is 0, not a whole number over 0"),
        ("tp", "0.5", "tp is 0.5, not a whole number"),
        ("tp", "inf", "tp is inf"),
        ("max_model_len", "8,192", "max_model_len is 8,192"),
        ("gpu_mem_gib", "much", "gpu_mem_gib is much, not a number over 0"),
        ("gpu_memory_utilization", "95", "a share of at most 1, not 95"),
    ],
)
def test_a_number_that_cannot_be_is_said_not_guessed(tmp_path: Path, column: str, value: str, why: str) -> None:
    row = {"model": "meta-llama/Llama-3.1-8B-Instruct", "gpu": "H100", column: value}
    answer = predicted(tmp_path, **row)
    assert why in answer["predicted_note"]
    assert not answer["predicted_outcome"]


def table(tmp_path: Path, text: str, configs: Path = CONFIGS) -> list[dict[str, str]]:
    (tmp_path / "in.csv").write_bytes(text.encode())
    predict_file(tmp_path / "in.csv", tmp_path / "out.csv", configs, WeightsLock(models={}))
    with (tmp_path / "out.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_tables_from_spreadsheets_are_read(tmp_path: Path) -> None:
    name = "meta-llama/Llama-3.1-8B-Instruct"
    rows = table(tmp_path, f"\ufeffmodel,gpu,tp\r\n{name},A100\r\n\r\n{name},H100,1,what,is,this\r\n{name}\r\n")
    assert [row["predicted_outcome"] for row in rows] == ["ok", "ok", ""]
    assert "the memory of the GPU is not known" in rows[2]["predicted_note"]


@pytest.mark.parametrize("size", ['{"total_bytes": 9000000000}', "9000000000", '{"metadata": {"total_size": 9e9}}'])
def test_sizes_of_checkpoints_in_three_shapes(tmp_path: Path, size: str) -> None:
    config = (CONFIGS / "meta-llama__Llama-3.1-8B-Instruct.json").read_text()
    (tmp_path / "a__b.json").write_text(config)
    (tmp_path / "a__b.size.json").write_text(size)
    (tmp_path / "a__broken.json").write_text("{")
    (tmp_path / "a__wide.json").write_text(json.dumps(json.loads(config) | {"torch_dtype": "float32"}))
    (tmp_path / "a__wide.size.json").write_text("18000000000")
    rows = table(tmp_path, "model,gpu\na/b,H100\na/broken,H100\na/wide,H100\n", tmp_path)
    assert float(rows[0]["predicted_weights_gib"]) == pytest.approx(9e9 / GIB, abs=0.05)
    # One file that cannot be read does not spoil the table.
    assert "a__broken.json cannot be read as a model's config" in rows[1]["predicted_note"]
    # 32 bits in the checkpoint, 16 in the engine: `--dtype auto`.
    assert float(rows[2]["predicted_weights_gib"]) == pytest.approx(9e9 / GIB, abs=0.05)
    assert int(rows[2]["predicted_kv_bytes_per_token"]) == 32 * 4096


def test_the_number_of_parameters_is_no_size(tmp_path: Path) -> None:
    (tmp_path / "a__b.json").write_text((CONFIGS / "Qwen__Qwen3-32B-AWQ.json").read_text())
    (tmp_path / "a__b.size.json").write_text(
        '{"metadata": {"total_parameters": 32000000000, "total_size": 19300000000}}'
    )
    (row,) = table(tmp_path, "model,gpu\na/b,H100\n", tmp_path)
    assert float(row["predicted_weights_gib"]) == pytest.approx(19.3e9 / GIB, abs=0.05)


def test_what_came_out_is_not_read(tmp_path: Path) -> None:
    row = {"model": "meta-llama/Llama-3.1-8B-Instruct", "gpu": "L4", "max_model_len": "8192", "vllm_version": "0.31"}
    lies = {"weights_gib": "1", "kv_available_gib": "70", "kv_tokens": "9", "outcome": "misfit", "note": "V0; OOM"}
    honest, lying = predicted(tmp_path, **row), predicted(tmp_path, **row, **lies)
    assert {name: honest[name] for name in ADDED} == {name: lying[name] for name in ADDED}


def test_known_engines_are_predicted_well() -> None:
    found = score(shared("facts/vllm-memory-train.csv"), CONFIGS)
    assert found.median <= 0.01
    assert found.p90 <= 0.22
    # m128, m143, m146, m195: other processes held memory. m132, m231: not understood.
    assert set(found.missed) <= {"m128", "m132", "m143", "m146", "m195", "m231"}
    # m177 does not say its context: vLLM's default would not have fitted.
    assert set(found.false_alarms) <= {"m177"}
