"""Quotas: what a stack needs, what is said of what is missing, and what the account is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from infra import quotas, weights
from infra.catalog.quotas import quotas as known
from infra.plan.model import FleetPlan
from infra.planning import plan_stack_file

PLENTY = 10_000.0
P, P_SPOT, G, G_SPOT = "on-demand-p", "spot-p", "on-demand-g", "spot-g"


@pytest.fixture(scope="module")
def prod() -> FleetPlan:
    return plan_stack_file("prod", weights.load())


@pytest.fixture(scope="module")
def dev() -> FleetPlan:
    return plan_stack_file("dev", weights.load())


def given(**low: float) -> dict[str, float]:
    return {**dict.fromkeys(known(), PLENTY), **{name.replace("_", "-"): value for name, value in low.items()}}


def test_a_stack_needs_all_nodes_of_a_pool_in_each_way_to_get_them(prod: FleetPlan, dev: FleetPlan) -> None:
    wanted = quotas.needed(prod)

    assert wanted[P] == {"pools.h100": 192, "pools.a100": 96}
    assert wanted[P_SPOT] == {"pools.a100": 96}
    assert (quotas.needed(dev)[G], quotas.needed(dev)[G_SPOT]) == ({"pools.small": 4}, {"pools.small": 4})
    assert wanted["on-demand-standard"] == {"gateway": 6, "monitor": 2}
    assert {"vpcs", "elastic-ips", "nat-gateways", "network-balancers"} <= wanted.keys()


def test_a_network_that_is_there_already_needs_none(prod: FleetPlan) -> None:
    assert prod.on_aws
    network = prod.on_aws.network.model_copy(update={"vpc": "vpc-01", "internet": "none"})
    plan = prod.model_copy(update={"on_aws": prod.on_aws.model_copy(update={"network": network})})

    assert not {"vpcs", "elastic-ips", "nat-gateways"} & quotas.needed(plan).keys()


@pytest.mark.parametrize(
    ("instance", "kind", "quota"),
    [
        ("p5.48xlarge", "on-demand", P),
        ("p5.48xlarge", "reservation", P),
        ("p5.48xlarge", "capacity-block", None),
        ("p5.48xlarge", "spot", "spot-p5"),
        ("p4d.24xlarge", "spot", P_SPOT),
        ("g6e.xlarge", "on-demand", G),
        ("g6.xlarge", "spot", G_SPOT),
    ],
)
def test_machines_count_against_the_quota_of_their_family_and_market(
    prod: FleetPlan, instance: str, kind: str, quota: str | None
) -> None:
    assert prod.on_aws
    group = prod.on_aws.groups[0].model_copy(update={"instances": (instance,), "kind": kind})

    assert quotas.quota_of(group) == quota


def test_what_is_missing_is_said_with_the_command_that_asks_for_it(prod: FleetPlan) -> None:
    (said,) = quotas.findings(prod, given(on_demand_p=192))

    assert said.path == "pools.h100, pools.a100"
    assert said.message == (
        'quota "Running On-Demand P instances" (L-417A185B) in us-east-1 is 192 vCPU; this stack needs 288. '
        "Until it is raised, nodes are missing in the pool h100. "
        "Until it is raised, spot nodes serve in the pool a100. "
        "Ask for it with: aws service-quotas request-service-quota-increase --region us-east-1 --service-code ec2 "
        "--quota-code L-417A185B --desired-value 288"
    )


def test_enough_is_nothing_to_say_and_what_is_not_known_is_not_compared(prod: FleetPlan) -> None:
    assert quotas.findings(prod, given(on_demand_p=288)) == []
    assert quotas.findings(prod, {}) == []


def test_a_local_stack_needs_none(prod: FleetPlan) -> None:
    assert quotas.check(prod.model_copy(update={"on_aws": None})) == []


class Account(BaseHTTPRequestHandler):
    """Service Quotas of an account: one value of its own, one default, one that it may not see."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        method = self.headers["X-Amz-Target"].partition(".")[2]
        self.asked.append({"method": method, **body})
        code, own = body["QuotaCode"], method == "GetServiceQuota"
        if code == "L-417A185B" and own:
            self._answer(200, {"Quota": {"Value": 192.0}})
        elif code == "L-7212CCBC" and not own:
            self._answer(200, {"Quota": {"Value": 7.0}})
        elif code == "L-7212CCBC":
            self._answer(400, {"__type": "NoSuchResourceException", "Message": "no"})
        else:
            self._answer(400, {"__type": "AccessDeniedException", "Message": "no"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Account]]:
    handler = type("Handler", (Account,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    yield handler
    server.shutdown()
    server.server_close()


def test_the_account_says_its_own_value_or_the_default_and_what_it_hides_is_left_out(account: type[Account]) -> None:
    found = quotas.limits("us-east-1", [P, P_SPOT, "vpcs"])

    assert found == {P: 192.0, P_SPOT: 7.0}
    assert all(it["ServiceCode"] in {"ec2", "vpc"} for it in account.asked)


def test_the_preview_says_what_the_account_lacks(account: type[Account], prod: FleetPlan) -> None:
    del account
    assert [said.path for said in quotas.check(prod)] == ["pools.h100, pools.a100", "pools.a100"]


def test_without_credentials_nothing_is_asked_and_the_preview_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, prod: FleetPlan
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")

    assert quotas.limits("us-east-1", [P]) == {}
    (said,) = quotas.check(prod)
    assert "not compared" in said.message
    assert "Running On-Demand P instances (L-417A185B): 288 vCPU" in said.message


def test_an_aws_that_cannot_be_reached_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")

    assert quotas.limits("us-east-1", [P]) == {}
