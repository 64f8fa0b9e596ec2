"""What an edit changes, in words: the new plan against the one that was deployed last.

The old one is JSON that another version may have written: what it does not have, or has in a shape that is not known
here, is not compared. Which machines move is told from digests of what they run and boot from, which
infra/render/machines.py makes: an engine drains where its own files change, a node where what it boots from does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.plan.model import Change
from infra.plan.money import per_month, usd

if TYPE_CHECKING:
    from infra.plan.model import FleetPlan, PoolPlan

Json = Mapping[str, Any]
SET = ("engines", "tensor_parallel_size", "gpu", "pool")
"""Of a model on GPUs: what its set of engines has, and not the model itself."""
MODEL = ("weights", "quantization", "format", "dtype", "context", "max_answer", "concurrency", *SET)
POOL = ("gpu", "instance", "nodes", "zones", "capacity")
RUNG = {"kind", "id", "usd_per_hour"}
"""Of a way to get nodes."""
FLEET = ("target", "vllm_version")
LINE = {"name", "instance", "count", "usd_per_hour_each", "usd_per_hour"}
"""Of a line of the cost."""
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


def delta(old: Json | None, new: FleetPlan, machines: Json | None = None) -> tuple[Change, ...]:
    """Every change of models, pools, machines and cost.

    Args:
        old: JSON of the plan that was deployed last; None: nothing is deployed, and everything is new.
        new: What will be.
        machines: Fingerprint of its machines; None: which of them move is not said.
    """
    before = _whole(dict(old)) if isinstance(old, Mapping) else {}
    after = new.model_dump(mode="json")
    config = (
        *(("stack", words) for words in _fields(before, after, FLEET)),
        *_section("models", MODEL, before, after),
        *_section("pools", POOL, before, after),
    )
    return (
        *(Change(path=path, what=what) for path, what in config),
        *(Moves(before, new, machines).found() if machines and before else ()),
        *(Change(path=path, what=what) for path, what in _lines(before, after)),
        *(Change(path=path, what=what, short=what) for path, what in _cost(before, after)),
    )


def _whole(value: Any) -> Any:
    """The same with whole numbers as such: Pulumi hands all numbers of an output over as floating point."""
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def kept(plan: FleetPlan, machines: Json | None = None) -> dict[str, Any]:
    """What of a plan the next one will be compared with: a stack output, small enough to be read in a preview."""
    found = plan.model_dump(
        mode="json",
        include={
            **dict.fromkeys(FLEET, True),
            "models": {"__all__": {"name", *MODEL}},
            "engines": {"__all__": {"model"}},
            "engine_sets": {"__all__": {"model", *SET}},
            "pools": {"__all__": {"name": True, **dict.fromkeys(POOL, True), "rungs": {"__all__": RUNG}}},
            "cost": {"usd_per_hour": True, "lines": {"__all__": LINE}},
        },
    )
    return {**found, "machines": dict(machines)} if machines else found


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
    for part in parts.values():
        if rungs := _mappings(part.get("rungs")):
            part["capacity"] = " then ".join(_rung(it) for it in rungs)
    return parts


def _rung(rung: Json) -> str:
    """One way to get nodes: of spot, what a node may cost at most."""
    price = _number(rung.get("usd_per_hour"))
    limit = f" up to {usd(price)}/h" if rung.get("kind") == "spot" and price is not None else ""
    return f"{rung.get('kind')}{' ' + str(rung['id']) if rung.get('id') else ''}{limit}"


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


def _lines(before: Json, after: Json) -> Iterator[tuple[str, str]]:
    """What costs something else now, line by line: another price, or another number of another thing."""
    if not all(_list(_cost_of(it).get("lines")) for it in (before, after)):
        return
    old, new = ({str(it.get("name")): it for it in _mappings(_cost_of(it).get("lines"))} for it in (before, after))
    for name in [*new, *(name for name in old if name not in new)]:
        was, now = (_number(lines.get(name, NOTHING).get("usd_per_hour")) for lines in (old, new))
        if was is None or now is None or math.isclose(was, now, abs_tol=LEAST_USD):
            continue
        words = [_what(lines[name]) for lines in (old, new) if name in lines]
        prices = " → ".join(usd(it) for it in (was, now))
        yield f"cost.{name}", f"{' → '.join(dict.fromkeys(words))}: {prices}/h"


NOTHING: Json = {"usd_per_hour": 0.0}
LEAST_SHARE = 0.0005
"""What is less is no percentage that says anything."""
LEAST_USD = 5e-5
"""An hour, 4 cents a month: less is no change that anybody looks for."""


def _what(line: Json) -> str:
    """As `CostLine.what`."""
    count = line.get("count")
    return f"{_value(count)} x {line.get('instance')}" if count else str(line.get("instance"))


def _cost(before: Json, after: Json) -> Iterator[tuple[str, str]]:
    was, now = (_number(_cost_of(plan).get("usd_per_hour")) for plan in (before, after))
    if now is None:
        if was is not None:
            yield "cost", f"was {usd(was)}/h, is not known now"
        return
    certainty = str(_cost_of(after).get("certainty") or "")
    month = f"{certainty} {usd(per_month(now))} a month".lstrip()
    if was is None:
        yield "cost", f"{'' if before else 'new: '}{month}, {usd(now)}/h"
    elif not math.isclose(was, now, abs_tol=LEAST_USD):
        more = now - was
        part = abs(more / was) if was else 0
        percent = f" ({more / was:+.{0 if part >= 0.01 else 1}%})" if part >= LEAST_SHARE else ""  # noqa: PLR2004
        old = usd(per_month(was))
        change = f"still {month}" if old == usd(per_month(now)) else f"{old} → {month}"
        yield "cost", f"{_signed(per_month(more))} a month{percent}: {change}, {usd(now)}/h"


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


# Machines


@dataclass(frozen=True)
class Moves:
    """Which machines an edit moves on AWS, how, and what is down meanwhile; durations are the longest there can be."""

    before: Json
    new: FleetPlan
    machines: Json
    """Of the new plan."""

    def found(self) -> Iterator[Change]:
        """Every move; none where an older version did not keep what it is told from."""
        if not isinstance(self.before.get("machines"), Mapping):
            return
        yield from self._gone()
        for pool in self.new.pools:
            yield from self._nodes(pool)
            yield from self._pool(pool)
            yield from self._first_rung(pool)
        yield from self._hosts()
        if self.new.on_aws and self.new.on_aws.rollout == "manual" and self._bundles():
            what = "machines that run take up other files when you tell them: `aws.rollout: manual`"
            yield Change(path="machines", what=what)

    def _bundles(self) -> bool:
        """Whether any machine's files change."""
        return any(self._differs("runs", name) for name in _mapping(self.machines.get("runs")))

    def _was(self, part: str, name: str) -> Any:
        """What there was of a machine; None: it is new, or not known."""
        found = _mapping(_mapping(self.before.get("machines")).get(part))
        return found.get(name)

    def _differs(self, part: str, name: str) -> bool:
        was, now = self._was(part, name), _mapping(self.machines.get(part)).get(name)
        return was is not None and now is not None and was != now

    # Pools

    def _gone(self) -> Iterator[Change]:
        """Groups that go end their machines at once: whoever destroys a group does not wait for its drains."""
        pools = {pool.name for pool in self.new.pools}
        for part in _mappings(self.before.get("pools")):
            if (name := str(part.get("name"))) not in pools:
                what = f"{_nodes(part.get('nodes'))} taken away at once, without a drain: what streams is cut off"
                yield Change(path=f"machines.{ENGINE}{name}", what=what, short=f"pool {name} goes without a drain")
        boots = _mapping(_mapping(self.before.get("machines")).get("boots"))
        left = [name for name in boots if name not in _mapping(self.machines.get("boots"))]
        for name in left:
            if pool := next((it for it in sorted(pools, key=len, reverse=True) if f"-{ENGINE}{it}-" in name), None):
                what = f"the group {name} goes, and nodes that come from it, at once and without a drain"
                yield Change(path=f"machines.{ENGINE}{pool}", what=what, short=f"nodes from {name} go without a drain")

    def _nodes(self, pool: PoolPlan) -> Iterator[Change]:
        was = next((it.get("nodes") for it in _mappings(self.before.get("pools")) if it.get("name") == pool.name), None)
        path, aws = f"machines.{ENGINE}{pool.name}", self.new.aws
        if not isinstance(was, int) or aws is None:
            return
        if pool.nodes > was:
            yield Change(path=path, what=f"{_nodes(pool.nodes - was)} more, ready within {minutes(aws.launch_hook_s)}")
        elif pool.nodes < was:
            yield Change(path=path, what=f"{_nodes(was - pool.nodes)} less, drained within {minutes(aws.drain_hook_s)}")

    def _first_rung(self, pool: PoolPlan) -> Iterator[Change]:
        """Another first rung gets all nodes, and the others give theirs back when it has them."""
        was = next((it.get("rungs") for it in _mappings(self.before.get("pools")) if it.get("name") == pool.name), None)
        if pool.rungs and (rungs := _mappings(was)) and rungs[0].get("kind") != pool.rungs[0].kind:
            how = f"nodes come from {pool.rungs[0].kind} first: those from elsewhere drain when these are ready"
            yield Change(path=f"machines.{ENGINE}{pool.name}", what=how)

    def _pool(self, pool: PoolPlan) -> Iterator[Change]:
        """A pool's nodes: replaced whole, or engine by engine, or not touched."""
        machine, aws, timings = f"{ENGINE}{pool.name}", self.new.aws, self.new.timings
        groups = [it.name for it in self.new.on_aws.groups if it.pool == pool.name] if self.new.on_aws else []
        if aws is None:
            return
        if any(self._differs("boots", group) for group in groups):
            at_once = max(1, pool.nodes - math.ceil(pool.nodes * pool.min_healthy_percent / 100))
            each = aws.drain_hook_s + aws.launch_hook_s
            names = " and ".join(f"`{model}`" for model, _ in pool.engines)
            down = f"{names} down for up to {minutes(each)}" if pool.nodes == 1 else ""
            how = f"it drains, and another one gets ready, within {minutes(each)}"
            if pool.nodes > 1:
                everything = minutes(math.ceil(pool.nodes / at_once) * each)
                how = f"{at_once} at a time drain, others get ready, within {minutes(each)}; all within {everything}"
            yield self._change(machine, f"{_nodes(pool.nodes)} replaced: {how}", down)
        elif self._differs("runs", machine):
            yield self._engines(pool, machine, timings.drain_s + timings.stop_s + timings.start_s)

    def _engines(self, pool: PoolPlan, machine: str, each: int) -> Change:
        """What a pool's nodes do with another bundle: only engines whose own files changed are touched."""
        old = _mapping(_mapping(self._was("runs", machine)).get("engines"))
        new = _mapping(_mapping(_mapping(self.machines.get("runs")).get(machine)).get("engines"))
        moved = [name for name in new if name in old and old[name] != new[name]]
        fresh, gone = [it for it in new if it not in old], [it for it in old if it not in new]
        counts = dict(pool.engines)
        said, down = [], []
        if moved:
            models = sorted({_model_of(name) for name in moved})
            names = " and ".join(f"`{name}`" for name in models)
            all_of_them = minutes(pool.nodes * len(moved) * each)
            said.append(f"engines of {names} drain and restart one at a time, each within {minutes(each)}")
            if pool.nodes * len(moved) > 1:
                said[-1] += f", all within {all_of_them}"
            down = [f"`{name}` down for up to {minutes(each)}" for name in models if counts.get(name) == 1]
        if fresh:
            said.append(f"{len(fresh)} engines more on each node")
        if gone:
            said.append(f"{len(gone)} engines on each node drain and go")
        if not said:
            said.append("take up other files; no engine drains")
        return self._change(machine, "; ".join(said), "; ".join(down))

    def _change(self, machine: str, what: str, down: str) -> Change:
        """With what is down meanwhile, if anything."""
        return Change(path=f"machines.{machine}", what=f"{what}; {down}" if down else what, short=down)

    # Others

    def _hosts(self) -> Iterator[Change]:
        if self._differs("boots", "gateway"):
            yield self._change("gateway", "replaced one by one: a new one serves before an old one drains", "")
        elif self._differs("runs", "gateway"):
            yield self._change("gateway", "take up other files, one at a time; nothing is cut off", "")
        if self._differs("boots", "monitor"):
            yield self._change("monitor", "replaced: no dashboards and alerts meanwhile, its metrics stay", "")
        elif self._differs("runs", "monitor"):
            yield self._change("monitor", "takes up other files", "")


ENGINE = "engine-"
"""What machines of a pool are called, before the pool's name."""
MINUTE_S, HOUR_S = 60, 3600


def minutes(seconds: float) -> str:
    """A limit for people, rounded up: 45 s, 12 min, 3.5 h."""
    if seconds < 2 * MINUTE_S:
        return f"{math.ceil(seconds)} s"
    if seconds < 2 * HOUR_S:
        return f"{math.ceil(seconds / MINUTE_S)} min"
    return f"{math.ceil(10 * seconds / HOUR_S) / 10:,g} h"


def _model_of(engine: str) -> str:
    """The model of `chat-1`."""
    return engine.rpartition("-")[0]


def _nodes(count: Any) -> str:
    return f"{_value(count)} node{'s' * (count != 1)}"


def _mapping(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}
