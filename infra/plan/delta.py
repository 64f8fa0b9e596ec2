"""What an edit changes, in words: the new plan against the one that was deployed last.

The old one is JSON that another version may have written: what it does not have, or has in a shape that is not known
here, is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from infra.plan.model import Change
from infra.plan.money import HOURS_PER_MONTH, usd

if TYPE_CHECKING:
    from infra.plan.model import FleetPlan

Json = Mapping[str, Any]
SET = ("engines", "tensor_parallel_size", "gpu", "pool")
"""Of a model on GPUs: what its set of engines has, and not the model itself."""
MODEL = ("weights", "quantization", "format", "dtype", "context", "max_answer", "concurrency", *SET)
POOL = ("gpu", "instance", "nodes", "zones")
FLEET = ("target", "vllm_version")
LABELS = {
    "dtype": "computes in",
    "max_answer": "longest answer",
    "tensor_parallel_size": "GPUs of an engine",
    "vllm_version": "vLLM",
}
"""What a field is called, where its name does not say it."""
SUMMARY = {
    "models": ("weights", "format", "context", "engines"),
    "pools": ("instance", "gpu", "nodes"),
}
"""What is said of a part that is new."""


def delta(old: Json | None, new: FleetPlan) -> tuple[Change, ...]:
    """Every change of models, pools and cost.

    Args:
        old: JSON of the plan that was deployed last; None: nothing is deployed, and everything is new.
        new: What will be.
    """
    before = dict(old) if isinstance(old, Mapping) else {}
    after = new.model_dump(mode="json")
    return tuple(
        Change(path=path, what=what)
        for path, what in (
            *(("stack", words) for words in _fields(before, after, FLEET)),
            *_section("models", MODEL, before, after),
            *_section("pools", POOL, before, after),
            *_prices(before, after),
            *_cost(before, after),
        )
    )


def kept(plan: FleetPlan) -> dict[str, Any]:
    """What of a plan the next one will be compared with: a stack output, small enough to be read in a preview."""
    return plan.model_dump(
        mode="json",
        include={
            **dict.fromkeys(FLEET, True),
            "models": {"__all__": {"name", *MODEL}},
            "engines": {"__all__": {"model"}},
            "engine_sets": {"__all__": {"model", *SET}},
            "pools": {"__all__": {"name", *POOL}},
            "cost": {"usd_per_hour": True, "lines": {"__all__": {"name", "instance", "usd_per_hour_each"}}},
        },
    )


def _section(section: str, fields: Sequence[str], before: Json, after: Json) -> Iterator[tuple[str, str]]:
    """Parts that are new, that go, and that change."""
    if before and section not in before:  # a version that had none of them
        return
    old, new = _parts(section, before), _parts(section, after)
    for name in [*new, *(name for name in old if name not in new)]:
        path = f"{section}.{name}"
        if name not in old:
            yield path, f"new: {', '.join(_summary(section, new[name]))}"
        elif name not in new:
            yield path, "removed"
        else:
            yield from ((path, words) for words in _fields(old[name], new[name], fields))


def _parts(section: str, plan: Json) -> dict[str, dict[str, Any]]:
    """The models or the pools of a plan, by name; a model with its engines."""
    parts = {name: dict(part) for part in _mappings(plan.get(section)) if isinstance(name := part.get("name"), str)}
    if section == "models":
        listed = [engine.get("model") for engine in _mappings(plan.get("engines"))]
        for model, part in parts.items():
            if count := listed.count(model):
                part["engines"] = count
        for engines in _mappings(plan.get("engine_sets")):
            parts.get(str(engines.get("model")), {}).update({key: engines[key] for key in SET if key in engines})
    return parts


def _fields(old: Json, new: Json, fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        if field in old and field in new and old[field] != new[field]:
            yield f"{LABELS.get(field, field)} {_value(old[field])} → {_value(new[field])}"


def _summary(section: str, part: Json) -> Iterator[str]:
    for field in SUMMARY[section]:
        value = part.get(field)
        if value is not None:
            named = field in {"context", "engines", "nodes"}
            yield f"{field} {_value(value)}" if named else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(_value(item) for item in value) or "none"
    return "none" if value is None else str(value)


def _prices(before: Json, after: Json) -> Iterator[tuple[str, str]]:
    """What the same machines cost now."""
    old = {str(line.get("name")): line for line in _mappings(_cost_of(before).get("lines"))}
    for line in _mappings(_cost_of(after).get("lines")):
        was = old.get(line["name"], {})
        price, now = _number(was.get("usd_per_hour_each")), line["usd_per_hour_each"]
        if was.get("instance") == line["instance"] and price is not None and not math.isclose(price, now):
            yield f"cost.{line['name']}", f"{line['instance']} {usd(price)}/h → {usd(now)}/h each"


def _cost(before: Json, after: Json) -> Iterator[tuple[str, str]]:
    was, now = (_number(_cost_of(plan).get("usd_per_hour")) for plan in (before, after))
    if now is None:
        if was is not None:
            yield "cost", f"was {usd(was)}/h, is not known now"
        return
    month = f"{usd(now * HOURS_PER_MONTH)} a month"
    if was is None:
        yield "cost", f"{'' if before else 'new: '}{usd(now)}/h, {month}"
    elif not math.isclose(was, now):
        more = now - was
        percent = f" ({more / was:+.{0 if abs(more / was) >= 0.01 else 1}%})" if was else ""  # noqa: PLR2004
        yield "cost", f"{usd(was)}/h → {usd(now)}/h: {_signed(more)}/h{percent}, now {month}"


def _cost_of(plan: Json) -> Json:
    cost = plan.get("cost")
    return cost if isinstance(cost, Mapping) else {}


def _signed(amount: float) -> str:
    return f"+{usd(amount)}" if amount > 0 else usd(amount)


def _number(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mappings(value: Any) -> list[Json]:
    return [item for item in _list(value) if isinstance(item, Mapping)]
