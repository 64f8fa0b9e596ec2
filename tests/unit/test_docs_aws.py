"""docs/aws.md: its costs are what the plan says, what it names is there. `pytest --update-goldens` renews the costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from infra import weights
from infra.paths import ROOT
from infra.plan.model import FleetPlan
from infra.plan.money import per_month, usd
from infra.planning import plan_stack_file

PAGE = ROOT / "docs" / "aws.md"
BLOCK = re.compile(r"(<!-- costs: begin[^>]*-->\n)(.*?)(<!-- costs: end -->)", re.DOTALL)


def stacks() -> list[str]:
    """The stacks of this repository that are for AWS."""
    files = sorted((ROOT / "stacks").glob("Pulumi.*.yaml"))
    return [
        file.name.split(".")[1]
        for file in files
        if yaml.safe_load(file.read_text())["config"].get("vllm-fleet:target") == "aws"
    ]


def rows(plan: FleetPlan) -> list[str]:
    """A stack's lines of the table."""
    assert plan.cost
    lines = [
        f"| {plan.stack} | {line.name} | {line.what} | {usd(line.usd_per_hour)} | {usd(per_month(line.usd_per_hour))} |"
        for line in plan.cost.lines
    ]
    total = f"| **{plan.stack}** | all |  | **${plan.cost.usd_per_hour:.2f}** | **${plan.cost.usd_per_month:,.0f}** |"
    return [*lines, total]


def table() -> str:
    lock = weights.load()
    head = ["| stack | part | of | an hour | a month |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row for name in stacks() for row in rows(plan_stack_file(name, lock))), ""])


def test_the_cost_table_is_what_the_plan_says(request: pytest.FixtureRequest) -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = BLOCK.search(page)
    assert found
    if request.config.getoption("--update-goldens"):
        PAGE.write_text(BLOCK.sub(lambda it: it[1] + table() + it[3], page), encoding="utf-8")
        return
    assert found[2] == table(), "pytest tests/unit/test_docs_aws.py --update-goldens"


@pytest.mark.parametrize("page", [PAGE, *sorted((ROOT / "runbooks").glob("aws-*.md"))], ids=lambda page: page.name)
def test_every_link_and_file_that_it_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    named = re.findall(r"`((?:images|infra|tests|runbooks|requirements|stacks|policy)/[\w./-]+)`", text)
    missing = [it for it in links if not (page.parent / it).exists()] + [it for it in named if not (ROOT / it).exists()]
    assert missing == []


def test_every_key_of_the_config_that_it_names_is_known() -> None:
    schema = (ROOT / "stacks/stack.schema.json").read_text(encoding="utf-8")
    named = set(re.findall(r"`aws\.([a-z-]+)", PAGE.read_text(encoding="utf-8")))
    assert {key for key in named if f'"{key}"' not in schema} == set()
