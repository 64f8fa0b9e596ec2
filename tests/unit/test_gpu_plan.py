"""Fleets on GPUs: what is chosen, what is refused, and that what a refusal proposes is then accepted."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from ruamel.yaml import YAML

from infra import weights
from infra.catalog import gpus, instances
from infra.config import parse
from infra.findings import ConfigError
from infra.plan import make_plan
from infra.plan.entries import Served, served
from infra.plan.model import ChoicePlan, FleetPlan
from infra.plan.throughput import Benchmark, Load

LOCK = weights.load()
SMALLEST = {"target": "aws", "models": {"llama-3.1-8b-instruct": {}}}


def planned(config: dict[str, Any], region: str = "us-east-1", **options: Any) -> FleetPlan:
    return make_plan("test", parse(copy.deepcopy(config)).in_region(region), LOCK, None, {}, **options)


def refused(config: dict[str, Any], region: str = "us-east-1") -> dict[str, tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        planned(config, region)
    return {finding.path: (finding.problem, finding.fix) for finding in caught.value.findings}


def one(model: dict[str, Any], **pool: Any) -> dict[str, Any]:
    """A stack with one model `chat`, in the pool `p` if there is something to say of it."""
    config: dict[str, Any] = {"target": "aws", "models": {"chat": {"weights": "llama-3.1-8b-instruct", **model}}}
    return config | ({"pools": {"p": pool}} if pool else {})


def chosen(plan: FleetPlan, model: str = "chat") -> ChoicePlan:
    return next(choice for choice in plan.choices if choice.model == model and choice.chosen)


# What is chosen.


def test_a_target_and_a_model_are_a_stack() -> None:
    plan = planned(SMALLEST)
    (engines,) = plan.engine_sets
    assert engines.engines == 2
    assert plan.pools[0].nodes == 2
    assert plan.aws is not None
    assert plan.kubernetes is None
    assert plan.cost is not None
    assert plan.engines == ()


def test_the_chosen_one_costs_least_of_those_that_are_allowed() -> None:
    plan = planned(one({"quantization": "auto"}))
    best = chosen(plan)
    others = [choice for choice in plan.choices if not choice.chosen and choice.usd_per_mtok is not None]
    assert others
    assert best.usd_per_mtok is not None
    assert all(choice.usd_per_mtok is None or choice.usd_per_mtok >= best.usd_per_mtok for choice in others)


def test_others_are_shown_with_the_reason_why_they_lost() -> None:
    plan = planned(one({}, gpu="a100-80gb"))
    others = [choice for choice in plan.choices if not choice.chosen]
    assert len(others) == 3
    assert all(choice.verdict for choice in others)
    assert any("the pool has a100-80gb" in choice.verdict for choice in others)


@pytest.mark.parametrize(
    ("gpu", "level", "expected"),
    [
        ("h100-80gb", "8bit", "fp8"),
        ("l40s-48gb", "8bit", "fp8"),
        ("a100-80gb", "8bit", "w8a8-int8"),
        ("a10g-24gb", "8bit", "w8a8-int8"),
        ("h100-80gb", "none", "bf16"),
    ],
)
def test_a_level_becomes_the_format_that_the_gpu_runs_best(gpu: str, level: Any, expected: str) -> None:
    found = served("llama-3.1-8b-instruct", level, gpus()[gpu], LOCK)
    assert isinstance(found, Served)
    assert found.format == expected
    assert not found.online


def test_fp8_is_made_by_the_engine_where_the_lock_has_no_checkpoint() -> None:
    lock = weights.WeightsLock(models={"base": LOCK.models["llama-3.1-8b-instruct"]})
    assert served("base", "8bit", gpus()["h100-80gb"], lock) == Served("base", "fp8", online=True)
    # Weights alone on a GPU without FP8: still made by the engine, as INT8 would need a checkpoint.
    assert served("base", "8bit", gpus()["a100-80gb"], lock) == Served("base", "fp8", online=True)
    assert "no 4bit entry" in str(served("base", "4bit", gpus()["h100-80gb"], lock))


def test_bf16_is_recommended_where_it_fits_and_is_faster() -> None:
    plan = planned(one({"quantization": "4bit", "context": 4096}, gpu="a100-80gb"))
    assert any("quantization: none" in notice.message for notice in plan.notices)


def test_several_models_share_nodes() -> None:
    config = one({"engines": 4}, gpu="h100-80gb", instance="p5.48xlarge")
    config["models"]["big"] = {
        "weights": "llama-3.3-70b-instruct",
        "quantization": "8bit",
        "tensor-parallel-size": 4,
        "engines": 1,
        "concurrency": 8,
    }
    (pool,) = planned(config).pools
    assert pool.nodes == 1
    assert sorted(slot.model for slot in pool.slots) == ["big", *["chat"] * 4]
    used = [gpu for slot in pool.slots for gpu in slot.gpus]
    assert sorted(used) == sorted(set(used))


def test_an_engine_never_leaves_its_domain() -> None:
    for name, row in instances().items():
        if row.gpus_per_domain < row.gpus:
            plan = planned(one({"tensor-parallel-size": row.gpus_per_domain, "quantization": "8bit"}, instance=name))
            for slot in plan.pools[0].slots:
                assert len({gpu // row.gpus_per_domain for gpu in slot.gpus}) == 1


def test_flags_say_what_was_planned() -> None:
    model = {"context": 16384, "concurrency": 32, "kv-cache-dtype": "fp8", "quantization": "8bit", "sleep": True}
    (engines,) = planned(one(model, gpu="h100-80gb")).engine_sets
    flags = dict(zip(engines.flags[::2], engines.flags[1::2], strict=False))
    assert flags["--max-model-len"] == "16384"
    assert flags["--max-num-seqs"] == "32"
    assert flags["--kv-cache-dtype"] == "fp8"
    assert flags["--gpu-memory-utilization"] == "0.92"
    assert "--enable-sleep-mode" in engines.flags


def test_traffic_decides_how_many_engines_there_are() -> None:
    few = planned(one({"traffic": {"requests-per-month": 100_000}}, gpu="h100-80gb")).engine_sets[0]
    many = planned(one({"traffic": {"requests-per-month": 400_000_000}}, gpu="h100-80gb")).engine_sets[0]
    assert few.engines == 2
    assert many.engines > 2
    # Half of what they can do is left for the busiest hours.
    assert many.engines * many.speed.requests_s * 730 * 3600 >= 1.9 * 400_000_000


def test_a_promise_lowers_the_concurrency() -> None:
    model = {"tensor-parallel-size": 1}
    loose = planned(one(model, gpu="h100-80gb"))
    tight = planned(one(model, gpu="h100-80gb") | {"slo": {"tpot_p95": "12ms"}})
    assert tight.models[0].concurrency < loose.models[0].concurrency
    assert tight.engine_sets[0].speed.tpot_p95_s <= 0.012


def test_a_promise_that_is_missed_is_said() -> None:
    plan = planned(one({"concurrency": 64}, gpu="a10g-24gb") | {"slo": {"tpot_p95": "5ms"}})
    assert any("tpot_p95 5 ms" in notice.message for notice in plan.notices)


def test_what_was_measured_stands_before_what_is_estimated() -> None:
    config = one({"context": 4096, "concurrency": 64, "tensor-parallel-size": 1}, gpu="h100-80gb")
    estimated = planned(config).engine_sets[0].speed
    record = Benchmark(
        name="ours",
        facts=LOCK.models["llama-3.1-8b-instruct"].facts,
        format_="bf16",
        gpu=gpus()["h100-80gb"],
        tensor_parallel_size=1,
        kv_cache_dtype="auto",
        max_num_batched_tokens=8192,
        load=Load(1155, 211, 64),
        output_tokens_s=1234.0,
        ttft_s=0.1,
        ttft_p95_s=0.2,
        tpot_s=0.01,
        tpot_p95_s=0.02,
    )
    measured = planned(config, benchmarks=(record,)).engine_sets[0].speed
    assert not estimated.measured
    assert measured.measured
    assert measured.output_tokens_s == 1234.0
    assert "ours" in measured.basis


# What a plan costs to make.


def test_a_plan_does_not_grow_with_its_nodes() -> None:
    config = one({"engines": 1}, gpu="h100-80gb", instance="p5.4xlarge")
    large = copy.deepcopy(config)
    large["models"]["chat"]["engines"] = 1000
    small_plan, large_plan = planned(config), planned(large)
    assert large_plan.pools[0].nodes == 1000
    assert len(large_plan.model_dump_json()) < 1.1 * len(small_plan.model_dump_json())


def test_what_only_explains_is_not_in_the_digest() -> None:
    plan = planned(SMALLEST)
    assert plan.model_copy(update={"choices": (), "origins": ()}).digest == plan.digest


# What is refused.

PROPOSAL = re.compile(r"`([\w.-]+): ([\w.-]+)`")
MODEL_KEYS = {"context", "concurrency", "quantization", "tensor-parallel-size"}


@pytest.mark.parametrize(
    "config",
    [
        one({"context": 65536, "concurrency": 64, "tensor-parallel-size": 1}, gpu="h100-80gb"),
        one({"context": 131072, "tensor-parallel-size": 1}, gpu="l4-24gb"),
        one({"weights": "llama-3.3-70b-instruct", "tensor-parallel-size": 1, "context": 8192}, gpu="h100-80gb"),
        one({"weights": "qwen2.5-32b-instruct", "tensor-parallel-size": 1, "concurrency": 32}, gpu="a100-80gb"),
        one({"concurrency": 200, "tensor-parallel-size": 1}, gpu="a10g-24gb"),
    ],
)
def test_every_proposal_of_a_refusal_is_accepted(config: dict[str, Any]) -> None:
    found = refused(config)
    ((_, fix),) = found.values()
    proposals = PROPOSAL.findall(fix)
    assert proposals, fix
    for key, value in proposals:
        changed = copy.deepcopy(config)
        where = changed["models"]["chat"] if key in MODEL_KEYS else changed["pools"]["p"]
        where[key] = int(value) if value.isdigit() else value
        planned(changed)


@pytest.mark.parametrize(
    ("config", "path", "words"),
    [
        (one({"tensor-parallel-size": 3}, gpu="h100-80gb"), "models.chat.tensor-parallel-size", "attention heads"),
        (one({"context": 200_000}, gpu="h100-80gb"), "models.chat.context", "more than the model can take"),
        (one({}, gpu="h100"), "pools.p.gpu", "is not in the catalog"),
        (one({}, instance="p5.48xl"), "pools.p.instance", "is not in the catalog"),
        (one({"pool": "q"}, gpu="h100-80gb"), "models.chat.pool", "there is no pool"),
        (one({"weights": "llama"}), "models.chat.weights", "has no entry"),
        (one({}, gpu="h100-80gb") | {"budget": {"usd_per_hour": 1}}, "budget.usd_per_hour", "costs"),
        (one({}, gpu="h100-80gb") | {"budget": {"usd_per_month": 10}}, "budget.usd_per_month", "costs"),
    ],
)
def test_findings(config: dict[str, Any], path: str, words: str) -> None:
    found = refused(config)
    assert words in found[path][0]
    assert found[path][1]


def test_all_findings_come_at_once() -> None:
    config = one({"context": 200_000, "tool-calls": "none"}, gpu="h100-80gb", zones=6)
    config["models"]["other"] = {"weights": "nothing"}
    assert {"models.chat.context", "models.chat.tool-calls", "models.other.weights"} <= set(refused(config))


def test_a_region_that_is_missing_or_unknown() -> None:
    assert "aws:region" in refused(SMALLEST, region="mars-north-1")
    with pytest.raises(ConfigError, match="aws:region: is missing"):
        make_plan("test", parse(SMALLEST), LOCK, None, {})


# Kubernetes.


def on_cluster(**pool: Any) -> dict[str, Any]:
    return {"target": "kubernetes", "models": {"chat": {"weights": "llama-3.1-8b-instruct"}}, "pools": {"p": pool}}


def test_only_the_user_knows_what_a_cluster_has() -> None:
    assert "pools" in refused({"target": "kubernetes", "models": {"chat": {"weights": "llama-3.1-8b-instruct"}}})
    assert "pools.p.gpu" in refused(on_cluster())


def test_a_cluster_is_planned_and_has_a_price_if_nodes_have_one() -> None:
    free = planned(on_cluster(gpu="h100-80gb"), region="")
    assert free.cost is None
    assert free.kubernetes is not None
    assert free.aws is None
    paid = planned(on_cluster(gpu="h100-80gb", usd_per_hour=20.0), region="")
    assert paid.cost is not None
    assert paid.cost.usd_per_hour == pytest.approx(20.0)


def test_the_design_s_own_example_is_a_plan() -> None:
    text = """
      target: aws
      models:
        chat:
          {weights: llama-3.1-8b-instruct, quantization: 8bit, context: 16384, concurrency: 64, pool: h100, engines: 4}
      pools:
        h100: {gpu: h100-80gb, nodes: auto, capacity: [{reservation: cr-0ab12345}, on-demand, {spot: 0.6}], zones: 2}
      gateway: {proxy: haproxy, hosts: 2, routing: least-loaded, hostname: llm.example.com}
      slo: {ttft_p95: 1s, tpot_p95: 60ms, availability: 99.9}
      budget: {usd_per_hour: 120}
    """
    plan = planned(YAML(typ="safe").load(text))
    assert [rung.kind for rung in plan.pools[0].rungs] == ["reservation", "on-demand", "spot"]
    assert len(plan.pools[0].zones) == 2
