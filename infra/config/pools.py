"""Pools: GPU nodes that are all alike, and the ways to get them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema

from infra.config.schedule import ScheduleConfig
from infra.config.strict import Strict
from infra.config.units import Size, refusal
from infra.findings import did_you_mean, nearest, show

RungKind = Literal["reservation", "capacity-block", "on-demand", "spot"]
RUNGS = "`on-demand`, `spot`, `{spot: 0.6}`, `{reservation: cr-…}` or `{capacity-block: cr-…}`"
_ZONE = re.compile(r"[a-z0-9]+-az[0-9]{1,2}")
_RESERVATION = re.compile(r"cr-[0-9a-f]{1,32}")
MAX_NODES = 1000
PER_CENT = 100
LEAST_PERCENT = 10
"""A share from here on was probably meant in per cent."""


class Rung(Strict):
    """One way to get nodes."""

    kind: RungKind
    id: str | None = None
    """Of the reservation or the block."""
    max_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of a spot node: the most that is paid, as a part of the on-demand price."""
    zone: str | None = None
    """Where the reservation or the block is, by id: `use1-az4`. Default: the group looks in all zones of the pool."""


def rung(value: Any) -> Rung:
    """One way to get nodes, from a text such as `on-demand` or a mapping of one key such as `{spot: 0.6}`."""
    if isinstance(value, Rung):
        return value
    if isinstance(value, str):
        return _bare(value)
    if not isinstance(value, Mapping) or not value:
        raise refusal(f"{show(value)} is no way to get nodes", f"write {RUNGS}")
    zone = _zone(value["zone"]) if "zone" in value and value.keys() & {"reservation", "capacity-block"} else None
    if zone:
        value = {key: it for key, it in value.items() if key != "zone"}
    if len(value) > 1:
        keys = ", ".join(show(key) for key in value)
        raise refusal(f"has {len(value)} keys, {keys}: one way to get nodes has one", "an item of the list for each")
    ((name, argument),) = value.items()
    match name:
        case "spot":
            return Rung.model_validate({"kind": "spot", "max-share": _share(argument)})
        case "reservation":
            return Rung(kind="reservation", id=_reservation(argument), zone=zone)
        case "capacity-block":
            return Rung(kind="capacity-block", id=None if argument is True else _reservation(argument), zone=zone)
        case "on-demand":
            raise refusal("`on-demand` has no value", "write `on-demand` alone")
        case _:
            raise _unknown(str(name))


def _bare(text: str) -> Rung:
    match text:
        case "on-demand" | "spot":
            return Rung(kind=text)
        case "reservation" | "capacity-block":
            raise refusal(f"`{text}` does not say which", f"`{{{text}: cr-…}}` with the id that AWS shows")
        case _ if _RESERVATION.fullmatch(text):
            raise refusal(f"{show(text)} does not say what it is", f"write `{{reservation: {text}}}`")
        case _:
            raise _unknown(text)


def _unknown(text: str) -> Exception:
    near = nearest(text, get_args(RungKind))
    return refusal(f"{show(text)} is no way to get nodes", f"did you mean `{near}`?" if near else f"write {RUNGS}")


def _share(value: Any) -> float:
    """The most that is paid for a spot node, as a part of the on-demand price."""
    fix = "a part of the on-demand price, over 0 and at most 1: `{spot: 0.6}`; `spot` alone is 1"
    if isinstance(value, str) and (percent := re.fullmatch(r"(\d{1,2}) ?%", value)):
        raise refusal(f"spot: {show(value)} is no number", f"write `{{spot: {int(percent[1]) / PER_CENT:g}}}`")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refusal(f"spot: {show(value)} is no number", fix)
    if 0 < value <= 1:
        return float(value)
    if value > 1:
        meant = f"did you mean `{{spot: {value / PER_CENT:g}}}`? " if LEAST_PERCENT <= value <= PER_CENT else ""
        raise refusal(f"spot: {show(value)} times the on-demand price", meant + fix)
    raise refusal(f"spot: {show(value)} is no part of the on-demand price", fix)


def _reservation(value: Any) -> str:
    if isinstance(value, str) and _RESERVATION.fullmatch(value):
        return value
    fix = "`cr-` and hex digits, as `aws ec2 describe-capacity-reservations` shows it"
    if isinstance(value, str) and value.startswith("cb-"):
        fix = f"that is an offer of a block: once bought it is a reservation, {fix}"
    raise refusal(f"{show(value)} is not the id of a reservation", fix)


def _zone(value: Any) -> str:
    if isinstance(value, str) and _ZONE.fullmatch(value):
        return value
    fix = "its id, such as `use1-az4`: `aws ec2 describe-capacity-reservations` shows it as AvailabilityZoneId"
    raise refusal(f"{show(value)} is not the id of a zone", fix)


def node_count(value: Any) -> Any:
    """A number of nodes, or `auto`."""
    if value == "auto":
        return value
    if isinstance(value, str) and nearest(value, ["auto"]):
        raise refusal(f"cannot be {show(value)}", did_you_mean(value, ["auto"]))
    if isinstance(value, bool) or not isinstance(value, int):
        digits = re.fullmatch(r"\d{1,4}", value) if isinstance(value, str) else None
        raise refusal(
            f"must be a whole number or `auto`, not {show(value)}",
            f"write {value}, without quotes"
            if digits
            else f"1 to {MAX_NODES}, or `auto` for as few as hold the engines",
        )
    if not 1 <= value <= MAX_NODES:
        fix = f"at most {MAX_NODES}" if value > 1 else "at least 1, or `auto`; without the pool there are none"
        raise refusal("is too large" if value > 1 else "is too small", fix)
    return value


_ZONE_SCHEMA = {"zone": {"type": "string", "pattern": f"^{_ZONE.pattern}$"}}
_RUNG_SCHEMA = {
    "anyOf": [
        {"enum": ["on-demand", "spot"]},
        *(
            {"type": "object", "properties": {key: value, **more}, "required": [key], "additionalProperties": False}
            for key, value, more in (
                ("spot", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {}),
                ("reservation", {"type": "string", "pattern": f"^{_RESERVATION.pattern}$"}, _ZONE_SCHEMA),
                (
                    "capacity-block",
                    {"anyOf": [{"const": True}, {"type": "string", "pattern": f"^{_RESERVATION.pattern}$"}]},
                    _ZONE_SCHEMA,
                ),
            )
        ),
    ]
}


class PoolConfig(Strict):
    """Nodes that are all alike."""

    gpu: str | None = None
    """Of the catalog: `h100-80gb`, `a100-80gb`, `l4-24gb` … Default on AWS: whatever costs least."""
    instance: str | None = None
    """Instance type of AWS. Default: the cheapest that holds the engines."""
    nodes: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_NODES)],
        BeforeValidator(node_count),
    ] = "auto"
    """`auto`: as few as hold the engines."""
    capacity: list[Annotated[Rung, BeforeValidator(rung), WithJsonSchema(_RUNG_SCHEMA)]] = Field(
        default_factory=lambda: [Rung(kind="on-demand")]
    )
    """Ways to get nodes, tried in this order: `on-demand`, `spot`, `{spot: 0.6}`, `{reservation: cr-…}`."""
    zones: Annotated[int, Field(ge=1, le=6)] | None = None
    """Availability zones. Default: all that have the instance type."""
    schedule: ScheduleConfig | None = None
    """On AWS: the pool has its nodes in these hours alone. Default: always."""
    disk: Annotated[Size, Field(ge=10**9, le=64 << 40)] | None = None
    """Root volume of each node. Default: what the weights need."""
    gpus_per_node: Annotated[int, Field(ge=1, le=16)] | None = None
    """Of a Kubernetes node. Default: 8."""
    usd_per_hour: Annotated[float, Field(gt=0)] | None = Field(default=None, alias="usd_per_hour")
    """Price of one node, where the catalog has none."""
