"""What the plan says of the machines that an edit moves is what the resources do.

Of the edits of tests/aws/test_edits.py the real engine has said that (tests/aws/golden/edits.txt); others are compared
with the graph on mocks. golden/moves.txt is what the person who pays reads of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pulumi
import pytest

from infra import program, quotas, show_cost, weights
from infra.plan.delta import kept
from infra.plan.model import Change
from infra.planning import changes
from infra.render.machines import fingerprint
from tests.aws.standin import PROD
from tests.aws.test_edits import EDITS, put
from tests.program.aws_graph import Graph, config_of, graph_of
from tests.program.test_aws_cost import plan_of

GOLDEN = Path(__file__).with_name("golden") / "moves.txt"
Config = dict[str, Any]


def without_a_pool(config: Config) -> None:
    del config["vllm-fleet:pools"]["a100"]
    del config["vllm-fleet:models"]["fast"]


MORE: dict[str, Callable[[Config], None]] = {
    "two nodes, other context": put("models", "chat", context=8192),
    "two nodes, larger volume": put("pools", "h100", disk="300GB"),
    "two nodes, one of which is to go": put("models", "chat", engines=4),
    "no spot any more": put("pools", "a100", capacity=["on-demand"]),
    "spot first": put("pools", "a100", capacity=[{"spot": 0.7}, "on-demand"]),
    "a pool less": without_a_pool,
    "images of our own": put("aws", images=dict.fromkeys(("engine", "gateway", "monitor"), "ami-0b0000000000022a4")),
}
"""Edits that tests/aws has no time for."""


MACHINES = ("gateway", "monitor", "engine-h100", "engine-a100")
REAL = Path(__file__).parents[1] / "aws" / "golden" / "edits.txt"


@dataclass
class Moved:
    """Machines that an edit moves."""

    replaced: set[str] = field(default_factory=set)
    other_bundle: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    """Some of them, without a drain."""


def configs(edit: str) -> tuple[Config, Config]:
    """The stack before an edit, and after it."""
    before = config_of("prod", **PROD)
    if edit.startswith("two nodes"):
        put("models", "chat", engines=8)(before)
    after = json.loads(json.dumps(before))
    (EDITS | MORE)[edit](after)
    return before, after


@cache
def said(edit: str) -> tuple[Change, ...]:
    """What the plan says of an edit."""
    before, after = configs(edit)
    lock = weights.load()
    old = plan_of("prod", before)
    output = json.loads(json.dumps(kept(old, fingerprint(old, lock))))
    return changes(output, plan_of("prod", after), lock)


def said_to_move(edit: str) -> Moved:
    """The same, as what moves."""
    found = Moved()
    for change in said(edit):
        if change.path.startswith("machines."):  # `machines` alone is about all
            name = change.path.removeprefix("machines.")
            if "replaced" in change.what:
                found.replaced.add(name)
            elif "without a drain" in change.what:
                found.ended.add(name)
            elif "files" in change.what or "engines" in change.what:
                found.other_bundle.add(name)
    return found


def machine(group: str) -> str:
    """The machine of a group or of a template: `engine-a100` of `engine-a100-spot`."""
    return next(name for name in MACHINES if group == name or group.startswith(f"{name}-"))


def really_moved() -> dict[str, Moved]:
    """By edit, what the real engine says."""
    found: dict[str, Moved] = {}
    for line in REAL.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            found[line] = moved = Moved()
        elif line.startswith("    -> ") and ": " in line:
            name, how = line.removeprefix("    -> ").split(": ")
            what = {"takes up another bundle": moved.other_bundle, "machines end": moved.ended}
            what.get(how, moved.replaced).add(machine(name))
    return found


def graph(config: Config, folder: Path) -> Graph:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return graph_of(monkeypatch, folder, "prod", config)


def templates(graph: Graph) -> dict[str, str]:
    """What a machine is replaced for, by its group."""
    found = {}
    for made in [*graph.of("LaunchTemplate"), *graph.of("Instance")]:
        inputs = {key: it for key, it in made.inputs.items() if key not in {"tags", "tagSpecifications"}}
        if made.type == "Instance":  # another size changes it where it is, its volume too
            inputs = {key: inputs[key] for key in ("userDataBase64", "ami")}
        found[made.name] = json.dumps(inputs, sort_keys=True, default=str)
    return found


def bundles(graph: Graph) -> dict[str, str]:
    """The key of each machine's bundle."""
    objects = [it for it in graph.of("BucketObjectv2") if it.name.startswith("bundle-")]
    return {it.name.removeprefix("bundle-"): it.inputs["key"] for it in objects}


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_said_to_move_is_what_the_real_engine_moves(edit: str) -> None:
    moved, expected = said_to_move(edit), really_moved()[edit]
    assert moved.replaced == expected.replaced
    assert moved.other_bundle == expected.other_bundle - expected.replaced
    assert moved.ended == expected.ended


@pytest.mark.parametrize("edit", MORE)
def test_what_is_said_to_move_moves_on_mocks(edit: str, tmp_path: Path) -> None:
    was, now = (graph(config, tmp_path) for config in configs(edit))
    groups = {it.name for it in was.of("Group")} - {it.name for it in now.of("Group")}
    moved = said_to_move(edit)
    assert moved.replaced == {
        machine(it) for it, text in templates(was).items() if templates(now).get(it, text) != text
    }
    assert moved.ended == {machine(it) for it in groups}
    other = {it for it, key in bundles(was).items() if bundles(now).get(it, key) != key}
    assert moved.other_bundle == other - moved.replaced


def test_what_the_payer_reads_of_each_edit(golden: Callable[[Path, str], None]) -> None:
    lines = []
    for edit in EDITS | MORE:
        view = show_cost.changes(said(edit))
        lines += [f"# {edit}", *(f"    {line}".rstrip() for line in program.text(view).splitlines()), ""]
    golden(GOLDEN, "\n".join(lines))


def test_a_preview_says_what_an_edit_changes_against_the_stacks_own_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numbers of an output come back as floating point."""
    edit = "engines of chat: 4 -> 8, which need another node"
    before, after = configs(edit)
    lock, old = weights.load(), plan_of("prod", before)
    output = json.loads(json.dumps(kept(old, fingerprint(old, lock))), parse_int=float)
    told: list[str] = []
    monkeypatch.setattr(pulumi.runtime, "is_dry_run", lambda: True)
    monkeypatch.setattr(pulumi.log, "info", told.append)
    monkeypatch.setattr(quotas, "limits", lambda _region, _names: {})
    monkeypatch.setattr(program, "_check_credentials", lambda _plan: None)
    monkeypatch.setattr(pulumi.StackReference, "get_output", lambda _self, _name: pulumi.Output.from_input(output))

    graph_of(monkeypatch, tmp_path, "prod", after)

    plan, changed = told
    assert plan.startswith("stack prod on aws us-east-1")
    assert changed == program.text(show_cost.changes(said(edit)))
