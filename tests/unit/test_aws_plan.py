"""What a fleet on AWS is made of beside its pools: network, groups, load balancer; and what of it cannot be."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import parse
from infra.findings import ConfigError
from infra.plan import make_plan
from infra.plan.aws import PARTS, zone_plan
from infra.plan.model import AwsPlan, FleetPlan
from tests.unit.inputs import GPU_LOCK

MODELS = {"chat": {"weights": "llama-3.1-8b-instruct", "engines": 2}}
POOLS = {"gpus": {"gpu": "h100-80gb", "zones": 1}}
CERTIFICATE = "arn:aws:acm:us-east-1:123456789012:certificate/0a1b"


def plan(**config: Any) -> FleetPlan:
    """The plan of a stack on AWS."""
    raw = {"target": "aws", "models": MODELS, "pools": POOLS, **config}
    return make_plan("prod", parse(raw).in_region("us-east-1"), GPU_LOCK, None, {})


def on_aws(**config: Any) -> AwsPlan:
    found = plan(**config).on_aws
    assert found
    return found


def findings(aws: Any, **config: Any) -> dict[str, str]:
    """By path: what is wrong."""
    with pytest.raises(ConfigError) as caught:
        plan(aws=aws, **config)
    return {finding.path: f"{finding.problem}; {finding.fix}" for finding in caught.value.findings}


# The network


@given(st.integers(16, 20), st.sets(st.integers(1, PARTS - 1), min_size=1))
def test_no_two_subnets_overlap_whatever_zones_there_are(prefix: int, numbers: set[int]) -> None:
    cidr = f"10.64.0.0/{prefix}"
    zones = [zone_plan(cidr, f"use1-az{number}") for number in numbers]
    subnets = [ipaddress.ip_network(it) for zone in zones for it in (zone.private, zone.public)]
    assert all(subnet.subnet_of(ipaddress.ip_network(cidr)) for subnet in subnets)  # type: ignore[arg-type]
    assert all(not a.overlaps(b) for index, a in enumerate(subnets) for b in subnets[:index])
    assert min(subnet.num_addresses for subnet in subnets) >= 16  # the least that AWS takes


def test_a_zone_that_is_added_moves_no_other() -> None:
    one, two = (on_aws(pools={"gpus": {"gpu": "h100-80gb", "zones": zones}}).network.zones for zones in (2, 3))
    assert len(two) == len(one) + 1
    assert set(one) < set(two)


def test_gateways_are_in_the_same_two_zones_wherever_the_nodes_are() -> None:
    pools = [{"gpus": {"gpu": "h100-80gb", "zones": zones}} for zones in (1, 2, 3)]
    plans = [on_aws(), on_aws(gateway={"hosts": 1}), *(on_aws(pools=it) for it in pools)]
    assert {aws.gateway.zones for aws in plans} == {("use1-az4", "use1-az6")}
    assert {aws.monitor.zones for aws in plans} == {("use1-az4",)}
    for aws in plans:
        used = {zone for group in aws.groups for zone in group.zones}
        assert {zone.zone for zone in aws.network.zones} == used | {"use1-az4", "use1-az6"}


# Groups


def test_each_rung_is_a_group_with_a_name_that_stays() -> None:
    rungs = [{"reservation": "cr-01"}, {"reservation": "cr-02"}, "on-demand", {"spot": 0.5}]
    aws = on_aws(pools={"gpus": {"gpu": "h100-80gb", "capacity": rungs}})
    assert [group.name for group in aws.groups] == [
        "fleet-prod-engine-gpus-reservation-0",
        "fleet-prod-engine-gpus-reservation-1",
        "fleet-prod-engine-gpus-on-demand",
        "fleet-prod-engine-gpus-spot",
    ]
    assert [(group.minimum > 0, group.max_usd_per_hour is not None) for group in aws.groups] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]


def test_a_gateway_is_replaced_by_one_that_serves_already() -> None:
    for hosts in (1, 2, 3):
        gateway = on_aws(gateway={"hosts": hosts}).gateway
        assert gateway.min_healthy_percent == 100
        assert hosts * gateway.max_healthy_percent // 100 >= hosts + 1 == gateway.most
    assert plan().gateway.proxy_protocol


# The endpoint


@pytest.mark.parametrize(
    ("config", "tls", "port"),
    [
        ({}, None, 80),
        ({"aws": {"certificate": CERTIFICATE}}, "balancer", 443),
        ({"gateway": {"tls": {"certificate": "/etc/gateway.pem"}}}, "gateway", 443),
        ({"aws": {"hosted-zone": "Z0123456789"}, "gateway": {"hostname": "llm.example.com"}}, "balancer", 443),
    ],
)
def test_what_ends_tls(config: dict[str, Any], tls: str | None, port: int) -> None:
    balancer = on_aws(**config).balancer
    assert (balancer.tls, balancer.port) == (tls, port)


# Findings


@pytest.mark.parametrize(
    ("aws", "path", "said"),
    [
        ({"endpoint": "public"}, "aws.clients", "open to nobody"),
        ({"endpoint": "public", "clients": ["0.0.0.0/0"]}, "aws.certificate", "plain text"),
        ({"hosted-zone": "Z0123456789"}, "aws.hosted-zone", "gateway.hostname"),
        ({"network": {"vpc": "vpc-0123456789"}}, "aws.network.subnets", "is missing"),
        ({"network": {"subnets": ["subnet-0123456789"]}}, "aws.network.vpc", "is missing"),
        ({"network": {"internet": "none"}}, "aws.network.interface-endpoints", "interface-endpoints: true"),
        ({"network": {"internet": "none"}}, "aws.images.engine", "installs itself from the internet"),
        ({"network": {"cidr": "10.64.0.0/24"}}, "aws.network.cidr", "too small"),
        ({"network": {"cidr": "8.0.0.0/16"}}, "aws.network.cidr", "public"),
        ({"network": {"cidr": "10.64.0.1/16"}}, "aws.network.cidr", "write `10.64.0.0/16`"),
        ({"network": {"cird": "10.64.0.0/16"}}, "aws.network.cird", "did you mean `cidr`?"),
        ({"clients": ["10.0.0.0/33"]}, "aws.clients.0", "is not a network"),
        ({"certificate": "my-cert"}, "aws.certificate", "arn:aws:acm"),
        ({"images": {"engine": "ubuntu"}}, "aws.images.engine", "ami-…"),
        ({"tags": {"aws:team": "ml"}}, "aws.tags.aws:team", "cannot be the name of a tag"),
        ({"rollout": "never"}, "aws.rollout", "automatic"),
        ({"hub-token-arn": "hf_0123456789abcdef"}, "aws.hub-token-arn", "a token of the Hugging Face hub"),
    ],
)
def test_each_mistake_is_told_with_its_path_and_a_fix(aws: Any, path: str, said: str) -> None:
    assert said in findings(aws)[path]


def test_another_target_has_no_such_section() -> None:
    config = parse(
        {"target": "kubernetes", "models": MODELS, "pools": {"gpus": {"gpu": "l4-24gb"}}, "aws": {"tags": {}}}
    )
    assert [finding.path for finding in config.findings] == ["aws"]
