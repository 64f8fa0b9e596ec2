"""Speed is estimated as the formulas say, as well as is promised, and measured numbers go before estimates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import throughput_score
from infra import benchmarks
from infra.catalog import Gpu, gpus
from infra.catalog.efficiency import Efficiency, efficiency
from infra.findings import ConfigError
from infra.plan.model import SpeedPlan
from infra.plan.roofline import Engine
from infra.plan.throughput import Load, concurrency_within, estimate
from infra.weights.config_json import facts_from_config
from infra.weights.facts import Experts, Mla, ModelFacts, Recurrent, Sliding, Vision
from tests.unit.inputs import a_lock

LLAMA_8B = facts_from_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
)
TABLE = 128256 * 4096
MATRICES = 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336)
A100, H100, L40S = (gpus()[name] for name in ("a100-80gb", "h100-80gb", "l40s-48gb"))
TIMES = tuple(name for name in Efficiency.model_fields if name.endswith("_s") and name != "pcie_bytes_s")


def perfect(**changes: float) -> Efficiency:
    """GPUs do all that their data sheets say, and nothing takes time beside it."""
    values = dict.fromkeys(throughput_score.READING["priors"], 1.0)
    values |= dict.fromkeys(("kv_bandwidth_fa2", "eight_bit_flops", "weight_only_flops", "expert_flops"), 1.0)
    return throughput_score.changed(efficiency(), values | dict.fromkeys(TIMES, 1e-15) | changes)


def engine(
    facts: ModelFacts = LLAMA_8B, format_: str = "bf16", gpu: Gpu = H100, group: int = 1, **known: float
) -> Engine:
    return Engine(facts, format_, gpu, group, perfect(**known))


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-6, abs=1e-12)


# Matrices: reading, then arithmetic.


def test_one_token_reads_all_matrices_and_the_output_layer_once() -> None:
    assert engine().matrices_s(1, 1) == close((MATRICES + TABLE) * 2 / H100.bandwidth_bytes_s)
    assert engine(group=4).matrices_s(1, 1) == close((MATRICES + TABLE) / 2 / H100.bandwidth_bytes_s)
    assert engine(weights_bandwidth=0.5).matrices_s(1, 1) == close((MATRICES + TABLE) * 4 / H100.bandwidth_bytes_s)


def test_a_tied_output_layer_is_read_as_well() -> None:
    tied = LLAMA_8B.model_copy(update={"tied_embeddings": True, "parameters": LLAMA_8B.parameters - TABLE})
    assert engine(tied).matrices_s(1, 1) == close(engine().matrices_s(1, 1))


def test_a_vision_tower_is_not_read() -> None:
    vision = Vision.model_construct(layers=1)  # type: ignore[call-arg]
    seeing = LLAMA_8B.model_copy(update={"vision": vision, "parameters": LLAMA_8B.parameters + 10**9})
    assert engine(seeing).matrices_s(1, 1) == close(engine().matrices_s(1, 1))


def test_many_tokens_take_as_long_as_their_arithmetic() -> None:
    expected = 2 * MATRICES * 8192 / H100.flops["bf16"] + TABLE * 2 / H100.bandwidth_bytes_s
    assert engine().matrices_s(8192, 1) == close(expected)


@pytest.mark.parametrize(
    ("format_", "gpu", "bytes_each", "peak"),
    [
        ("fp8", H100, 1, H100.flops["fp8"]),
        ("w8a8-int8", H100, 1, H100.flops["int8"]),
        ("w8a8-int8", A100, 1, A100.flops["int8"]),
        ("fp8", A100, 1, A100.flops["bf16"]),
        ("w4a16", H100, 4.15625 / 8, H100.flops["bf16"]),
    ],
)
def test_formats(format_: str, gpu: Gpu, bytes_each: float, peak: int) -> None:
    reading = (MATRICES * bytes_each + TABLE * 2) / gpu.bandwidth_bytes_s
    assert engine(format_=format_, gpu=gpu).matrices_s(1, 1) == close(reading)
    arithmetic = 2 * MATRICES * 8192 / peak + TABLE * 2 / gpu.bandwidth_bytes_s
    assert engine(format_=format_, gpu=gpu).matrices_s(8192, 1) == close(arithmetic)


def test_weight_only_formats_are_fast_alone_and_slow_in_crowds() -> None:
    def steps(format_: str, tokens: int) -> float:
        return Engine(LLAMA_8B, format_, A100, 1, efficiency()).matrices_s(tokens, min(tokens, 256))

    assert steps("awq", 1) < 0.5 * steps("bf16", 1)
    assert steps("awq", 4096) > steps("bf16", 4096) > steps("w8a8-int8", 4096)


def test_a_format_that_does_not_run_is_refused() -> None:
    with pytest.raises(KeyError, match="mxfp4"):
        estimate(LLAMA_8B, "mxfp4", H100, 1, Load(100, 100, 1), efficiency())


# Experts.

MOE = LLAMA_8B.model_copy(
    update={"experts": Experts(count=64, active=8, layers=32, intermediate_size=1024), "intermediate_size": 0}
)
ROUTED = 32 * 64 * 3 * 4096 * 1024
MOE = MOE.model_copy(update={"parameters": MATRICES + 2 * TABLE + ROUTED})


@pytest.mark.parametrize(("tokens", "touched"), [(1, 8.0), (2, 15.0), (100_000, 64.0)])
def test_experts_that_a_batch_reads(tokens: int, touched: float) -> None:
    fast = H100.model_copy(update={"flops": {"bf16": 10**30}})  # so that only reading takes time
    dense = (MATRICES + TABLE) * 2
    assert engine(MOE, gpu=fast).matrices_s(tokens, 1) == close(
        (dense + ROUTED * 2 * touched / 64) / H100.bandwidth_bytes_s
    )


def test_a_token_is_multiplied_with_the_experts_it_goes_through() -> None:
    expected = 2 * (MATRICES + ROUTED / 8) * 8192 / H100.flops["bf16"] + TABLE * 2 / H100.bandwidth_bytes_s
    assert engine(MOE).matrices_s(8192, 1) == close(expected)


def test_experts_cost_more_than_their_arithmetic() -> None:
    plain, small = engine(MOE), engine(MOE, expert_flops=0.5, expert_layer_s=1.0)
    more = 2 * ROUTED / 8 * 8192 / H100.flops["bf16"] + 32
    assert small.matrices_s(8192, 1) - plain.matrices_s(8192, 1) == close(more)


# Attention.


@pytest.mark.parametrize(("group", "row"), [(1, 131_072), (4, 32_768), (8, 16_384), (16, 16_384)])
def test_cache_that_grouped_queries_read(group: int, row: int) -> None:
    assert engine(group=group).cache_read_bytes(1000) == close(row * 1000)


def test_cache_in_eight_bits_is_half_as_large() -> None:
    assert replace(engine(), kv_cache_dtype="fp8").cache_read_bytes(1000) == close(131_072 * 500)


@pytest.mark.parametrize("group", [1, 8])
def test_cache_that_mla_reads_is_not_divided(group: int) -> None:
    mla = Mla(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    facts = LLAMA_8B.model_copy(update={"mla": mla, "layers": 61, "attention_heads": 128})
    assert engine(facts, group=group).cache_read_bytes(1000) == close(61 * 576 * 2 * 1000)
    assert engine(facts, group=group).attention_flops(1000, decoding=True) == close(2 * 128 / group * 61 * 1088 * 1000)
    assert engine(facts, group=group).attention_flops(1000, decoding=False) == close(2 * 128 / group * 61 * 320 * 1000)


def test_cache_that_windows_and_states_read() -> None:
    sliding = LLAMA_8B.model_copy(update={"sliding": Sliding(layers=24, window=512)})
    assert engine(sliding).cache_read_bytes(1000) == close(4096 * (8 * 1000 + 24 * 512))
    assert engine(sliding).cache_read_bytes(100) == close(4096 * 32 * 100)
    assert engine(sliding).attention_flops(1000, decoding=False) == close(4 * 32 * 128 * (8 * 1000 + 24 * 512))
    hybrid = LLAMA_8B.model_copy(update={"recurrent": Recurrent(layers=24, state_bytes=1_000_000)})
    assert engine(hybrid, group=2).cache_read_bytes(1000) == close(2048 * 8 * 1000 + 24 * 1_000_000)


def test_layers_of_two_shapes() -> None:
    shapes = {"sliding": Sliding(layers=24, window=512), "global_kv_heads": 2, "global_head_dim": 512}
    mixed = LLAMA_8B.model_copy(update=shapes)
    assert engine(mixed).cache_read_bytes(1000) == close(4096 * (8 * 1000 + 24 * 512))
    assert engine(mixed).attention_flops(1000, decoding=False) == close(4 * 32 * (8 * 512 * 1000 + 24 * 128 * 512))


def test_attention_takes_as_long_as_its_arithmetic_if_that_is_longer() -> None:
    mla = Mla(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    facts = LLAMA_8B.model_copy(update={"mla": mla, "attention_heads": 128})
    found = engine(facts, attention_flops=0.1)
    arithmetic = 64 * 2 * 128 * 32 * 1088 * 1000 / (0.1 * H100.flops["bf16"])
    assert found.decode_step_s(64, 1000) - found.matrices_s(64, 64) == close(arithmetic)


def test_a_step_is_the_sum_of_its_operators() -> None:
    slow = engine(step_s=1.0, layer_s=0.1, sequence_s=0.01)
    reading = 64 * 131_072 * 1000 / H100.bandwidth_bytes_s
    assert slow.decode_step_s(64, 1000) == close(slow.matrices_s(64, 64) + reading + 1 + 32 * 0.1 + 64 * 0.01)


def test_older_gpus_read_the_cache_more_slowly() -> None:
    for gpu, share in ((H100, 1.0), (A100, 0.5), (L40S, 0.5)):
        found = engine(gpu=gpu, kv_bandwidth=1.0, kv_bandwidth_fa2=0.5)
        reading = 64 * 131_072 * 1000 / gpu.bandwidth_bytes_s / share
        assert found.decode_step_s(64, 1000) - found.matrices_s(64, 64) == close(reading)


# Tensor parallelism.


def test_all_reduces() -> None:
    assert engine().all_reduce_s(100) == 0
    moved = 2 * 3 / 4 * 100 * 4096 * 2
    assert engine(group=4).all_reduce_s(100) == close(64 * moved / 900e9)
    assert engine(group=4, gpu=L40S, pcie_bytes_s=1e9).all_reduce_s(100) == close(64 * moved / 1e9)
    assert engine(group=4, nvlink_latency_s=1.0).all_reduce_s(1) == pytest.approx(64, rel=1e-3)


# Prompts.


def test_a_prompt_alone_and_beside_others() -> None:
    seconds, steps = engine().prefill_s(20_000, 0, 0)
    attention = 20_000 * 4 * 32 * 128 * 32 * 10_000 / H100.flops["bf16"]
    assert steps == 3
    assert seconds == close(3 * engine().matrices_s(20_000 / 3, 1) + attention)
    beside, steps = engine().prefill_s(20_000, 0, 256)
    assert steps == 3
    assert [engine().prefill_s(8192, 0, others)[1] for others in (0, 1, 4096, 4097)] == [1, 2, 2, 3]
    # Weights are read once for both, so it adds its arithmetic and no more.
    assert beside < seconds


def test_steps_that_are_full_of_prompts() -> None:
    attention = 4 * 32 * 128 * 32 * 500 / H100.flops["bf16"]
    assert 1 / engine().prefill_tokens_s(1000, 0) == close(engine().matrices_s(8192, 1) / 8192 + attention)


def test_what_is_cached_is_not_read_again() -> None:
    cold, _ = engine().prefill_s(8000, 0, 0)
    warm, _ = engine().prefill_s(8000, 7000, 0)
    assert warm < cold / 4
    attention = 1000 * 4 * 32 * 128 * 32 * 7500 / H100.flops["bf16"]
    assert warm == close(engine().matrices_s(1000, 1) + attention)


@pytest.mark.parametrize(("gpu", "tokens"), [("h100-80gb", 8192), ("a100-80gb", 2048), ("l4-24gb", 2048)])
def test_tokens_of_a_step_are_as_vllm_chooses_them(gpu: str, tokens: int) -> None:
    assert engine(gpu=gpus()[gpu]).batched_tokens == tokens
    assert replace(engine(gpu=gpus()[gpu]), max_num_batched_tokens=512).batched_tokens == 512


# The steady state.


def speed(load: Load, gpu: Gpu = H100, group: int = 1, format_: str = "bf16") -> SpeedPlan:
    return estimate(LLAMA_8B, format_, gpu, group, load, efficiency())


def test_one_request_alone() -> None:
    found = Engine(LLAMA_8B, "bf16", H100, 1, efficiency())
    alone = speed(Load(1000, 101, 1))
    prefill, _ = found.prefill_s(1000, 0, 0)
    assert alone.tpot_s == close(found.decode_step_s(1, 1050.5))
    assert alone.ttft_s == close(efficiency().request_s.value + prefill)
    assert alone.output_tokens_s == close(101 / (alone.ttft_s + 100 * alone.tpot_s))
    assert alone.requests_s == close(alone.output_tokens_s / 101)
    assert not alone.measured
    assert alone.error_percent == efficiency().error_percent.value
    assert str(alone.error_percent) in alone.basis


LOADS = st.builds(Load, st.integers(1, 100_000), st.integers(1, 10_000), st.integers(1, 1024))


@given(LOADS, st.sampled_from(sorted(gpus())), st.sampled_from([1, 2, 8]), st.sampled_from(["bf16", "fp8", "awq"]))
def test_any_load_has_a_speed(load: Load, gpu: str, group: int, format_: str) -> None:
    found = estimate(LLAMA_8B, format_, gpus()[gpu], group, load, efficiency())
    numbers = [value for _, value in found if isinstance(value, float)]
    assert all(value > 0 and math.isfinite(value) for value in numbers)
    assert found.ttft_p95_s >= found.ttft_s
    assert found.tpot_p95_s >= found.tpot_s
    assert found.output_tokens_s == pytest.approx(found.requests_s * load.answer_tokens)
    # Little's law. More only where the queue for prompts is longer than it can get, and then tokens are no slower.
    there = found.requests_s * (found.ttft_s + (load.answer_tokens - 1) * found.tpot_s)
    assert there >= load.concurrency * 0.999


def test_more_at_once_is_more_in_all_and_less_for_each() -> None:
    loads = [speed(Load(1000, 500, count)) for count in (1, 2, 4, 8, 16, 32, 64, 128)]
    for few, many in itertools.pairwise(loads):
        assert many.output_tokens_s > few.output_tokens_s
        assert many.tpot_s > few.tpot_s
        assert many.ttft_p95_s > few.ttft_p95_s


def test_answers_of_one_token_come_as_fast_as_prompts_are_read() -> None:
    for prompt in (2, 100, 4000):
        found = speed(Load(prompt, 1, 64))
        assert found.requests_s * prompt <= found.prefill_tokens_s
        assert found.ttft_s == close(64 / found.requests_s)


def test_prompts_wait_for_prompts() -> None:
    found = Engine(LLAMA_8B, "bf16", H100, 1, efficiency())
    prefill, steps = found.prefill_s(8000, 0, 15)
    decode = found.decode_step_s(16, 8250)
    few, many = speed(Load(8000, 2000, 16)), speed(Load(8000, 500, 16))
    assert many.ttft_s - few.ttft_s > 0.1 * prefill
    assert many.ttft_p95_s - many.ttft_s > prefill
    assert many.tpot_p95_s > 1.05 * many.tpot_s
    # They wait for no more than are there.
    assert speed(Load(8000, 2, 2)).ttft_p95_s < efficiency().request_s.value + 2 * (prefill + steps * decode) + decode


def test_what_is_faster() -> None:
    load = Load(1000, 500, 32)
    assert speed(load, A100).output_tokens_s < speed(load, H100).output_tokens_s < speed(load, group=2).output_tokens_s
    assert speed(load, format_="fp8").output_tokens_s > speed(load).output_tokens_s
    assert speed(load, group=2).output_tokens_s < 2 * speed(load).output_tokens_s
    assert speed(Load(1000, 500, 32, cached_tokens=900)).output_tokens_s > speed(load).output_tokens_s


# Promises.


def within(load: Load, **promises: float | None) -> int:
    return concurrency_within(LLAMA_8B, "bf16", H100, 1, load, efficiency(), **promises)  # type: ignore[arg-type]


@given(st.integers(1, 20_000), st.integers(1, 2000), st.integers(1, 512), st.floats(0.001, 20.0), st.floats(0.001, 0.5))
def test_the_most_that_keeps_both_promises(prompt: int, answer: int, limit: int, ttft: float, tpot: float) -> None:
    def kept(count: int) -> bool:
        found = speed(Load(prompt, answer, count))
        return found.ttft_p95_s <= ttft and found.tpot_p95_s <= tpot

    count = within(Load(prompt, answer, limit), ttft_s=ttft, tpot_s=tpot)
    assert 0 <= count <= limit
    assert count == 0 or kept(count)
    assert count == limit or not kept(count + 1)


def test_promises_that_are_not_made_are_kept() -> None:
    load = Load(1000, 500, 300)
    assert within(load) == 300
    assert within(load, ttft_s=1e-9) == within(load, tpot_s=1e-9) == 0
    assert 0 < within(load, tpot_s=0.02) < 300
    assert within(load, ttft_s=None, tpot_s=0.02) == within(load, tpot_s=0.02)


# Measured numbers.


RECORD: dict[str, Any] = {
    "weights": "small",
    "gpu": "h100-80gb",
    "tensor_parallel_size": 1,
    "vllm_version": "0.32.0",
    "max_num_batched_tokens": 8192,
    "prompt_tokens": 1000,
    "answer_tokens": 200,
    "concurrency": 64,
    "output_tokens_s": 4000.0,
    "ttft_ms": 478.0,
    "ttft_p95_ms": 1100.0,
    "tpot_ms": 13.2,
    "tpot_p95_ms": 13.5,
    "date": "2026-11",
}


def recorded(path: Path, *records: Mapping[str, Any]) -> tuple[benchmarks.Benchmark, ...]:
    lines = ["benchmarks:"]
    for record in records:
        lines += [f"{'  - ' if first else '    '}{key}: {value}" for first, (key, value) in _marked(record)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return benchmarks.load(a_lock(), gpus(), "0.32.0", path)


def _marked(record: Mapping[str, Any]) -> list[tuple[bool, tuple[str, Any]]]:
    return [(number == 0, item) for number, item in enumerate(record.items())]


def test_a_measured_configuration_is_not_estimated(tmp_path: Path) -> None:
    known = recorded(tmp_path / "benchmarks.yaml", RECORD)
    facts, load = a_lock().models["small"].facts, Load(1000, 200, 64)
    found = estimate(facts, "bf16", H100, 1, load, efficiency(), known)
    assert found.measured
    assert found.error_percent == 0
    assert (found.output_tokens_s, found.requests_s) == (4000, 20)
    assert (found.ttft_s, found.ttft_p95_s) == (0.478, 1.1)
    assert (found.tpot_s, found.tpot_p95_s) == (0.0132, 0.0135)
    assert "small" in found.basis


@pytest.mark.parametrize(
    "other",
    [
        {"format_": "fp8"},
        {"gpu": gpus()["h200-141gb"]},
        {"tensor_parallel_size": 2},
        {"load": Load(1000, 200, 63)},
        {"load": Load(1000, 200, 64, cached_tokens=1)},
        {"facts": a_lock().models["small"].facts.model_copy(update={"layers": 31})},
        {"kv_cache_dtype": "fp8"},
        {"max_num_batched_tokens": 2048},
    ],
    ids=lambda other: next(iter(other)),
)
def test_anything_else_is_estimated(tmp_path: Path, other: dict[str, Any]) -> None:
    known = recorded(tmp_path / "benchmarks.yaml", RECORD)
    same: dict[str, Any] = {
        "facts": a_lock().models["small"].facts,
        "format_": "bf16",
        "gpu": H100,
        "tensor_parallel_size": 1,
        "load": Load(1000, 200, 64),
        "efficiency": efficiency(),
        "benchmarks": known,
    }
    assert estimate(**same).measured
    assert not estimate(**same | other).measured


def test_what_another_version_did_does_not_count(tmp_path: Path) -> None:
    assert recorded(tmp_path / "benchmarks.yaml", RECORD | {"vllm_version": "0.31.0"}) == ()


def test_the_file_may_be_missing_or_empty(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.yaml"
    assert benchmarks.load(a_lock(), gpus(), "0.32.0", path) == ()
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert benchmarks.load(a_lock(), gpus(), "0.32.0", path) == ()


@pytest.mark.parametrize(
    ("change", "where", "fix"),
    [
        ({"weights": "smal"}, "benchmarks.0.weights", "did you mean `small`?"),
        ({"gpu": "h100-80g"}, "benchmarks.0.gpu", "did you mean `h100-80gb`?"),
        ({"tpot": 13}, "benchmarks.0.tpot", "did you mean"),
        ({"concurrency": 0}, "benchmarks.0.concurrency", ""),
        ({"date": "yesterday"}, "benchmarks.0.date", ""),
    ],
)
def test_a_wrong_record_is_refused(tmp_path: Path, change: dict[str, Any], where: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        recorded(tmp_path / "benchmarks.yaml", RECORD | change)
    assert [finding.path for finding in refusal.value.findings] == [f"benchmarks.yaml: {where}"]
    assert fix in refusal.value.findings[0].fix


def test_a_record_without_a_number_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.yaml"
    with pytest.raises(ConfigError, match="ttft_ms: is missing"):
        recorded(path, {key: value for key, value in RECORD.items() if key != "ttft_ms"})
    path.write_text("benchmarks: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not YAML"):
        benchmarks.load(a_lock(), gpus(), "0.32.0", path)


# How good it is.


def test_every_constant_says_where_it_is_from() -> None:
    for name, constant in efficiency():
        assert constant.source, name
        if not name.endswith("_s") and name != "error_percent":
            assert 0 < constant.value <= 1, name


@pytest.fixture(scope="module")
def scored() -> list[throughput_score.Row]:
    table = throughput_score.default_table()
    if table is None:
        pytest.skip("needs the shared facts (vllm-throughput.csv), which are not in a user's clone")
    return [row for row in throughput_score.read(table) if row.group == "scored"]


def summaries(
    rows: list[throughput_score.Row], known: Mapping[str, Efficiency]
) -> dict[str, tuple[float, float, float]]:
    found = throughput_score.table(rows, lambda _: "all", lambda row: throughput_score.errors(row, known[row.source]))
    return {name: throughput_score.summary(errors) for name, errors in found["all"].items()}


def test_published_measurements_are_met(scored: list[throughput_score.Row]) -> None:
    assert len(scored) == 43
    found = summaries(scored, {row.source: efficiency() for row in scored})
    for name, bound in BOUNDS.items():
        assert found[name][0] <= bound, name


BOUNDS = {"tokens/s": 5, "TPOT": 5, "TTFT": 10}
"""Percent, half of the estimates."""


def test_the_stated_error_is_that_of_sources_that_were_left_out(scored: list[throughput_score.Row]) -> None:
    sources = {row.source for row in scored}
    without = {name: throughput_score.calibrate([row for row in scored if row.source != name]) for name in sources}
    median, p90, _ = summaries(scored, without)["tokens/s"]
    assert median <= 12
    assert math.ceil(p90) == efficiency().error_percent.value


def test_the_constants_are_those_that_calibration_finds(scored: list[throughput_score.Row]) -> None:
    best = throughput_score.calibrate(scored)
    for name in throughput_score.READING["priors"]:
        assert getattr(efficiency(), name).value == pytest.approx(getattr(best, name).value, rel=0.01), name
