"""Quotas as an AWS says them that has Service Quotas and enforces them."""

from __future__ import annotations

import pytest

from infra import quotas, weights
from infra.planning import plan_stack_file
from tests.aws.standin import CREDENTIALS, StandIn


def test_the_preview_compares_what_the_account_has_with_what_prod_needs(
    aws: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": aws.url}.items():
        monkeypatch.setenv(name, value)
    plan = plan_stack_file("prod", weights.load())

    aws.control("quota", {"P": 192})
    short = [said.message for said in quotas.check(plan) if "L-417A185B" in said.message]
    aws.control("quota", {"P": 288})
    enough = [said.message for said in quotas.check(plan) if "L-417A185B" in said.message]
    aws.control("quota", {})

    assert [text.partition(". ")[0] for text in short] == [
        'quota "Running On-Demand P instances" (L-417A185B) in us-east-1 is 192 vCPU; this stack needs 288'
    ]
    assert enough == []
