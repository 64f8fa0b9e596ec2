"""The hours of a pool: how they are written, what is refused, what they come to."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from infra.config.pools import Rung, rung
from infra.config.schedule import ScheduleConfig
from infra.plan.model import SchedulePlan

HOURS = {"days": "mon-fri", "from": "07:00", "to": "20:00", "time-zone": "Europe/Berlin"}
READ = TypeAdapter(ScheduleConfig)


def plan(**changes: Any) -> SchedulePlan:
    made = READ.validate_python({**HOURS, **changes})
    return SchedulePlan(days=made.days, start=made.from_, end=made.to, time_zone=made.time_zone)


@pytest.mark.parametrize(
    ("written", "days"),
    [
        ("mon-fri", (0, 1, 2, 3, 4)),
        ("Mon, Wed", (0, 2)),
        ("sat-mon", (0, 5, 6)),
        ("mon-sun", (0, 1, 2, 3, 4, 5, 6)),
        ("sun", (6,)),
    ],
)
def test_days(written: str, days: tuple[int, ...]) -> None:
    assert plan(days=written).days == days


def test_hours_of_a_week() -> None:
    assert plan().share == pytest.approx(65 / 168)
    assert plan(days="mon-sun", **{"from": "00:00", "to": "12:00"}).share == pytest.approx(0.5)


def test_times_as_auto_scaling_takes_them() -> None:
    assert plan().cron("07:05") == "5 7 * * 1,2,3,4,5"
    assert plan(days="sat-sun").cron("00:00") == "0 0 * * 6,0"


@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({"days": "mo-fri"}, "'mo' is no day", "did you mean `mon`"),
        ({"days": "1-5"}, "is no day", "one range or a list"),
        ({"days": "monday"}, "'monday' is no day", "did you mean `mon`"),
        ({"from": 420}, "420 is no time", 'in quotes: "07:00"'),
        ({"from": "7:00"}, "is no time", "hours and minutes"),
        ({"to": "24:00"}, "is no time", "hours and minutes"),
        ({"from": "21:00"}, "ends before it begins", "until midnight is 23:59"),
        ({"time-zone": "Europe/Berln"}, "is no time zone", "did you mean `Europe/Berlin`"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], problem: str, fix: str) -> None:
    with pytest.raises(ValidationError) as caught:
        READ.validate_python({**HOURS, **changes})
    (error,) = caught.value.errors()
    assert problem in error["ctx"]["problem"].replace("`", "'")
    assert fix in error["ctx"]["fix"]


def test_a_reservation_may_say_its_zone() -> None:
    found = rung({"reservation": "cr-0123456789abcdef0", "zone": "use1-az4"})
    assert found == Rung(kind="reservation", id="cr-0123456789abcdef0", zone="use1-az4")
    with pytest.raises(Exception, match="has 2 keys"):
        rung({"spot": 0.6, "zone": "use1-az4"})
    with pytest.raises(Exception, match="is not the id of a zone"):
        rung({"reservation": "cr-0123456789abcdef0", "zone": "us-east-1a"})
