"""When a pool has its nodes: days of the week, and the hours of those days."""

from __future__ import annotations

import re
import zoneinfo
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from infra.config.strict import Strict
from infra.config.units import refusal
from infra.findings import nearest, show

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_CLOCK = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d")
_DAYS_FIX = "one range or a list, such as `mon-fri` or `mon,wed,fri`"
_SEXAGESIMAL = 24 * 60
"""YAML 1.1 reads 07:00 without quotes as a number: minutes."""


def day_list(value: Any) -> tuple[int, ...]:
    """Days of the week, 0 is Monday, from a text such as `mon-fri` or `mon,wed`."""
    if not isinstance(value, str):
        raise refusal(f"must be text, not {show(value)}", _DAYS_FIX)
    found: set[int] = set()
    for part in value.lower().replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        for name in (first, last) if dash else (first,):
            if name not in DAYS:
                near = nearest(name[:3], DAYS)
                raise refusal(f"{show(name)} is no day", f"did you mean `{near}`?" if near else _DAYS_FIX)
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found.update(day % len(DAYS) for day in range(begin, end + 1 if end >= begin else end + 1 + len(DAYS)))
    return tuple(sorted(found))


def clock(value: Any) -> str:
    """A time of the day."""
    if isinstance(value, str) and _CLOCK.fullmatch(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _SEXAGESIMAL:
        raise refusal(f"{show(value)} is no time", f'in quotes: "{value // 60:02}:{value % 60:02}"')
    raise refusal(f"{show(value)} is no time", 'hours and minutes, in quotes: "07:30"')


def zone_name(value: Any) -> str:
    """Name of a time zone."""
    known = zoneinfo.available_timezones()
    if isinstance(value, str) and (value in known or (not known and value)):
        return value
    near = nearest(str(value), sorted(known))
    fix = f"did you mean `{near}`?" if near else "a name such as `Europe/Berlin`, or `UTC`"
    raise refusal(f"{show(value)} is no time zone", fix)


_Clock = Annotated[str, BeforeValidator(clock), WithJsonSchema({"type": "string", "pattern": f"^{_CLOCK.pattern}$"})]


class ScheduleConfig(Strict):
    """A pool has its nodes in these hours, and at other times none."""

    days: Annotated[tuple[int, ...], BeforeValidator(day_list), WithJsonSchema({"type": "string"})]
    """`mon-fri`, `mon,wed,fri`, `mon-sun`."""
    from_: _Clock = Field(alias="from")
    """Nodes are started: the first token comes minutes later, when a model is loaded and warm."""
    to: _Clock
    """Nodes drain and go. On the same day."""
    time_zone: Annotated[str, BeforeValidator(zone_name), WithJsonSchema({"type": "string"})] = "UTC"
    """Of these hours: `Europe/Berlin`."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.from_ >= self.to:
            raise refusal(
                f"from {self.from_} to {self.to}: ends before it begins", "hours of one day; until midnight is 23:59"
            )
        return self
