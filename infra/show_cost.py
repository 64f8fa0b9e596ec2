"""Costs as tables in a terminal: of a plan, of an edit, and of the example that `fleet compare` works out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from infra.plan.money import per_month, usd

if TYPE_CHECKING:
    from infra.compare import Comparison, SetupBill
    from infra.plan.model import Change, CostPlan, HostedCost, ModelCost

NONE = "-"
DIM = "dim"
SHOWN = 3
"""So many pools are named."""
EXPLAIN = "`fleet plan --explain` names them, with their prices"
RIGHT = ">"
"""Begins the name of a column that is aligned to the right."""


def headline(plan: CostPlan) -> str:
    """What it costs, how sure that is, and what it may cost, in one line."""
    prefix = f"{plan.certainty} " if plan.certainty else ""
    text = f"{prefix}{usd(plan.usd_per_month)} a month, {usd(plan.usd_per_hour)}/h"
    if plan.dearest:
        text += f"; {usd(per_month(plan.dearest_usd_per_hour))} a month with {_dearest(plan)}"
    return text


def _dearest(plan: CostPlan) -> str:
    named = [f"{pool} from {rung}" for pool, rung in plan.dearest[:SHOWN]]
    more = len(plan.dearest) - len(named)
    return " and ".join([*named, *([f"{more} more pools"] if more > 0 else [])])


def cost(plan: CostPlan, *, explain: bool) -> RenderableType:
    """What a fleet costs; with `explain`, every hosted API, where prices are from, and what is assumed."""
    parts: list[RenderableType] = [_lines(plan, explain=explain), _models(plan), _hosted(plan, explain=explain)]
    if explain:
        parts += [
            _table("where hosted prices are from", ("hosted", "price"), _sources(plan)),
            _assumptions(plan.assumptions),
        ]
    return _spaced(parts)


def changes(found: Sequence[Change]) -> RenderableType:
    """What an edit changes against the plan that was deployed last."""
    if not found:
        return Text("no change of models, pools, machines or cost against what is deployed")
    rows = ((change.path, change.what) for change in found)
    cost = next((change.short for change in found if change.path == "cost"), "the same cost")
    down = [change.short for change in found if change.short and change.path != "cost"]
    first = "; ".join(["against what is deployed: " + cost, *down])
    return _spaced([Text(first, style="bold"), _table("changes", ("at", "change"), rows)])


def comparison(result: Comparison) -> RenderableType:
    """The worked example: rented, hosted, and from where on which is cheaper."""
    return _spaced(
        [
            Text(_summary(result), style="bold"),
            _setups(result),
            _hosted_bills(result),
            _assumptions(result.assumptions),
            _table("where prices are from", ("of", "price"), _price_sources(result)),
        ]
    )


# A plan


def _lines(plan: CostPlan, *, explain: bool) -> RenderableType:
    rows = [
        (
            *(line.name, line.what, usd(line.usd_per_hour_each) if line.count > 1 else "", usd(line.usd_per_hour)),
            *(usd(per_month(line.usd_per_hour)), line.price),
        )
        for line in plan.lines
    ]
    rows.append(("total", "", "", usd(plan.usd_per_hour), usd(plan.usd_per_month), plan.certainty))
    if plan.dearest:
        dearest = plan.dearest_usd_per_hour
        rows.append(("", f"with {_dearest(plan)}", "", usd(dearest), usd(per_month(dearest)), "at most"))
    table = _table("cost", ("", "of", ">each/h", ">all/h", ">a month", "price"), rows)
    if explain or not plan.by_use:
        return table
    return Group(table, Text(f"not counted: {len(plan.by_use)} things that are charged by use; {EXPLAIN}", style=DIM))


def _models(plan: CostPlan) -> Table:
    columns = (
        *("model", ">/h", ">/month", ">requests/month", ">tokens of one", ">can do/month", ">utilisation"),
        *(">/Mtok in", ">/Mtok out", "by"),
    )
    rows = (
        (
            *(it.model, usd(it.usd_per_hour), usd(it.usd_per_month), f"{it.requests_per_month:,}"),
            *(f"{it.prompt_tokens:,} + {it.answer_tokens:,}", f"{it.capacity_requests_per_month:,}"),
            *(f"{it.utilisation:.0%}", _money(it.usd_per_mtok_input), _money(it.usd_per_mtok_output), _by(it)),
        )
        for it in plan.models
    )
    return _table("what the models cost at their traffic", columns, rows)


def _hosted(plan: CostPlan, *, explain: bool) -> Table:
    shown = [(it, row) for it in plan.models for row in (it.hosted if explain else _cheapest(it.hosted))]
    rows = (
        (it.model, row.name, row.size, usd(row.usd_per_month), usd(it.usd_per_month), row.verdict) for it, row in shown
    )
    left = sum(len(it.hosted) for it in plan.models) - len(shown)
    title = "the same traffic at hosted APIs" + (f" (--explain shows {left} more)" if left else "")
    return _table(title, ("model", "hosted", "size", ">/month there", ">/month here", "self-hosting"), rows)


def _cheapest(rows: Sequence[HostedCost]) -> Iterator[HostedCost]:
    """The cheapest of each size at this traffic."""
    sizes = dict.fromkeys(row.size for row in rows)
    for size in sizes:
        yield min((row for row in rows if row.size == size), key=lambda row: row.usd_per_month)


def _sources(plan: CostPlan) -> Iterator[tuple[str, str]]:
    yield from dict.fromkeys((row.name, row.price) for it in plan.models for row in it.hosted)


# The example


def _summary(result: Comparison) -> str:
    parts = []
    for size in dict.fromkeys(row.size for row in result.hosted):
        costs = [row.usd_per_month for row in result.hosted if row.size == size]
        parts.append(f"hosted {size} models {usd(min(costs))} to {usd(max(costs))}")
    parts += [f"{bill.name} on {_count(bill.rent.engines, bill.gpu)} {_rent(bill)}" for bill in result.setups]
    return f"{result.requests:,} requests a month cost: {'; '.join(parts)}"


def _rent(bill: SetupBill) -> str:
    least = f" at least, {usd(bill.share.usd_per_month)} for its GPUs alone"
    return usd(bill.rent.usd_per_month) + (least if bill.share != bill.rent else "")


def _rents(result: Comparison) -> Iterator[tuple[str, SetupBill, ModelCost, str]]:
    """What is paid for, with a letter: whole instances, and the GPUs' share of them where not all are used."""
    letters = iter(ascii_uppercase)
    for bill in result.setups:
        yield next(letters), bill, bill.rent, _count(bill.instances, bill.instance)
        if bill.share.usd_per_hour != bill.rent.usd_per_hour:
            yield next(letters), bill, bill.share, f"{bill.share.engines}/{bill.gpus} {bill.instance}"


def _setups(result: Comparison) -> Table:
    columns = (
        *("", "model", "format", "GPUs", "paid for", ">/h", ">/month", ">/request", ">can do/month"),
        *(">utilisation", ">/Mtok in", ">/Mtok out", "by"),
    )
    rows = (
        (
            *(letter, bill.name, bill.format, _count(it.engines, bill.gpu), paid_for),
            *(usd(it.usd_per_hour), usd(it.usd_per_month), usd(it.usd_per_month / it.requests_per_month)),
            *(f"{it.capacity_requests_per_month:,}", f"{it.utilisation:.1%}"),
            *(_money(it.usd_per_mtok_input), _money(it.usd_per_mtok_output), _by(it)),
        )
        for letter, bill, it, paid_for in _rents(result)
    )
    return _table("self-hosted", columns, rows)


def _hosted_bills(result: Comparison) -> Table:
    rents = list(_rents(result))
    pays = (f">{letter} pays from" for letter, *_ in rents)
    columns = ("model", "size", ">/Mtok in", ">/Mtok out", ">/request", ">/month", *pays)
    rows = (
        (
            *(row.name, row.size, usd(row.input_usd_per_mtok), usd(row.output_usd_per_mtok)),
            *(usd(row.usd_per_request), usd(row.usd_per_month)),
            *(_pays_from(it, it.hosted[index]) for *_, it, _ in rents),
        )
        for index, row in enumerate(result.hosted)
    )
    return _table(
        "hosted, and the requests a month (GPUs, utilisation) from which self-hosting is cheaper", columns, rows
    )


def _pays_from(it: ModelCost, row: HostedCost) -> str:
    if row.break_even_requests is None or row.break_even_engines is None:
        return "perhaps never" if row.verdict.startswith("perhaps") else "never"
    busy = row.break_even_requests / row.break_even_engines / it.capacity_requests_per_month * it.engines
    return f"{row.break_even_requests:,} ({row.break_even_engines}, {busy:.0%})"


def _price_sources(result: Comparison) -> Iterator[tuple[str, str]]:
    yield from dict.fromkeys((bill.instance, bill.price) for bill in result.setups)
    yield from ((row.name, row.price) for row in result.hosted)


# Parts of them


def _count(count: int, what: str) -> str:
    return f"{count:,} x {what}"


def _by(it: ModelCost) -> str:
    return "measured" if it.measured else f"estimate ±{it.error_percent} %"


def _money(amount: float | None) -> str:
    return NONE if amount is None else usd(amount)


def _assumptions(lines: Iterable[str]) -> Text:
    return Text("\n").join([Text("assumptions", style="bold"), *(Text(f"- {line}", style=DIM) for line in lines)])


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(RIGHT) else "left"
        table.add_column(column.removeprefix(RIGHT), header_style=DIM, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _spaced(parts: Iterable[RenderableType]) -> Group:
    return Group(*(line for part in parts for line in (part, "")))
