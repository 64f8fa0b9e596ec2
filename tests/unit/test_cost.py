"""What a fleet costs, where it begins to pay, and whether it is within its budget. The arithmetic is in the tests."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import show_cost
from infra.catalog import hosted_prices, instances
from infra.catalog.charges import charges
from infra.catalog.services import Service, services
from infra.config import BudgetConfig, HostedPriceConfig, TrafficConfig
from infra.plan.budget import check_budget
from infra.plan.cost import (
    Charged,
    Fall,
    Rented,
    Served,
    Traffic,
    fall,
    host_rent,
    note_overload,
    plan_cost,
    pool_rent,
    priced,
)
from infra.plan.hosted import Hosted, SelfHosted, break_even, hosted
from infra.plan.ledger import Ledger
from infra.plan.model import CostPlan, HostedCost, RungPlan
from infra.plan.money import usd
from infra.plan.traffic import request_tokens, requests_per_month
from tests.unit.costs import GATEWAY, H100, MONITOR, pool, served, speed, text

MID = Hosted("a/mid", "large", 1.0, 5.0, "list, 2026-11")
LOW = Hosted("b/low", "small", 0.5, 5.0, "list, 2026-11")
LEAST = Hosted("c/least", "small", 0.1, 2.0, "list, 2026-11")
FREE = Hosted("d/free", "", 0.0, 0.0, "prices.hosted.d/free")


DISKS = Charged("all disks", "300 GB", 0.5, "us-east-1, 2026-11")


def fleet(*others: Hosted) -> CostPlan:
    return plan_cost([H100, GATEWAY, MONITOR], [served()], others)


def only(rows: tuple[HostedCost, ...]) -> HostedCost:
    assert len(rows) == 1
    return rows[0]


# Money


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (12.294, "$12.29"),
        (8972.4, "$8,972"),
        (0.042, "$0.042"),
        (0.5, "$0.50"),
        (0.00022, "$0.00022"),
        (0.0, "$0.00"),
        (-3.1, "-$3.10"),
        (999.999, "$1,000"),
        (999.99, "$999.99"),
        (-0.0, "$0.00"),
        (1_234_567.8, "$1,234,568"),
    ],
)
def test_dollars(amount: float, text: str) -> None:
    assert usd(amount) == text


@given(st.floats(1e-7, 1e9))
def test_dollars_say_the_amount_to_half_a_percent_or_half_a_cent(amount: float) -> None:
    read = float(usd(amount).replace("$", "").replace(",", ""))
    assert math.isclose(read, amount, rel_tol=0.051 if amount < 1 else 0.0051)


# The bill


def test_a_fleet_is_the_sum_of_its_machines() -> None:
    cost = fleet()
    # 2 x 55.04 + 2 x 0.09 + 0.10 = 110.36; x 730 = 80,562.80
    assert cost.usd_per_hour == pytest.approx(110.36)
    assert cost.usd_per_month == pytest.approx(80_562.80)
    assert [(line.name, line.count) for line in cost.lines] == [("h100", 2), ("gateway", 2), ("monitor", 1)]
    assert [line.usd_per_hour for line in cost.lines] == pytest.approx([110.08, 0.18, 0.10])


def test_what_is_charged_beside_machines_is_a_line_and_divided_among_the_models() -> None:
    pools = [Rented("p", "i", 1, 3.0, "", gpus=8), Rented("q", "i", 1, 1.0, "", gpus=8)]
    cost = plan_cost(pools, [served("a", "p"), served("b", "q")], [], charged=[DISKS], by_use=["data ($0.09/GB)"])
    line = cost.lines[-1]
    assert (line.name, line.what, line.count, line.usd_per_hour) == ("all disks", "300 GB", 0, 0.5)
    assert cost.usd_per_hour == pytest.approx(4.5)
    # a has 3/4 of the pools: 3 + 0.375.
    assert [it.usd_per_hour for it in cost.models] == pytest.approx([3.375, 1.125])
    said = " ".join(cost.assumptions)
    assert "all disks" in said
    assert "Machines only" not in said
    assert "not counted: data ($0.09/GB)." in said
    assert "Machines only" in " ".join(plan_cost(pools, [served(pool="p")], []).assumptions)


def test_capacity_and_tokens_of_one_model() -> None:
    chat = fleet().models[0]
    # 8 engines x 2 requests/s x 730 h x 3,600 s = 42,048,000
    assert chat.capacity_requests_per_month == 42_048_000
    assert chat.utilisation == pytest.approx(1_000_000 / 42_048_000)
    # A request takes 1/2 s of an engine, its prompt 1,000 / 10,000 = 0.1 s of that: 20 %.
    # Prompts: 80,562.80 x 0.2 / 1,000 Mtok; answers: 80,562.80 x 0.8 / 200 Mtok.
    assert chat.usd_per_mtok_input == pytest.approx(16.11256)
    assert chat.usd_per_mtok_output == pytest.approx(322.2512)
    assert chat.usd_per_month == pytest.approx(80_562.80)
    assert (chat.error_percent, chat.measured) == (30, False)


def test_traffic_that_cannot_be_served_makes_no_token_cheaper() -> None:
    full, over = (
        plan_cost([H100], [served(traffic=Traffic(requests, 1000, 200))], []) for requests in (42_048_000, 100_000_000)
    )
    assert over.models[0].usd_per_mtok_input == pytest.approx(full.models[0].usd_per_mtok_input)
    ledger = Ledger([])
    note_overload(full, ledger)
    assert not ledger.notices
    note_overload(over, ledger)
    # 100,000,000 / 42,048,000 = 2.378; x 8 engines = 19.03
    assert [(notice.path, notice.message) for notice in ledger.notices] == [
        (
            "models.chat.traffic",
            "100,000,000 requests a month are 238% of what 8 engines do without a pause: at least 20 are needed",
        )
    ]


def test_no_traffic_has_no_price_per_token() -> None:
    chat = plan_cost([H100], [served(traffic=Traffic(0, 1000, 200))], [MID]).models[0]
    assert (chat.usd_per_mtok_input, chat.usd_per_mtok_output, chat.utilisation) == (None, None, 0)


def test_cached_prompts_that_were_measured_leave_a_price_to_answers() -> None:
    # 20 requests/s are measured, though prompts alone would take 0.1 s each: 1,000 of 1,200 tokens are prompts.
    chat = plan_cost([H100], [served(speed=speed(requests_s=20, measured=True))], []).models[0]
    assert chat.usd_per_mtok_input == pytest.approx(110.08 * 730 / 1200)
    assert chat.usd_per_mtok_output == pytest.approx(110.08 * 730 / 1200)


def test_models_share_a_pool_by_the_gpus_that_they_hold() -> None:
    shared = Rented("mixed", "p4d.24xlarge", 1, 10.0, "", gpus=8)
    alone = Rented("alone", "g6.xlarge", 2, 1.0, "", gpus=1)
    hosts = Rented("gateway", "c7i.large", 1, 1.2, "")
    cost = plan_cost(
        [shared, alone, hosts],
        [served("a", "mixed", 3, 1), served("b", "mixed", 1, 2), served("c", "alone", 2, 1)],
        [],
    )
    # a holds 3 of 5 GPUs in use and b 2 (3 are idle): $6 and $4; c has $2. Hosts: 1.2 x 6/12, 4/12, 2/12.
    assert [it.usd_per_hour for it in cost.models] == pytest.approx([6.6, 4.4, 2.2])


SIZES = st.integers(1, 64)
PRICES = st.floats(0.01, 1000)


@given(SIZES, SIZES, SIZES, PRICES, PRICES)
def test_models_pay_for_the_whole_fleet(a: int, b: int, nodes: int, node: float, host: float) -> None:
    rented = [Rented("p", "i", nodes, node, "", gpus=8), Rented("gateway", "g", 2, host, "")]
    cost = plan_cost(rented, [served("a", "p", a, 2), served("b", "p", b, 1)], [])
    assert sum(it.usd_per_hour for it in cost.models) == pytest.approx(cost.usd_per_hour)


@given(SIZES, SIZES, PRICES)
def test_cost_is_linear_in_nodes(nodes: int, factor: int, node: float) -> None:
    one, many = (
        plan_cost([Rented("p", "i", count, node, "", gpus=8)], [served(pool="p")], [MID])
        for count in (nodes, nodes * factor)
    )
    assert many.usd_per_hour == pytest.approx(factor * one.usd_per_hour)
    assert many.models[0].usd_per_mtok_input == pytest.approx(factor * (one.models[0].usd_per_mtok_input or 0))


# Hosted


def test_break_even_within_the_fleet() -> None:
    row = only(fleet(MID).models[0].hosted)
    # A request is 1,000 x $1/M + 200 x $5/M = $0.002; 1,000,000 of them $2,000; 80,562.80 / 0.002 = 40,281,400.
    assert row.usd_per_request == pytest.approx(0.002)
    assert row.usd_per_month == pytest.approx(2000)
    assert row.break_even_requests == 40_281_400
    assert row.break_even_engines == 8
    # 40,281,400 / 42,048,000 = 95.8 %
    assert row.verdict == "pays from 40,281,400 requests a month, at 96% utilisation"


def test_break_even_of_a_fleet_that_has_to_grow() -> None:
    row = only(fleet(LOW).models[0].hosted)
    # $0.0015 a request: 80,562.80 / 0.0015 = 53.7 million, more than the 42.0 million that 8 engines can do. But half
    # of the GPUs are idle: one node with 8 engines costs 55.04 x 730 = 40,179.20, hosts 0.28 x 730 = 204.40; together
    # 40,383.60 / 0.0015 = 26,922,400 requests, for which 26,922,400 / 5,256,000 = 5.1 engines are needed.
    assert row.break_even_requests == 26_922_400
    assert row.break_even_engines == 6
    # 26,922,400 / (6 x 5,256,000) = 85.4 %
    assert row.verdict == "pays from 26,922,400 requests a month, at 85% utilisation, with 6 engines on 1 node"


def test_no_break_even_where_a_full_node_is_dearer() -> None:
    row = only(fleet(LEAST).models[0].hosted)
    # 40,179.20 / (8 x 5,256,000) = $0.00096 a request; hosted 1,000 x $0.1/M + 200 x $2/M = $0.0005.
    assert (row.break_even_requests, row.break_even_engines) == (None, None)
    assert row.verdict == "never: a full node answers a request for $0.00096, hosted it costs $0.00050"


def test_no_break_even_may_be_an_error_of_the_estimate() -> None:
    # A request for $0.00080 is less than $0.00096, and within 30 %.
    row = only(fleet(Hosted("e/near", "small", 0.4, 2.0, "")).models[0].hosted)
    assert row.break_even_requests is None
    assert row.verdict.startswith("perhaps never: ")
    assert row.verdict.endswith("the estimate may be wrong by 30 %")


def test_what_is_free_is_never_dearer() -> None:
    row = only(fleet(FREE).models[0].hosted)
    assert (row.usd_per_month, row.break_even_requests, row.verdict) == (0, None, "never: hosted is free")


def test_it_may_pay_now() -> None:
    cost = plan_cost([H100], [served(traffic=Traffic(41_000_000, 1000, 200))], [MID])
    # 41,000,000 x 0.002 = 82,000; 110.08 x 730 = 80,358.40
    assert only(cost.models[0].hosted).verdict == "pays now: saves $1,642 a month"


def test_a_fleet_grows_until_its_hosts_are_paid() -> None:
    own = SelfHosted(1, 1100.0, fixed_usd=1000.0, node_usd=100.0, engines_per_node=1, engine_requests=120_000)
    # A full node saves 120,000 x $0.001 = 120 and costs 100: 50 nodes pay for the hosts. (1,000 + 5,000) / 0.001.
    found = break_even(own, 0.001)
    assert found is not None
    assert found.requests == pytest.approx(6_000_000)
    assert (found.engines, found.nodes) == (50, 50)


@given(
    st.integers(1, 100),
    st.floats(0, 10_000),
    st.floats(1, 100_000),
    st.integers(1, 8),
    st.floats(1e3, 1e8),
    st.floats(1e-6, 1),
)
def test_at_the_break_even_both_cost_the_same_and_the_fleet_can_serve_it(  # noqa: PLR0913, PLR0917
    engines: int, fixed: float, node: float, per_node: int, each: float, price: float
) -> None:
    now = fixed + math.ceil(engines / per_node) * node
    own = SelfHosted(engines, now, fixed, node, per_node, each)
    found = break_even(own, price)
    if found is None:
        # However large the fleet, it is dearer: even at full load.
        assert own.usd_per_request_when_full >= price * (1 - 1e-9)
        return
    cost = now if found.nodes is None else fixed + found.nodes * node
    assert found.requests * price == pytest.approx(cost)
    assert found.requests <= found.engines * each * (1 + 1e-9)
    if found.nodes is not None:
        assert found.engines <= found.nodes * per_node


def test_prices_of_the_stack_go_before_the_catalog() -> None:
    row = next(iter(hosted_prices().values())).model_copy(
        update={"size": "large", "input_usd_per_mtok": 2.0, "source": "list", "date": "2026-11"}
    )
    mine = HostedPriceConfig.model_validate({"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 4.0})
    cheap = row.model_copy(update={"size": "small"})
    found = hosted({"a/m": row, "a/s": cheap}, {"a/m": mine, "own/one": mine})
    assert [(it.name, it.size, it.input_usd_per_mtok, it.price) for it in found] == [
        ("a/s", "small", 2.0, "list, 2026-11"),
        ("a/m", "large", 1.0, "prices.hosted.a/m"),
        ("own/one", "", 1.0, "prices.hosted.own/one"),
    ]


# Prices


def test_prices_of_instances_can_be_overridden() -> None:
    row = instances()["g6.xlarge"].model_copy(update={"usd_per_hour": {"eu-west-1": 0.9}})
    found = priced({"g6.xlarge": row, "g6.2xlarge": row}, {"g6.xlarge": 0.5}, "us-east-1")
    assert found["g6.xlarge"].usd_per_hour == {"eu-west-1": 0.9, "us-east-1": 0.5}
    assert found["g6.xlarge"].source == "prices.instances.g6.xlarge of the stack file"
    assert found["g6.2xlarge"] is row


def test_a_pool_is_paid_at_its_first_rung() -> None:
    assert pool_rent(pool()) == Rented("l4", "g6.xlarge", 3, 0.5, "at most", 1)
    own = pool(instance=None, rungs=(), usd_per_hour=6.0, gpus_per_node=4)
    assert pool_rent(own) == Rented("l4", "l4-24gb", 3, 2.0, "pools.l4.usd_per_hour", 4)
    assert pool_rent(pool(usd_per_hour=None)) is None


def rung(kind: str, usd_per_hour: float) -> RungPlan:
    return RungPlan.model_validate(
        {"kind": kind, "id": None, "instances": ["g6.xlarge"], "zones": [], "usd_per_hour": usd_per_hour, "basis": ""}
    )


def test_what_later_rungs_cost() -> None:
    spot, dear, block = rung("spot", 0.5), rung("on-demand", 0.8), rung("capacity-block", 0.8)
    # Three nodes at 0.80 rather than 0.50.
    spot_first = fall([pool(rungs=(spot, dear))])
    assert (spot_first.certainty, spot_first.dearest) == ("at most", (("l4", "on-demand"),))
    assert spot_first.more_usd_per_hour == pytest.approx(0.9)
    assert fall([pool(rungs=(dear, spot), usd_per_hour=2.4)]) == Fall()
    assert fall([pool(rungs=(spot,)), pool(rungs=(block,), usd_per_hour=2.4)]) == Fall("about")
    assert fall([pool(rungs=())]) == Fall()
    cost = plan_cost([H100], [served()], [], fall=Fall("at most", 0.9, (("l4", "on-demand"),)))
    assert cost.usd_per_hour == pytest.approx(110.08)
    assert cost.dearest_usd_per_hour == pytest.approx(110.98)
    # 110.08 x 730 = 80,358.40; 110.98 x 730 = 81,015.40
    assert show_cost.headline(cost) == "at most $80,358 a month, $110.08/h; $81,015 a month with l4 from on-demand"
    assert "with l4 from on-demand" in text(show_cost.cost(cost, explain=False))


def test_gateways_and_the_monitor_have_prices() -> None:
    rows = {"c7i.large": Service(use="gateway", usd_per_hour={"us-east-1": 0.09}, source="list", date="2026-11")}
    assert host_rent("gateway", 2, "us-east-1", rows) == Rented(
        "gateway", "c7i.large", 2, 0.09, "us-east-1, on demand, 2026-11"
    )
    assert host_rent("monitor", 1, "us-east-1", rows) is None
    assert host_rent("gateway", 2, "mars-1", rows) is None


def test_the_catalog_has_a_gateway_and_a_monitor_in_every_region() -> None:
    for region in {name for row in instances().values() for name in row.usd_per_hour}:
        assert all(region in row.usd for row in charges().values())
        assert host_rent("gateway", 1, region, services())
        assert host_rent("monitor", 1, region, services())


# Traffic


def wanted(requests: int | None = None, prompt: int | None = None, answer: int | None = None) -> TrafficConfig:
    written = {"requests-per-month": requests, "prompt-tokens": prompt, "answer-tokens": answer}
    return TrafficConfig.model_validate({key: value for key, value in written.items() if value is not None})


@pytest.mark.parametrize(
    ("asked", "context", "max_answer", "tokens"),
    [
        (None, 16_384, None, (1155, 211)),
        (wanted(), 16_384, 100, (1155, 100)),
        (wanted(), 1024, None, (813, 211)),
        (wanted(), 128, None, (96, 32)),
        (wanted(prompt=4000), 4096, None, (4000, 96)),
        (wanted(prompt=500, answer=50), 4096, None, (500, 50)),
    ],
)
def test_a_usual_request_fits_into_the_context(
    asked: TrafficConfig | None, context: int, max_answer: int | None, tokens: tuple[int, int]
) -> None:
    ledger = Ledger([])
    assert request_tokens("chat", asked, context, max_answer, ledger) == tokens
    assert not ledger.findings
    assert [origin.path for origin in ledger.origins] == [
        "models.chat.traffic.answer-tokens",
        "models.chat.traffic.prompt-tokens",
    ]


@given(st.integers(1, 100_000), st.none() | st.integers(1, 10_000), st.none() | st.integers(1, 10_000))
def test_defaults_never_make_a_request_too_long(context: int, prompt: int | None, answer: int | None) -> None:
    ledger = Ledger([])
    given_tokens = (prompt or 0) + (answer or 0)
    tokens = request_tokens("chat", wanted(prompt=prompt, answer=answer), context, None, ledger)
    assert min(tokens) >= 1
    too_long = given_tokens > context or (given_tokens >= context and None in {prompt, answer})
    assert bool(ledger.findings) == (sum(tokens) > context)
    assert bool(ledger.findings) == (too_long or context == 1)


def test_a_request_longer_than_the_context_is_refused() -> None:
    ledger = Ledger([])
    request_tokens("chat", wanted(prompt=4000, answer=200), 4096, None, ledger)
    (finding,) = ledger.findings
    assert (finding.path, finding.problem, finding.fix) == (
        "models.chat.traffic",
        "4000 tokens of prompt and 200 of answer are more than the context of 4096",
        "`models.chat.context: 4200` or more, or smaller requests",
    )


def test_traffic_that_is_not_given_is_half_of_what_the_engines_can_do() -> None:
    ledger = Ledger([])
    assert requests_per_month("chat", None, 1001.0, ledger) == 500
    assert requests_per_month("chat", wanted(), 1.0, ledger) == 1
    assert requests_per_month("chat", wanted(requests=7), 1001.0, ledger) == 7
    assert ledger.origins[-1].because == "written in the stack file"


# Budget


def budget(per_hour: float | None = None, per_month: float | None = None) -> BudgetConfig:
    return BudgetConfig.model_validate({"usd_per_hour": per_hour, "usd_per_month": per_month})


def refusals(
    limit: BudgetConfig, rented: list[Rented], models: list[Served], *, known: bool = True
) -> list[tuple[str, ...]]:
    ledger = Ledger([])
    check_budget(plan_cost(rented, models, []) if known else None, limit, rented, models, ledger)
    return [(finding.path, finding.problem, finding.fix) for finding in ledger.findings]


def test_within_the_budget() -> None:
    assert not refusals(budget(110.36, 80_562.80), [H100, GATEWAY, MONITOR], [served(engines=16)])
    assert not refusals(budget(), [H100], [served(engines=16)])


def test_a_budget_that_only_the_first_rungs_keep_is_said() -> None:
    ledger, models = Ledger([]), [served(engines=16)]
    cost = plan_cost([H100], models, [], fall=Fall("at most", 19.92, (("h100", "on-demand"),)))
    check_budget(cost, budget(120), [H100], models, ledger)
    assert not ledger.findings
    # 2 x 55.04 + 19.92 = 130.00
    assert "with `h100` from on-demand the fleet costs $130.00/h, $10.00 over" in str(ledger.notices)
    check_budget(cost, budget(130), [H100], models, quiet := Ledger([]))
    assert not quiet.notices


def test_what_is_charged_beside_machines_counts_in_the_budget() -> None:
    ledger, models = Ledger([]), [served(engines=16)]
    cost = plan_cost([H100, GATEWAY], models, [], charged=[DISKS])
    # 2 x 55.04 + 0.18 + 0.50 = 110.76; with one node instead of two 55.72.
    check_budget(cost, budget(110.3), [H100, GATEWAY], models, ledger)
    (found,) = ledger.findings
    assert found.problem == "the fleet costs $110.76/h, $0.46 over"
    check_budget(cost, budget(50), [H100, GATEWAY], models, other := Ledger([]))
    assert "($55.72 with one engine of each)" in other.findings[0].fix


def test_over_the_budget_by_the_hour() -> None:
    # 110.36 - 100 = 10.36 over; a pool of one node saves 55.04, for 8 of the 16 engines.
    assert refusals(budget(100), [H100, GATEWAY, MONITOR], [served(engines=16)]) == [
        (
            "budget.usd_per_hour",
            "the fleet costs $110.36/h, $10.36 over",
            "`models.chat.engines: 8`: pool h100 then needs 1 of its 2 nodes (saves $55.04/h)",
        )
    ]


def test_a_change_that_is_just_enough_is_named() -> None:
    (found,) = refusals(budget(55.32), [H100, GATEWAY, MONITOR], [served(engines=16)])
    assert found[2].startswith("`models.chat.engines: 8`")


def test_over_the_budget_by_the_month() -> None:
    (found,) = refusals(budget(per_month=60_000), [H100], [served(engines=16)])
    assert found[:2] == ("budget.usd_per_month", "the fleet costs $80,358 a month, $20,358 over")
    assert "engines: 8" in found[2]


def test_nodes_that_hold_no_engine_go_first() -> None:
    (found,) = refusals(budget(100), [H100], [served(engines=8)])
    assert found[2] == "`pools.h100.nodes: 1`, which hold its engines (saves $55.04/h)"


def test_the_fix_that_takes_fewest_gpus_is_named_first() -> None:
    pools = [Rented("p", "i", 2, 10.0, "", gpus=8)]
    # 9 GPUs on two nodes: an engine of `small` less, or one of `large`, which has two GPUs, is a node less.
    models = [served("large", "p", 2, 2), served("small", "p", 5, 1)]
    (found,) = refusals(budget(15), pools, models)
    assert found[2] == (
        "`models.small.engines: 4`: pool p then needs 1 of its 2 nodes (saves $10.00/h) or "
        "`models.large.engines: 1`: pool p then needs 1 of its 2 nodes (saves $10.00/h)"
    )


def test_several_models_may_have_to_shrink() -> None:
    pools = [Rented(name, "i", 2, 10.0, "", gpus=1) for name in ("p", "q")]
    models = [served("a", "p", 2, 1), served("b", "q", 2, 1)]
    (found,) = refusals(budget(20), pools, models)
    assert found[2] == "fewer engines of several models: with one of each the fleet costs $20.00/h"


def test_a_budget_may_be_too_small_for_anything() -> None:
    (found,) = refusals(budget(5), [Rented("p", "i", 1, 10.5, "", gpus=8)], [served(pool="p", engines=3)])
    assert found[2] == (
        "a cheaper `gpu`, fewer bits (`quantization`), or `budget.usd_per_hour: 11` ($10.50 with one engine of each)"
    )
    (found,) = refusals(budget(per_month=5), [Rented("p", "i", 1, 10.5, "", gpus=8)], [served(pool="p")])
    assert "`budget.usd_per_month: 7665`" in found[2]  # 10.5 x 730


def test_a_budget_without_prices_cannot_be_kept() -> None:
    assert refusals(budget(5), [], [served()], known=False) == [
        (
            "budget.usd_per_hour",
            "cannot be checked: the price of some nodes is not known",
            "write the price of a node: `pools.NAME.usd_per_hour` or `prices.instances`",
        )
    ]
    assert not refusals(budget(), [], [served()], known=False)


@given(SIZES, SIZES, st.integers(1, 8), PRICES, st.floats(0.01, 2000))
def test_a_fix_that_is_named_is_enough(a: int, b: int, gpus: int, node: float, limit: float) -> None:
    def rented(*engines: int) -> list[Rented]:
        nodes = math.ceil((engines[0] + engines[1] * gpus) / 8)
        return [Rented("p", "i", nodes, node, "", gpus=8)]

    models = [served("a", "p", a, 1), served("b", "p", b, gpus)]
    found = refusals(budget(limit), rented(a, b), models)
    assert bool(found) == (rented(a, b)[0].count * node > limit * (1 + 1e-9))
    if found and found[0][2].startswith("`models."):
        change, fewer = found[0][2].split("`")[1].split(": ")
        engines = (int(fewer), b) if change == "models.a.engines" else (a, int(fewer))
        assert min(engines) >= 1
        assert rented(*engines)[0].count * node <= limit * (1 + 1e-6)


# Tables


def test_costs_are_shown() -> None:
    cost = fleet(LEAST, LOW, MID)
    short, long = text(show_cost.cost(cost, explain=False)), text(show_cost.cost(cost, explain=True))
    for words in ("p5.48xlarge", "$110.36", "$80,563", "2%", "$16.11", "$322.25", "estimate ±30 %", "$2,000"):
        assert words in short
    assert "a/mid" in short
    assert "c/least" in short
    assert "b/low" not in short  # another small one is cheaper
    assert "--explain shows 1 more" in short
    assert "b/low" in long
    assert "list, 2026-11" in long
    assert "A month has 730 hours" in long
