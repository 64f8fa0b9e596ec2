"""What an edit changes against the plan that was deployed last, whatever version wrote that."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import show_cost
from infra.config import parse
from infra.plan import make_plan
from infra.plan.cost import Rented, plan_cost
from infra.plan.delta import delta, kept
from infra.plan.model import CostPlan, EngineSetPlan, FitPlan, FleetPlan
from tests.unit.costs import GATEWAY, pool, served, speed, text
from tests.unit.inputs import GPU_LOCK, plan

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
        ("cost", "new: $80,490 a month, $110.26/h"),
    ]
    assert changes({}, LOCAL) == [("models.chat", "new: small, bf16, context 2,048, engines 2")]


@pytest.mark.parametrize("made", [LOCAL, gpu_plan()])
def test_the_same_plan_again_changes_nothing(made: FleetPlan) -> None:
    assert changes(as_json(made), made) == []
    assert "no change" in text(show_cost.changes(()))


def test_numbers_that_pulumi_made_floating_point() -> None:
    old = json.loads(json.dumps(kept(gpu_plan())), parse_int=float)
    assert changes(old, gpu_plan()) == []
    assert changes(old, gpu_plan(engines=4, nodes=1))[:2] == [
        ("models.chat", "engines 8 → 4"),
        ("pools.h100", "nodes 2 → 1"),
    ]


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
        ("cost.h100", "2 x p5.48xlarge → 1 x p5.48xlarge: $110.08 → $55.04/h"),
        ("cost", "-$40,179 a month (-50%): $80,490 → $40,311 a month, $55.22/h"),
    ]
    assert changes(as_json(gpu_plan(nodes=1)), gpu_plan())[-1] == (
        "cost",
        "+$40,179 a month (+100%): $40,311 → $80,490 a month, $110.26/h",
    )


def test_another_instance_type() -> None:
    found = changes(as_json(gpu_plan()), gpu_plan(instance="p5en.48xlarge", each=63.3))
    assert ("pools.h100", "instance p5.48xlarge → p5en.48xlarge") in found
    # 2 x 63.30
    assert ("cost.h100", "2 x p5.48xlarge → 2 x p5en.48xlarge: $110.08 → $126.60/h") in found


def test_the_same_machines_at_another_price() -> None:
    # 2 x 0.04 of 110.26 is 0.07 %
    assert changes(as_json(gpu_plan()), gpu_plan(each=55.08)) == [
        ("cost.h100", "2 x p5.48xlarge: $110.08 → $110.16/h"),
        ("cost", "+$58.40 a month (+0.1%): $80,490 → $80,548 a month, $110.34/h"),
    ]


def test_cost_that_is_not_known() -> None:
    unknown = gpu_plan().model_copy(update={"cost": None})
    assert changes(as_json(gpu_plan()), unknown) == [("cost", "was $110.26/h, is not known now")]
    assert changes(as_json(unknown), gpu_plan()) == [("cost", "$80,490 a month, $110.26/h")]


def test_what_was_free_has_no_percentage() -> None:
    old = as_json(gpu_plan())
    old["cost"] |= {"usd_per_hour": 0.0, "lines": []}
    assert changes(old, gpu_plan()) == [("cost", "+$80,490 a month: $0.00 → $80,490 a month, $110.26/h")]


def test_what_an_older_version_did_not_write_is_not_compared() -> None:
    old = as_json(gpu_plan())
    for key in ("pools", "cost", "engine_sets", "target"):
        del old[key]
    del old["models"][0]["format"]
    old["models"][0]["context"] = 1024
    assert changes(old, gpu_plan()) == [
        ("models.chat", "context 1,024 → 2,048"),
        ("cost", "$80,490 a month, $110.26/h"),
    ]


def test_the_engine_version_changes() -> None:
    old = as_json(LOCAL) | {"vllm_version": "0.31.0"}
    assert changes(old, LOCAL) == [("stack", f"vLLM 0.31.0 → {LOCAL.vllm_version}")]


# Machines


def on_aws(engines: int = 2, **config: Any) -> FleetPlan:
    """A plan on AWS of nodes with one engine each, with durations that can be reckoned with."""
    models = {"chat": {"weights": "llama-3.1-8b-instruct", "engines": engines}}
    raw = {"target": "aws", "models": models, "pools": {"p": {"instance": "p5.4xlarge"}}, **config}
    made = make_plan("prod", parse(raw).in_region("us-east-1"), GPU_LOCK, None, {})
    assert made.aws
    return made.model_copy(
        update={
            "timings": made.timings.model_copy(update={"drain_s": 500, "stop_s": 40, "start_s": 660}),
            "aws": made.aws.model_copy(update={"drain_hook_s": 600, "launch_hook_s": 1200}),
        }
    )


def digests(engine: str = "a", bundle: str = "a", group: str = "a", **hosts: str) -> dict[str, Any]:
    """A fingerprint, as infra/render/machines.py makes it."""
    group_name = "fleet-prod-engine-p-on-demand"
    return {
        "runs": {
            "engine-p": {"bundle": bundle + engine, "engines": {"chat-1": engine}},
            **{name: {"bundle": hosts.get(name, "a"), "engines": {}} for name in ("gateway", "monitor")},
        },
        "boots": {
            group_name: group,
            **{name: hosts.get(f"{name}_boots", "a") for name in ("gateway", "monitor")},
        },
    }


def moves(old: FleetPlan, new: FleetPlan, before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    output = json.loads(json.dumps(kept(old, before)))
    found = [it for it in delta(output, new, after) if it.path.startswith("machines")]
    return [(it.path.removeprefix("machines").removeprefix("."), it.what, it.short) for it in found]


def test_engines_whose_files_change_drain_and_the_others_go_on() -> None:
    two = on_aws()
    assert moves(two, two, digests(), digests()) == []
    assert moves(two, two, digests(), digests(bundle="b")) == [
        ("engine-p", "take up other files; no engine drains", "")
    ]
    # 500 + 40 + 660 = 1,200 s; twice that on two nodes.
    said = "engines of `chat` drain and restart one at a time, each within 20 min, all within 40 min"
    assert moves(two, two, digests(), digests("b")) == [("engine-p", said, "")]


def test_an_only_engine_is_down_while_it_restarts() -> None:
    one, down = on_aws(1), "`chat` down for up to 20 min"
    said = f"engines of `chat` drain and restart one at a time, each within 20 min; {down}"
    assert moves(one, one, digests(), digests("b")) == [("engine-p", said, down)]
    view = text(show_cost.changes(delta(json.loads(json.dumps(kept(one, digests()))), one, digests("b"))))
    assert view.splitlines()[0] == f"against what is deployed: the same cost; {down}"


def test_nodes_are_replaced_in_their_turn_and_an_only_node_is_down() -> None:
    three, one = on_aws(3), on_aws(1)
    said = "3 nodes replaced: 1 at a time drain, others get ready, within 30 min; all within 90 min"
    assert moves(three, three, digests(), digests(group="b")) == [("engine-p", said, "")]
    (found,) = moves(one, one, digests(), digests(group="b"))
    assert found[2] == "`chat` down for up to 30 min"


def test_nodes_come_and_go() -> None:
    two, three = on_aws(2), on_aws(3)
    assert moves(two, three, digests(), digests()) == [("engine-p", "1 node more, ready within 20 min", "")]
    assert moves(three, two, digests(), digests()) == [("engine-p", "1 node less, drained within 10 min", "")]


def test_what_goes_without_a_drain_is_in_the_first_line() -> None:
    two = on_aws()
    other = on_aws(pools={"q": {"instance": "p5.4xlarge"}})
    gone = next(it for it in moves(two, other, digests(), {"runs": {}, "boots": {}}) if it[0] == "engine-p")
    assert "2 nodes taken away at once, without a drain" in gone[1]
    assert gone[2] == "pool p goes without a drain"
    after = digests()
    after["boots"].pop("fleet-prod-engine-p-on-demand")
    (rung,) = moves(two, two, digests(), after)
    assert rung[2] == "nodes from fleet-prod-engine-p-on-demand go without a drain"


def test_another_first_rung_moves_nodes() -> None:
    old = on_aws(pools={"p": {"instance": "p5.4xlarge", "capacity": ["on-demand", {"spot": 0.5}]}})
    new = on_aws(pools={"p": {"instance": "p5.4xlarge", "capacity": [{"spot": 0.5}, "on-demand"]}})
    (found,) = moves(old, new, digests(), digests())
    assert "nodes come from spot first" in found[1]
    assert any("capacity on-demand then spot up to $3." in it.what for it in delta(as_json(old), new))


def test_gateways_and_the_monitor_move() -> None:
    two, manual = on_aws(), on_aws(aws={"rollout": "manual"})
    assert [it[:2] for it in moves(two, two, digests(), digests(gateway="b", monitor_boots="b"))] == [
        ("gateway", "take up other files, one at a time; nothing is cut off"),
        ("monitor", "replaced: no dashboards and alerts meanwhile, its metrics stay"),
    ]
    said = moves(two, manual, digests(), digests(gateway="b"))
    assert said[-1][1] == "machines that run take up other files when you tell them: `aws.rollout: manual`"


def test_what_an_older_version_did_not_keep_is_not_told() -> None:
    two = on_aws()
    assert not any(it.path.startswith("machines") for it in delta(as_json(two), two, digests()))
    assert not any(it.path.startswith("machines") for it in delta(None, two, digests()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["chat", "h100", "gateway", "p", "engine-p"])
PART = st.fixed_dictionaries(
    {"name": NAMES | JSON},
    optional=dict.fromkeys(
        (
            *("model", "context", "engines", "nodes", "instance", "count", "rungs"),
            *("usd_per_hour", "usd_per_hour_each", "tensor_parallel_size"),
        ),
        JSON,
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
        "machines": st.fixed_dictionaries(
            {}, optional={"runs": st.dictionaries(NAMES, JSON) | JSON, "boots": st.dictionaries(NAMES, JSON) | JSON}
        )
        | JSON,
        "target": JSON,
        "vllm_version": JSON,
    },
)
NEW = gpu_plan()
ON_AWS = on_aws()


@given(OLD)
def test_no_old_plan_is_too_strange(old: Any) -> None:
    for change in (*delta(old, NEW), *delta(old, ON_AWS, digests())):
        assert change.path
        assert "\n" not in change.path


def test_changes_are_shown() -> None:
    shown = text(show_cost.changes(delta(as_json(NEW), gpu_plan(engines=4, nodes=1))))
    assert "pools.h100   nodes 2 → 1" in shown
    assert "(-50%)" in shown


def test_the_plan_of_the_costs_is_whole() -> None:
    assert NEW.cost is not None
    assert CostPlan.model_validate_json(NEW.cost.model_dump_json()) == NEW.cost
