"""The graph of stacks on AWS: how many resources there are, what waits for what, where nodes come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pulumi
import pytest

from infra.findings import ConfigError
from tests.program.aws_graph import Graph, config_of, graph_of

NO_BUDGET = {"budget": {"usd_per_hour": 1_000_000}}


def fleet(nodes: int) -> dict[str, Any]:
    models = {
        "chat": {"weights": "llama-3.3-70b-instruct", "quantization": "8bit", "engines": 4 * nodes, "pool": "h100"}
    }
    models["chat"] |= {"tensor-parallel-size": 2, "context": 16384, "max-answer": 4096}
    pools = {"h100": {"gpu": "h100-80gb", "instance": "p5.48xlarge", "zones": 2}}
    return config_of("prod", models=models, pools=pools, **NO_BUDGET)


def test_a_thousand_nodes_are_as_many_resources_as_ten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = graph_of(monkeypatch, tmp_path, "prod", fleet(10))
    many = graph_of(monkeypatch, tmp_path, "prod", fleet(1000))

    assert {(it.kind, it.name) for it in few.resources} == {(it.kind, it.name) for it in many.resources}
    sizes = [graph.one("Group", "engine-h100-on-demand").inputs["minSize"] for graph in (few, many)]
    assert sizes == [10, 1000]


def test_state_manager_is_told_of_gateways_before_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-in refuses associations: these are their arguments; a booted host runs the document's command."""
    graph = graph_of(monkeypatch, tmp_path, "prod", config_of("prod"))

    for pool in ("h100", "a100"):
        made = graph.one("Association", f"engine-{pool}").inputs
        assert "Association gateway" in graph.before(f"Association engine-{pool}")
        assert (made["maxConcurrency"], made["maxErrors"]) == ("1", "0")
        assert made["targets"] == [
            {"key": "tag:vllm-fleet:stack", "values": ["prod"]},
            {"key": "tag:vllm-fleet:machine", "values": [f"engine-{pool}"]},
        ]
        pointer = json.loads(graph.one("Parameter", f"engine-{pool}").inputs["insecureValue"])
        assert made["parameters"]["Digest"] == pointer["bundle"]
        # Whoever boots meanwhile finds the new bundle: first the object, then the parameter, then the order.
        assert f"Parameter engine-{pool}" in graph.before(f"Association engine-{pool}")
        assert f"BucketObjectv2 bundle-engine-{pool}" in graph.before(f"Parameter engine-{pool}")
    assert "Association engine-h100" not in graph.before("Association gateway")


def test_machines_boot_when_what_they_read_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = graph_of(monkeypatch, tmp_path, "prod", config_of("prod"))

    for group in ("engine-h100-on-demand", "engine-a100-spot"):
        pool = group.split("-")[1]
        before = graph.before(f"Group {group}")
        assert {f"Parameter engine-{pool}", "BucketObjectv2 runtime", f"RolePolicy engine-{pool}"} <= before
        assert {"Route private-out", "VpcEndpoint s3", "Service engines-fast"} & before
    assert {"Parameter gateway", "SecretVersion gateway"} <= graph.before("Group gateway")


def test_what_models_change_moves_no_machine_by_its_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that boots anew for it would be a GPU that has to be had again."""
    was = graph_of(monkeypatch, tmp_path, "prod", config_of("prod", **NO_BUDGET))
    config = config_of("prod", **NO_BUDGET)
    models = config["vllm-fleet:models"]
    models["quick"] = {**models.pop("fast"), "max-answer": 16000}
    models["little"] = {"weights": "llama-3.1-8b-instruct", "pool": "l4", "context": 8192, "max-answer": 8000}
    config["vllm-fleet:pools"]["l4"] = {"gpu": "l4-24gb", "zones": 2}
    now = graph_of(monkeypatch, tmp_path, "prod", config)

    told = dict(now.user_data())
    assert {name: told[name] for name, _ in was.user_data()} == dict(was.user_data())
    pointer = json.loads(now.one("Parameter", "engine-a100").inputs["insecureValue"])
    assert pointer["services"] == {"quick": "engines-quick-id"}


def test_a_pool_with_hours_is_told_them_and_its_size_is_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_of("prod", **NO_BUDGET)
    hours = {"days": "mon-fri", "from": "07:30", "to": "20:00", "time-zone": "Europe/Berlin"}
    config["vllm-fleet:pools"]["a100"]["schedule"] = hours
    graph = graph_of(monkeypatch, tmp_path, "prod", config)

    group = graph.one("Group", "engine-a100-on-demand").inputs
    assert (group["minSize"], group["maxSize"], group["desiredCapacity"]) == (0, 1, 1)
    actions = {it.name: it.inputs for it in graph.of("Schedule")}
    assert {
        name: (it["recurrence"], it["timeZone"], it["desiredCapacity"], it["minSize"]) for name, it in actions.items()
    } == {
        "engine-a100-on-demand-start": ("30 7 * * 1,2,3,4,5", "Europe/Berlin", 1, -1),
        "engine-a100-on-demand-end": ("0 20 * * 1,2,3,4,5", "Europe/Berlin", 0, -1),
    }
    assert graph.one("Group", "engine-h100-on-demand").inputs["minSize"] == 1


def test_manual_rollout_has_no_associations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = graph_of(monkeypatch, tmp_path, "prod", config_of("prod", aws={"rollout": "manual"}))
    assert not graph.of("Association")
    assert graph.of("Document")


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Graph:
    rungs = [{"reservation": "cr-0123456789abcdef0"}, {"capacity-block": "cr-0fedcba9876543210"}, "on-demand"]
    pools = {
        "h100": {"gpu": "h100-80gb", "instance": "p5.48xlarge", "zones": 2, "capacity": [*rungs, {"spot": 0.6}]},
        "a100": {"gpu": "a100-40gb", "zones": 2},
    }
    return graph_of(monkeypatch, tmp_path, "prod", config_of("prod", pools=pools, **NO_BUDGET))


def test_every_rung_is_a_group_and_the_first_wants_all_nodes(ladder: Graph) -> None:
    sizes = {
        made.name: (made.inputs["minSize"], made.inputs["maxSize"])
        for made in ladder.of("Group")
        if made.name.startswith("engine-h100")
    }
    assert sizes == {
        "engine-h100-reservation": (1, 1),
        "engine-h100-capacity-block": (0, 1),
        "engine-h100-on-demand": (0, 1),
        "engine-h100-spot": (0, 1),
    }


def test_reservations_and_blocks_are_targeted_by_their_templates(ladder: Graph) -> None:
    def target(name: str) -> Any:
        return ladder.one("LaunchTemplate", name).inputs.get("capacityReservationSpecification")

    block = ladder.one("LaunchTemplate", "engine-h100-capacity-block").inputs
    assert target("engine-h100-reservation") == {
        "capacityReservationTarget": {"capacityReservationId": "cr-0123456789abcdef0"}
    }
    assert target("engine-h100-capacity-block") == {
        "capacityReservationTarget": {"capacityReservationId": "cr-0fedcba9876543210"}
    }
    assert block["instanceMarketOptions"] == {"marketType": "capacity-block"}
    assert target("engine-h100-on-demand") is None


def test_spot_takes_the_pools_with_most_capacity_and_pays_no_more_than_was_said(ladder: Graph) -> None:
    made = ladder.one("Group", "engine-h100-spot").inputs
    distribution = made["mixedInstancesPolicy"]["instancesDistribution"]
    assert distribution["spotAllocationStrategy"] == "price-capacity-optimized"
    assert distribution["onDemandPercentageAboveBaseCapacity"] == 0
    assert distribution["spotMaxPrice"] == "33.024"
    assert made["capacityRebalance"] is True


def test_a_capacity_block_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pools = {
        "h100": {"gpu": "h100-80gb", "instance": "p5.48xlarge", "capacity": [{"capacity-block": True}]},
        "a100": {"gpu": "a100-40gb"},
    }
    with pytest.raises(ConfigError, match=r"pools\.h100\.capacity\.0: does not say which block"):
        graph_of(monkeypatch, tmp_path, "prod", config_of("prod", pools=pools, **NO_BUDGET))


def test_a_public_image_that_is_newer_replaces_nothing_and_a_named_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ignored: dict[str, list[str]] = {}

    def note(kind: str, name: str, opts: Any) -> None:
        if kind.endswith(("LaunchTemplate", ":Instance")):
            ignored[name] = list(opts.ignore_changes or [])

    watch(monkeypatch, note)
    graph_of(monkeypatch, tmp_path, "prod", config_of("prod", aws={"images": {"gateway": "ami-0123456789abcdef0"}}))

    assert "imageId" in ignored["engine-h100-on-demand"]
    assert "ami" in ignored["monitor"]
    assert ignored["gateway"] == []


def watch(monkeypatch: pytest.MonkeyPatch, note: Any) -> None:
    """See the options of every resource."""
    original = pulumi.Resource.__init__

    def noted(self: Any, kind: str, name: str, *rest: Any, **more: Any) -> None:
        for it in [*rest, *more.values()]:
            if isinstance(it, pulumi.ResourceOptions):
                note(kind, name, it)
        original(self, kind, name, *rest, **more)

    monkeypatch.setattr(pulumi.Resource, "__init__", noted)


def test_the_outputs_say_how_to_use_it_and_what_it_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exports = graph_of(monkeypatch, tmp_path, "prod", config_of("prod")).exports
    assert {"endpoint", "curl", "dashboards", "cost", "plan_digest", "plan", "rollout", "fill"} <= exports.keys()
    assert exports["cost"]["total"] == "$77.39/h, $56,493 a month"
    assert len(exports["plan_digest"]) == 64


def test_pipelines_of_images_are_made_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-in refuses Image Builder: that they are in the graph, and what builds may reach."""
    plain = graph_of(monkeypatch, tmp_path, "prod", config_of("prod"))
    baking = graph_of(monkeypatch, tmp_path, "prod", config_of("prod", aws={"images": {"bake": True}}))

    assert not plain.of("ImagePipeline")
    assert len(baking.of("ImagePipeline")) == 3
    assert {it.name for it in baking.of("SecurityGroup")} - {it.name for it in plain.of("SecurityGroup")} == {"builder"}
    assert set(baking.exports["images"]) == {"engine", "gateway", "monitor"}
