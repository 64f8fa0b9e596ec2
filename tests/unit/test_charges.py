"""What a fleet on AWS is charged for beside machines. The arithmetic is in the tests."""

from __future__ import annotations

from typing import Any

import pytest

from infra import show_cost
from infra.catalog.charges import Charge, charges
from infra.config import parse
from infra.plan import make_plan
from infra.plan.charges import CACHE, DISKS, NAMES, NETWORK, by_use, charged, parts
from infra.plan.model import CostLine, FleetPlan
from tests.unit.costs import text
from tests.unit.inputs import GPU_LOCK

GIB = 1 << 30
CERTIFICATE = "arn:aws:acm:us-east-1:123456789012:certificate/0a1b"
PUBLIC = {"endpoint": "public", "clients": ["203.0.113.0/24"], "certificate": CERTIFICATE}


def plan(region: str = "us-east-1", **config: Any) -> FleetPlan:
    models = {"chat": {"weights": "llama-3.1-8b-instruct", "engines": 2}}
    raw = {"target": "aws", "models": models, "pools": {"p": {"instance": "p5.4xlarge", "zones": 2}}, **config}
    return make_plan("prod", parse(raw).in_region(region), GPU_LOCK, None, {})


def line(made: FleetPlan, name: str) -> CostLine:
    assert made.cost
    return next(it for it in made.cost.lines if it.name == name)


def test_each_line_is_what_its_parts_cost() -> None:
    made = plan(pools={"p": {"instance": "p5.4xlarge", "zones": 2, "disk": "100GB"}})
    # 100 GB are 93.1 GiB, 20 GB 18.6, 50 GB 46.6: 2 nodes, 2 gateways, the monitor with its metrics.
    assert line(made, DISKS).what == f"{2 * 94 + 3 * 19 + 47} GB"
    assert line(made, DISKS).usd_per_hour == pytest.approx(292 * 0.08 / 730)
    assert line(made, NETWORK).usd_per_hour == pytest.approx(0.045 + 0.005)
    assert line(made, CACHE).usd_per_hour == pytest.approx(
        GPU_LOCK.models[made.models[0].weights].size / GIB * 0.023 / 730
    )
    # a zone, 2 engines, a key, a secret
    assert line(made, NAMES).usd_per_hour == pytest.approx((0.5 + 2 * 0.1 + 1 + 0.4) / 730)
    assert line(made, "load balancer").usd_per_hour == pytest.approx(0.0225)


def test_a_public_balancer_has_an_address_in_each_zone_and_endpoints_cost_in_each() -> None:
    made = plan(aws={**PUBLIC, "network": {"interface-endpoints": True}})
    assert line(made, "load balancer").what == "1 public balancer, 2 addresses"
    assert line(made, "load balancer").usd_per_hour == pytest.approx(0.0225 + 2 * 0.005)
    assert line(made, NETWORK).what == "1 NAT gateway, 1 address, 20 interface endpoints"
    assert line(made, NETWORK).usd_per_hour == pytest.approx(0.05 + 20 * 0.01)


def test_models_with_the_same_weights_have_them_in_the_cache_once() -> None:
    one = {"weights": "llama-3.1-8b-instruct", "engines": 2}
    two = plan(models={"a": one, "b": one}, pools={"p": {"instance": "p5.48xlarge"}})
    assert line(two, CACHE).usd_per_hour == pytest.approx(line(plan(), CACHE).usd_per_hour)


def test_what_has_no_price_in_a_region_is_said_and_not_counted() -> None:
    made = plan()
    assert made.on_aws
    without = {
        name: row.model_copy(update={"usd": {}}) if name in {"nat-gateway", "logs"} else row
        for name, row in charges().items()
    }
    lines, unknown = charged(parts(made.on_aws, made.pools, []), "us-east-1", without)
    assert unknown == ("1 NAT gateway (NAT and endpoints)",)
    assert next(it for it in lines if it.name == NETWORK).what == "1 address"
    assert "logs that are written (price not known here)" in by_use(made.on_aws, "us-east-1", without)


def test_the_plan_says_what_it_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    row = charges()["gp3"].model_copy(update={"usd": {"eu-west-1": 0.088}})
    without: dict[str, Charge] = {**charges(), "gp3": row}
    monkeypatch.setattr("infra.plan.planner.charges", lambda: without)
    monkeypatch.setattr("infra.plan.planner.services", dict)
    monkeypatch.setattr("infra.plan.aws._host", lambda _use, _services: "c7i.large")
    assert [it.message for it in plan().notices if it.path == "cost"] == [
        "not counted: gateway, monitor; the catalog has no price in this region",
        "not counted: 292 GB (all disks); the catalog has no price in this region",
    ]


def test_what_is_charged_by_use_is_named_with_its_price() -> None:
    public, internal = plan(aws=PUBLIC).cost, plan().cost
    assert public
    assert internal
    said = "; ".join(public.by_use)
    assert "data to clients in the internet, after the first 100 GB a month ($0.090/GB)" in said
    assert "data through the NAT gateway ($0.045/GB)" in said
    assert "interface endpoints" not in said
    assert "internet" not in "; ".join(internal.by_use)
    assert "the NAT gateway ($0.045/GB)" in text(show_cost.cost(public, explain=True))
    assert "charged by use" in text(show_cost.cost(public, explain=False))


def test_other_targets_count_as_they_did() -> None:
    raw = {
        "target": "kubernetes",
        "models": {"chat": {"weights": "llama-3.1-8b-instruct"}},
        "pools": {"p": {"gpu": "h100-80gb", "usd_per_hour": 20}},
    }
    made = make_plan("k", parse(raw), GPU_LOCK, None, {})
    assert made.cost
    assert [it.name for it in made.cost.lines] == ["p"]
    assert "Machines only" in " ".join(made.cost.assumptions)
    assert made.cost.by_use == ()


def test_every_charge_that_a_plan_counts_is_in_the_catalog_with_a_unit_of_time() -> None:
    made = plan(aws={**PUBLIC, "network": {"interface-endpoints": True}})
    assert made.on_aws
    counted = {it.charge for it in parts(made.on_aws, made.pools, [1])}
    assert counted == {name for name, row in charges().items() if row.what is None}
    assert all(charges()[name].per in {"hour", "month", "GB-month"} for name in counted)
