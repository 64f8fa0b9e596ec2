"""The state of a stack on AWS as tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from infra.aws_status import HEALTHY, RUNNING, SHOWN
from infra.show import BAD, DIM, GOOD, NONE, spaced, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from infra.aws_status import AwsStatus, GroupStatus

LISTED = 8
"""Engines of a model that are named; `--json` has all."""
UNKNOWN = Text("?", style=BAD)


def status(found: AwsStatus) -> RenderableType:
    """How a stack is."""
    title = Text.assemble(
        f"stack {found.stack} in {found.region}, account {found.account}: ",
        ("as planned", GOOD) if not found.problems else ("not as planned", BAD),
    )
    groups = ("machines", "rung", "wanted", "in service", "pending", "terminating", "last failure")
    parts: list[RenderableType] = [
        title,
        table("", groups, _groups(found)),
        table("", ("model", "registered", "engines"), _models(found)),
        table("", ("server", "", ""), _servers(found)),
        table("", ("machine", "is to run"), _bundles(found)),
        table("", ("weights", "in the cache"), _weights(found)),
    ]
    problems = [Text(problem, style=BAD) for problem in found.problems]
    how = Text("How engines feel: the dashboards, `pulumi stack output dashboards`.", style=DIM)
    return spaced([*parts, Group(*problems, how)])


def _groups(found: AwsStatus) -> Iterator[tuple[str | Text, ...]]:
    for pool in found.pools or ():
        for group in pool.groups:
            yield _group(f"pool {pool.pool}", pool.serving >= pool.wanted, group)
        if not pool.groups:
            yield (f"pool {pool.pool}", NONE, str(pool.wanted), Text("0", style=BAD), "0", "0", "")
    if found.gateways and found.gateways.group:
        group = found.gateways.group
        yield _group("gateways", group.serving >= found.gateways.wanted, group)


def _group(name: str, whole: bool, group: GroupStatus) -> tuple[str | Text, ...]:  # noqa: FBT001 - of this file alone
    numbers = (group.pending, group.terminating)
    failure = f"{group.failed_at} {group.failure} {group.runbook}".strip()
    return (
        *(name, group.rung, str(group.wanted), Text(str(group.serving), style=GOOD if whole else BAD)),
        *map(str, numbers),
        failure,
    )


def _models(found: AwsStatus) -> Iterator[tuple[str | Text, ...]]:
    for model in found.models or ():
        more = len(model.engines) - LISTED
        names = ", ".join(model.engines[:LISTED]) + (f" … {more} more (--json)" if more > 0 else "")
        there = Text(f"{len(model.engines)} of {model.wanted}", style=BAD if model.problem else GOOD)
        yield (model.model, there, names)


def _servers(found: AwsStatus) -> Iterator[tuple[str | Text, ...]]:
    if found.gateways is None:
        yield ("gateways", UNKNOWN, "")
    else:
        style = BAD if found.gateways.problem else GOOD
        others = ", ".join(f"{name} {health}" for name, health in found.gateways.targets if health != HEALTHY)
        healthy = Text(f"{found.gateways.healthy} of {found.gateways.wanted} healthy", style=style)
        yield ("gateways", healthy, others)
    if found.monitor is None:
        yield ("monitor", UNKNOWN, "")
    else:
        style = GOOD if found.monitor.state == RUNNING else BAD
        yield ("monitor", Text(found.monitor.state or "missing", style=style), found.monitor.instance)


def _bundles(found: AwsStatus) -> Iterator[tuple[str | Text, ...]]:
    for row in found.bundles or ():
        yield (row.machine, row.bundle[:SHOWN] or Text("nothing", style=BAD))


def _weights(found: AwsStatus) -> Iterator[tuple[str | Text, ...]]:
    for row in found.weights or ():
        yield (row.entry, Text("yes", style=GOOD) if row.cached else Text("no", style=BAD))
