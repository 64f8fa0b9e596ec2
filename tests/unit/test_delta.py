"""What an edit changes against the plan that was deployed last, whatever version wrote that."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import show_cost
from infra.plan.cost import Rented, plan_cost
from infra.plan.delta import delta, kept
from infra.plan.model import CostPlan, EngineSetPlan, FitPlan, FleetPlan
from tests.unit.costs import GATEWAY, pool, served, speed, text
from tests.unit.inputs import plan

LOCAL = plan({"chat": {"weights": "small", "context": 2048, "engines": 2}})


def gpu_plan(engines: int = 8, nodes: int = 2, instance: str = "p5.48xlarge", each: float = 55.04) -> FleetPlan:
    """A plan with a pool and a cost."""
    rented = [Rented("h100", instance, nodes, each, "on demand", gpus=8), GATEWAY]
    of_chat = EngineSetPlan(
        model="chat",
        pool="h100",
        engines=engines,
        gpu="h100-80gb",
        tensor_parallel_size=1,
        flags=(),
        environment=(),
        fit=FitPlan.model_validate(dict.fromkeys(FitPlan.model_fields, 0)),
        speed=speed(),
    )
    return LOCAL.model_copy(
        update={
            "engines": (),
            "engine_sets": (of_chat,),
            "pools": (pool(name="h100", gpu="h100-80gb", instance=instance, nodes=nodes, usd_per_hour=nodes * each),),
            "cost": plan_cost(rented, [served(engines=engines)], []),
        }
    )


def as_json(made: FleetPlan) -> dict[str, Any]:
    """As a stack output keeps it."""
    output: dict[str, Any] = json.loads(json.dumps(kept(made)))
    return output


def changes(old: Any, new: FleetPlan) -> list[tuple[str, str]]:
    return [(change.path, change.what) for change in delta(old, new)]


def test_first_deployment() -> None:
    # 2 x 55.04 + 2 x 0.09 = 110.26; x 730 = 80,489.80
    assert changes(None, gpu_plan()) == [
        ("models.chat", "new: small, bf16, context 2,048, engines 8"),
        ("pools.h100", "new: p5.48xlarge, h100-80gb, nodes 2"),
        ("cost", "new: $110.26/h, $80,490 a month"),
    ]
    assert changes({}, LOCAL) == [("models.chat", "new: small, bf16, context 2,048, engines 2")]


@pytest.mark.parametrize("made", [LOCAL, gpu_plan()])
def test_the_same_plan_again_changes_nothing(made: FleetPlan) -> None:
    assert changes(as_json(made), made) == []
    assert "no change" in text(show_cost.changes(()))


def test_models_change() -> None:
    new = plan({"chat": {"weights": "small", "context": 4096, "engines": 3, "quantization": "8bit", "max-answer": 512}})
    assert changes(as_json(LOCAL), new) == [
        ("models.chat", "weights small → small-w8a8"),
        ("models.chat", "quantization none → 8bit"),
        ("models.chat", "format bf16 → w8a8-int8"),
        ("models.chat", "context 2,048 → 4,096"),
        ("models.chat", "longest answer none → 512"),
        ("models.chat", "engines 2 → 3"),
    ]


def test_models_come_and_go() -> None:
    new = plan({"code": {"weights": "lonely"}})
    assert changes(as_json(LOCAL), new) == [
        ("models.code", "new: lonely, bf16, context 2,048, engines 2"),
        ("models.chat", "removed"),
    ]


def test_pools_and_cost_change() -> None:
    # 110.26 to 55.22: -55.04, which is -49.9 %; 55.22 x 730 = 40,310.60
    assert changes(as_json(gpu_plan()), gpu_plan(engines=4, nodes=1)) == [
        ("models.chat", "engines 8 → 4"),
        ("pools.h100", "nodes 2 → 1"),
        ("cost", "$110.26/h → $55.22/h: -$55.04/h (-50%), now $40,311 a month"),
    ]
    assert changes(as_json(gpu_plan(nodes=1)), gpu_plan())[-1] == (
        "cost",
        "$55.22/h → $110.26/h: +$55.04/h (+100%), now $80,490 a month",
    )


def test_another_instance_type() -> None:
    found = changes(as_json(gpu_plan()), gpu_plan(instance="p5en.48xlarge", each=63.3))
    assert ("pools.h100", "instance p5.48xlarge → p5en.48xlarge") in found
    assert not any(path.startswith("cost.") for path, _ in found)  # that is another price of another thing


def test_the_same_machines_at_another_price() -> None:
    # 2 x 0.04 of 110.26 is 0.07 %
    assert changes(as_json(gpu_plan()), gpu_plan(each=55.08)) == [
        ("cost.h100", "p5.48xlarge $55.04/h → $55.08/h each"),
        ("cost", "$110.26/h → $110.34/h: +$0.080/h (+0.1%), now $80,548 a month"),
    ]


def test_cost_that_is_not_known() -> None:
    unknown = gpu_plan().model_copy(update={"cost": None})
    assert changes(as_json(gpu_plan()), unknown) == [("cost", "was $110.26/h, is not known now")]
    assert changes(as_json(unknown), gpu_plan()) == [("cost", "$110.26/h, $80,490 a month")]


def test_what_was_free_has_no_percentage() -> None:
    old = as_json(gpu_plan())
    old["cost"] |= {"usd_per_hour": 0.0, "lines": []}
    assert changes(old, gpu_plan()) == [("cost", "$0.00/h → $110.26/h: +$110.26/h, now $80,490 a month")]


def test_what_an_older_version_did_not_write_is_not_compared() -> None:
    old = as_json(gpu_plan())
    for key in ("pools", "cost", "engine_sets", "target"):
        del old[key]
    del old["models"][0]["format"]
    old["models"][0]["context"] = 1024
    assert changes(old, gpu_plan()) == [
        ("models.chat", "context 1,024 → 2,048"),
        ("cost", "$110.26/h, $80,490 a month"),
    ]


def test_the_engine_version_changes() -> None:
    old = as_json(LOCAL) | {"vllm_version": "0.31.0"}
    assert changes(old, LOCAL) == [("stack", f"vLLM 0.31.0 → {LOCAL.vllm_version}")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["chat", "h100", "gateway"])
PART = st.fixed_dictionaries(
    {"name": NAMES | JSON},
    optional=dict.fromkeys(
        ("model", "context", "engines", "nodes", "instance", "usd_per_hour_each", "tensor_parallel_size"), JSON
    ),
)
COST = st.fixed_dictionaries({}, optional={"usd_per_hour": JSON, "lines": st.lists(PART) | JSON})
OLD = JSON | st.fixed_dictionaries(
    {},
    optional={
        "models": st.lists(PART) | JSON,
        "engines": st.lists(PART) | JSON,
        "engine_sets": st.lists(PART) | JSON,
        "pools": st.lists(PART) | JSON,
        "cost": COST | JSON,
        "target": JSON,
        "vllm_version": JSON,
    },
)
NEW = gpu_plan()


@given(OLD)
def test_no_old_plan_is_too_strange(old: Any) -> None:
    for change in delta(old, NEW):
        assert change.path
        assert "\n" not in change.path


def test_changes_are_shown() -> None:
    shown = text(show_cost.changes(delta(as_json(NEW), gpu_plan(engines=4, nodes=1))))
    assert "pools.h100   nodes 2 → 1" in shown
    assert "(-50%)" in shown


def test_the_plan_of_the_costs_is_whole() -> None:
    assert NEW.cost is not None
    assert CostPlan.model_validate_json(NEW.cost.model_dump_json()) == NEW.cost
