"""Prometheus, its rules and the dashboard, against the live fleet."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from typing import Any

from infra.paths import NODECONFIG
from infra.render.dashboard import queries
from tests.fleets import Fleet
from tests.local.load import load


def ask(fleet: Fleet, path: str, **parameters: str) -> Any:
    url = f"{fleet.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]


def test_every_target_is_up(fleet: Fleet) -> None:
    def all_up() -> bool:
        targets = ask(fleet, "targets")["activeTargets"]
        return len(targets) == 6 and all(target["health"] == "up" for target in targets)

    fleet.until("two engines, agent, gateway, prometheus and alertmanager are up", all_up)


def test_every_rule_is_healthy_and_no_page_fires(fleet: Fleet) -> None:
    def evaluated() -> bool:
        rules = [rule for group in ask(fleet, "rules")["groups"] for rule in group["rules"]]
        return bool(rules) and all(rule["health"] == "ok" for rule in rules)

    fleet.until("every rule was evaluated without an error", evaluated)


def test_every_query_of_the_dashboard_finds_something(fleet: Fleet) -> None:
    asked = queries(json.loads((NODECONFIG / "monitoring" / "dashboards" / "fleet.json").read_text()))
    assert len(asked) >= 8

    def empty() -> list[str]:
        return [f"{title}: {expr}" for title, expr in asked if not ask(fleet, "query", query=plain(expr))["result"]]

    with load(fleet, clients=2, at_least=8):
        fleet.until("every query has a result", lambda: not empty())


def plain(expression: str) -> str:
    """A query without Grafana's own variables."""
    return expression.replace("$__rate_interval", "1m")
