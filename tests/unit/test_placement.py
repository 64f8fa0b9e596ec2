"""Engines onto GPUs onto nodes, the nodes onto ways to get them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.catalog import Instance, instances
from infra.config import PoolConfig
from infra.plan.ledger import Ledger
from infra.plan.model import PoolPlan
from infra.plan.packing import fewest_nodes, fewest_unlike_nodes, pack
from infra.plan.placement import Demand, Misfit, Packing, cheapest, place, place_on_cluster

GB = 10**9
GIB = 1 << 30
HERE, THERE = "us-east-1", "eu-west-1"
ZONES = ("use1-az1", "use1-az2", "use1-az4")
ALL = ("reservation", "capacity-block", "on-demand", "spot")


def instance(gpus: int, usd: float, **changes: Any) -> Instance:
    values: dict[str, Any] = {
        "gpu": "h100-80gb",
        "gpus": gpus,
        "vcpus": 24 * gpus,
        "memory_bytes": 256 * GIB * gpus,
        "nvme_bytes": 3800 * GB * gpus,
        "network_gbit_s": 100.0 * gpus,
        "efa": True,
        "gpus_per_domain": gpus,
        "offers": ALL,
        "usd_per_hour": {HERE: usd},
        "zones": {HERE: ZONES},
        "source": "made up",
        "date": "2026-11",
    }
    return Instance(**values | changes)


CATALOG = {
    "one": instance(1, 6.88),
    "four": instance(4, 27.52, gpus_per_domain=2, nvme_bytes=100 * GB),
    "eight": instance(8, 55.04),
    "abroad": instance(8, 50.0, usd_per_hour={THERE: 50.0}, zones={THERE: ("euw1-az1",)}),
    "unpriced": instance(8, 1.0, usd_per_hour={THERE: 1.0}),
    "wide": instance(8, 8.0, gpu="l40s-48gb"),
    "wide-large": instance(8, 9.0, gpu="l40s-48gb"),
    "split": instance(8, 9.0, gpu="l40s-48gb", gpus_per_domain=4),
    "l4": instance(1, 0.8, gpu="l4-24gb", memory_bytes=16 * GIB, nvme_bytes=250 * GB, offers=("on-demand", "spot")),
    "l4-large": instance(
        1, 1.0, gpu="l4-24gb", memory_bytes=32 * GIB, nvme_bytes=450 * GB, offers=("on-demand", "spot")
    ),
}


def demand(model: str = "chat", gpus: int = 1, engines: int = 2, disk: int = 16 * GB, **more: Any) -> Demand:
    return Demand(model, gpus, engines, disk, **{"ram_bytes": 8 * GIB, **more})


def config(**keys: Any) -> PoolConfig:
    return PoolConfig.model_validate(
        {key.replace("_", "-") if key != "usd_per_hour" else key: it for key, it in keys.items()}
    )


def placed(*demands: Demand, gpu: str = "h100-80gb", **keys: Any) -> tuple[PoolPlan, Ledger]:
    ledger = Ledger([])
    plan = place("pool", config(**keys), gpu, CATALOG, HERE, demands, ledger)
    assert plan is not None, ledger.findings
    return plan, ledger


def refused(*demands: Demand, gpu: str = "h100-80gb", **keys: Any) -> str:
    ledger = Ledger([])
    place("pool", config(**keys), gpu, CATALOG, HERE, demands, ledger)
    (finding,) = ledger.findings
    assert finding.fix
    return str(finding)


def notes(ledger: Ledger) -> str:
    return "\n".join(f"{notice.path}: {notice.message}" for notice in ledger.notices)


# Packing.


@st.composite
def demand_lists(draw: st.DrawFn) -> list[Demand]:
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
    return [demand(f"m{n}", size, draw(st.integers(1, 200))) for n, size in enumerate(sizes)]


@given(demand_lists(), st.integers(1, 40), st.sampled_from([(1, 1), (4, 4), (4, 2), (8, 8), (8, 4)]))
def test_no_gpu_has_two_engines_and_none_leaves_its_domain(
    demands: list[Demand], nodes: int, shape: tuple[int, int]
) -> None:
    gpus, domain = shape
    slots = pack(demands, nodes, gpus, domain)
    if slots is None:
        return
    used = [gpu for slot in slots for gpu in slot.gpus]
    assert len(used) == len(set(used))
    assert set(used) <= set(range(gpus))
    assert all(slot.gpus[0] // domain == slot.gpus[-1] // domain for slot in slots)
    for it in demands:
        mine = [slot for slot in slots if slot.model == it.model]
        assert len(mine) == math.ceil(it.engines / nodes)
        assert all(len(slot.gpus) == it.tensor_parallel_size for slot in mine)


@given(demand_lists(), st.sampled_from([(1, 1), (4, 4), (4, 2), (8, 8), (8, 4)]))
def test_the_fewest_nodes_hold_all_engines(demands: list[Demand], shape: tuple[int, int]) -> None:
    gpus, domain = shape
    fewest = fewest_nodes(demands, gpus, domain)
    unlike = fewest_unlike_nodes(demands, gpus, domain)
    if fewest is None:
        assert pack([demand(it.model, it.tensor_parallel_size, 1) for it in demands], 1, gpus, domain) is None
        return
    assert pack(demands, fewest, gpus, domain) is not None
    assert fewest == 1 or pack(demands, fewest - 1, gpus, domain) is None
    needed = sum(it.engines * it.tensor_parallel_size for it in demands)
    assert unlike is not None
    assert unlike * gpus >= needed


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 50)), min_size=1, max_size=4))
def test_powers_of_two_waste_nothing_where_nodes_may_differ(sizes: list[tuple[int, int]]) -> None:
    demands = [demand(f"m{n}", size, engines) for n, (size, engines) in enumerate(sizes)]
    assert fewest_unlike_nodes(demands, 8, 8) == math.ceil(sum(size * engines for size, engines in sizes) / 8)


def test_a_larger_group_is_placed_first() -> None:
    plan, _ = placed(demand("small", 2, 2), demand("large", 4, 1), nodes=1, instance="eight")
    assert [(slot.model, slot.gpus) for slot in plan.slots] == [
        ("large", (0, 1, 2, 3)),
        ("small", (4, 5)),
        ("small", (6, 7)),
    ]


# Nodes.


def test_several_engines_and_models_share_a_node() -> None:
    plan, _ = placed(demand("large", 4, 1), demand("small", 1, 4))
    assert (plan.instance, plan.nodes, len(plan.slots), plan.idle_gpus) == ("eight", 1, 5, 0)
    assert plan.engines == (("large", 1), ("small", 4))


def test_auto_takes_the_fewest_nodes_of_the_cheapest_type() -> None:
    plan, ledger = placed(demand("chat", 1, 3))
    assert (plan.instance, plan.nodes) == ("one", 3)
    assert plan.usd_per_hour == pytest.approx(3 * 6.88)
    because = {origin.path: origin.because for origin in ledger.origins}
    assert "the cheapest" in because["pools.pool.instance"]
    assert "1 x eight $55.04" in because["pools.pool.instance"]
    assert "the fewest" in because["pools.pool.nodes"]


def test_of_two_that_cost_the_same_the_one_with_two_nodes_is_taken() -> None:
    for engines, instance, nodes in ((8, "four", 2), (16, "eight", 2), (4, "one", 4), (1, "one", 1)):
        plan, _ = placed(demand(engines=engines))
        assert (plan.instance, plan.nodes) == (instance, nodes)


def test_nodes_that_were_asked_for_carry_the_same_each() -> None:
    plan, ledger = placed(demand("chat", 2, 5), nodes=2, instance="eight")
    assert (plan.nodes, len(plan.slots), plan.engines, plan.idle_gpus) == (2, 3, (("chat", 6),), 2)
    assert "6 engines run, not 5" in notes(ledger)
    assert "2 of 8 GPUs of each node are idle, 4 in all" in notes(ledger)


@given(demand_lists(), st.integers(2, 1000))
def test_a_lost_node_takes_no_model_away(demands: list[Demand], nodes: int) -> None:
    plan = place("pool", config(nodes=nodes), "h100-80gb", CATALOG, HERE, demands, Ledger([]))
    if plan is None:
        return
    left = {model: count - sum(slot.model == model for slot in plan.slots) for model, count in plan.engines}
    assert min(left.values()) >= 1
    assert all(count >= it.engines for (_, count), it in zip(plan.engines, demands, strict=True))


def test_what_likeness_costs_is_said() -> None:
    plan, ledger = placed(demand("many", 1, 31), demand("one", 1, 1), instance="eight")
    assert plan.nodes == 5
    assert "5 nodes are needed as all carry the same; 4 have GPUs enough: `engines` that" in notes(ledger)


def test_one_node_is_a_single_point_of_failure() -> None:
    assert "nothing serves `chat`" in notes(placed(demand(engines=8), instance="eight")[1])
    assert "nothing serves" not in notes(placed(demand(engines=16), instance="eight")[1])


def test_a_thousand_nodes_are_no_more_to_look_at_than_one() -> None:
    large, ledger = placed(demand(engines=8000), instance="eight")
    small, _ = placed(demand(engines=8), instance="eight")
    assert large.nodes == 1000
    assert len(str(large)) < len(str(small)) + 20
    assert "10 nodes at once" in str(ledger.origins)


@pytest.mark.parametrize(
    ("nodes", "percent", "at_once"), [(1, 0, 1), (2, 50, 1), (3, 66, 1), (7, 85, 1), (199, 99, 1), (200, 99, 2)]
)
def test_an_update_leaves_all_nodes_but_one(nodes: int, percent: int, at_once: int) -> None:
    plan, _ = placed(demand(engines=8), nodes=nodes, instance="eight")
    assert plan.min_healthy_percent == percent
    assert nodes - math.ceil(nodes * plan.min_healthy_percent / 100) == at_once


# What cannot be.


def test_too_few_nodes() -> None:
    said = refused(demand("chat", 4, 5), nodes=2, instance="eight")
    assert said.startswith("pools.pool.nodes: 2 x eight, each with 8 GPUs, do not hold 5 x `chat` on 4 GPUs")
    assert "`nodes: 3`" in said


def test_a_group_that_would_leave_its_domain() -> None:
    said = refused(demand("chat", 4, 1), instance="four")
    assert said.startswith("models.chat.tensor-parallel-size: 4 GPUs: in four 2 reach each other directly")
    assert "at most `tensor-parallel-size: 2`, or `instance: eight`" in said
    assert "at most `tensor-parallel-size: 8`" in refused(demand("chat", 16, 1))


def test_models_that_do_not_share_a_node() -> None:
    said = refused(demand("large", 8, 1), demand("small", 1, 1))
    assert said.startswith("models.small.pool:")
    assert "give `small` a pool of its own" in said


def test_host_memory_for_sleeping_engines() -> None:
    sleeper = demand("chat", 1, 2, ram_bytes=24 * GIB, sleeps=True)
    assert placed(sleeper, gpu="l4-24gb")[0].instance == "l4-large"
    said = refused(sleeper, gpu="l4-24gb", instance="l4")
    assert said.startswith("models.chat.sleep: l4 has 14.4 GiB of host memory to give (of 16.0 GiB)")
    assert "`sleep: false`, or `instance: l4-large`" in said


def test_fewer_engines_on_a_node_need_less_host_memory() -> None:
    said = refused(demand("chat", 1, 8, ram_bytes=400 * GIB), instance="eight")
    assert "pools.pool.instance: eight has 1843.2 GiB" in said
    assert "`nodes: 2`" in said
    assert placed(demand("chat", 1, 8, ram_bytes=400 * GIB), instance="eight", nodes=2)[0].nodes == 2


def test_weights_go_to_local_disks_or_to_a_volume_that_was_asked_for() -> None:
    assert placed(demand(disk=140 * GB))[0].weights_on == "nvme"
    said = refused(demand(disk=140 * GB), instance="four")
    assert said.startswith("pools.pool.disk: the local disks of four, 100 GB, do not hold 290 GB: the weights, 140 GB")
    assert "`disk: 390GB`" in said
    plan, _ = placed(demand(disk=140 * GB), instance="four", disk="390GB")
    assert (plan.weights_on, plan.volume_bytes) == ("volume", 390 * GB)
    assert "at least `disk: 390GB`" in refused(demand(disk=140 * GB), instance="four", disk="389GB")
    assert "at least `disk: 100GB`" in refused(demand(), instance="one", disk="50GB")


def test_each_model_is_on_disk_once_however_many_engines_it_has() -> None:
    assert (
        placed(demand(disk=120 * GB, engines=16), demand("more", disk=20 * GB), gpu="h100-80gb")[0].weights_bytes
        == 140 * GB
    )


@pytest.mark.parametrize(
    ("keys", "gpu", "problem", "fix"),
    [
        ({"instance": "eigth"}, "h100-80gb", "`eigth` is not in the catalog", "did you mean `eight`?"),
        ({"instance": "l4"}, "h100-80gb", "l4 has l4-24gb", "one of: one, four, eight"),
        ({"instance": "abroad"}, "h100-80gb", "abroad is not offered in us-east-1", "here: one, four, eight"),
        ({}, "h200-141gb", "no instance type in us-east-1 has h200-141gb", "another `gpu`"),
        ({"capacity": []}, "h100-80gb", "has no rung", "`capacity: [on-demand]`"),
        ({"zones": 4}, "h100-80gb", "4: us-east-1 offers one in 3: use1-az1, use1-az2, use1-az4", "at most `zones: 3`"),
        (
            {"capacity": ["on-demand", {"capacity-block": True}]},
            "l4-24gb",
            "is not offered as capacity-block",
            "on-demand",
        ),
    ],
)
def test_what_is_not_to_be_had(keys: dict[str, Any], gpu: str, problem: str, fix: str) -> None:
    said = refused(demand(), gpu=gpu, **keys)
    assert problem in said
    assert fix in said


def test_a_pool_without_models() -> None:
    assert "pools.pool: no model uses this pool" in refused()


def test_where_a_gpu_is_offered_is_said() -> None:
    ledger = Ledger([])
    assert place("pool", config(), "l4-24gb", CATALOG, THERE, [demand()], ledger) is None
    assert "offered: l4 in us-east-1; l4-large in us-east-1" in str(ledger.findings)


# The ladder.


def test_rungs_keep_their_order_and_have_their_price() -> None:
    capacity = [{"reservation": "cr-0123456789abcdef0"}, "on-demand", {"spot": 0.6}]
    plan, ledger = placed(demand(engines=16), instance="eight", capacity=capacity, zones=2)
    assert [(rung.kind, rung.id, round(rung.usd_per_hour, 3)) for rung in plan.rungs] == [
        ("reservation", "cr-0123456789abcdef0", 55.04),
        ("on-demand", None, 55.04),
        ("spot", None, 33.024),
    ]
    assert {rung.zones for rung in plan.rungs} == {plan.zones} == {("use1-az1", "use1-az2")}
    assert plan.usd_per_hour == pytest.approx(2 * 55.04) == plan.highest_usd_per_hour
    assert "on-demand, $55.04 an hour for a node, comes before spot, which costs $33.02 at most" in notes(ledger)


def test_spot_takes_other_types_of_the_same_shape() -> None:
    plan, _ = placed(demand(), gpu="l4-24gb", capacity=["spot", "on-demand"])
    assert [rung.instances for rung in plan.rungs] == [("l4", "l4-large"), ("l4",)]
    plan, _ = placed(demand(), gpu="l4-24gb", capacity=["spot", "on-demand"], instance="l4")
    assert plan.rungs[0].instances == ("l4",)
    plan, _ = placed(demand("chat", 3, 2), gpu="l40s-48gb", capacity=["spot"])
    assert plan.rungs[0].instances == ("wide", "wide-large")


@pytest.mark.parametrize(
    ("capacity", "said"),
    [
        (["spot"], "spot alone"),
        ([{"capacity-block": True}], "a capacity block ends on its day"),
        (["on-demand", {"reservation": "cr-0123456789abcdef0"}], "which is paid for in any case"),
        (["on-demand", "spot"], "comes before spot"),
        ([{"spot": 0.6}, "on-demand"], "an hour for a node; nodes that come from on-demand cost"),
    ],
)
def test_what_is_remarkable_about_a_ladder(capacity: list[Any], said: str) -> None:
    assert said in notes(placed(demand(), capacity=capacity)[1])


def test_a_good_ladder_needs_no_words() -> None:
    capacity = [{"reservation": "cr-0123456789abcdef0", "zone": "use1-az1"}, {"spot": 0.6}, "on-demand"]
    assert "capacity" not in notes(placed(demand(engines=2), capacity=capacity)[1])


POOLS = st.fixed_dictionaries(
    {},
    optional={
        "instance": st.sampled_from([*CATALOG, "unheard-of"]),
        "nodes": st.one_of(st.just("auto"), st.integers(1, 1000)),
        "capacity": st.lists(
            st.sampled_from(["on-demand", "spot", {"spot": 0.5}, {"capacity-block": True}]), max_size=3
        ),
        "zones": st.integers(1, 6),
        "disk": st.integers(1, 10_000).map(lambda gb: f"{gb}GB"),
        "gpus-per-node": st.integers(1, 16),
        "usd_per_hour": st.floats(0.01, 1000),
    },
)


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 8000), st.integers(1, 2**41), st.integers(1, 2**41)), max_size=4
    ),
    POOLS,
    st.sampled_from([*{row.gpu for row in CATALOG.values()}, "unheard-of"]),
    st.sampled_from([HERE, THERE, "unheard-of"]),
)
def test_every_pool_is_planned_or_refused(
    sizes: list[tuple[int, int, int, int]], raw: dict[str, Any], gpu: str, region: str
) -> None:
    demands = [Demand(f"m{n}", *size) for n, size in enumerate(sizes)]
    wanted = PoolConfig.model_validate(raw)
    on_aws, on_cluster = Ledger([]), Ledger([])
    plans = (
        (place("pool", wanted, gpu, CATALOG, region, demands, on_aws), on_aws),
        (place_on_cluster("pool", wanted, gpu, demands, on_cluster), on_cluster),
    )
    for plan, ledger in plans:
        assert plan is not None or ledger.findings
        assert all(finding.problem and finding.fix for finding in ledger.findings)
        assert len({origin.path for origin in ledger.origins}) == len(ledger.origins)


# Kubernetes.


def test_a_cluster_has_its_nodes_already() -> None:
    ledger = Ledger([])
    demands = [demand("large", 4, 3), demand("small", 1, 5)]
    plan = place_on_cluster("pool", config(usd_per_hour=40.0), "h100-80gb", demands, ledger)
    assert plan is not None
    assert not ledger.findings
    assert (plan.instance, plan.nodes, plan.gpus_per_node, plan.slots, plan.rungs) == (None, 3, 8, (), ())
    assert plan.engines == (("large", 3), ("small", 5))
    assert plan.usd_per_hour == 120.0
    assert "does not know the cluster's nodes" in notes(ledger)


@pytest.mark.parametrize(
    ("keys", "path", "fix"),
    [
        ({"nodes": 1}, "pools.pool.nodes", "`nodes: 2`"),
        ({"gpus_per_node": 2}, "models.chat.tensor-parallel-size", "at most `tensor-parallel-size: 2`"),
        ({"disk": "10GB"}, "pools.pool.disk", "at least `disk: 42GB`"),
    ],
)
def test_what_a_cluster_cannot_have(keys: dict[str, Any], path: str, fix: str) -> None:
    ledger = Ledger([])
    place_on_cluster("pool", config(**keys), "h100-80gb", [demand("chat", 4, 3)], ledger)
    (finding,) = ledger.findings
    assert finding.path == path
    assert fix in finding.fix


# Without a ledger, and with the real catalog.


def test_candidates_are_compared_without_a_ledger() -> None:
    found = cheapest(config(), "h100-80gb", CATALOG, HERE, [demand("chat", 2, 3)])
    assert isinstance(found, Packing)
    assert (found.instance, found.nodes, found.usd_per_hour) == ("four", 2, 55.04)
    assert isinstance(cheapest(config(), "h100-80gb", CATALOG, HERE, [demand("chat", 16, 1)]), Misfit)


def test_a_price_of_the_stack_counts() -> None:
    plan, _ = placed(demand(), instance="one", usd_per_hour=2.0)
    assert plan.usd_per_hour == 4.0


@pytest.mark.parametrize("name", sorted(instances()))
def test_every_type_of_the_catalog_carries_an_engine_on_each_gpu(name: str) -> None:
    row = instances()[name]
    for region in row.usd_per_hour:
        ledger = Ledger([])
        plan = place("pool", config(instance=name), row.gpu, instances(), region, [demand(engines=row.gpus)], ledger)
        assert plan is not None, ledger.findings
        assert (plan.nodes, plan.idle_gpus) == (1, 0)
