"""`fleet drain`: take an engine out of rotation by hand, and put it back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from infra.findings import ConfigError, Finding, did_you_mean

POLL_S = 0.25
SAY_S = 2.0
CAN_DRAIN = frozenset({"ready", "draining", "silent"})
MARGIN_S = 10.0
"""Beyond the longest answer: the gateway has to hear of the drain first."""


class Fleet(Protocol):
    """Where engines can be drained: infra/deployed.py, infra/aws_drain.py."""

    @property
    def hint(self) -> str:
        """What shows how far a drain is, in words; or ""."""

    def engines(self) -> dict[str, dict[str, Any]]:
        """What agents say of engines, by name."""

    def tell(self, order: str, engine: str, /) -> dict[str, Any]:
        """`drain` or `undrain` an engine; what its agent then says of it."""

    def longest_s(self) -> float:
        """Seconds that the longest answer may take."""


def drain(deployed: Fleet, names: Sequence[str], say: Callable[[str], None], *, wait: bool, force: bool) -> None:
    """Let engines have no new requests, and wait until what they have is done.

    Args:
        deployed: The stack.
        names: The engines.
        say: Told how far it is.
        wait: Whether to wait.
        force: Whether they may be the last ready engines of a model.

    Raises:
        ConfigError: One cannot be drained, or was not in its time.
    """
    engines = deployed.engines()
    if refused := [finding for name in names if (finding := _refused(engines, name, names, force=force))]:
        raise ConfigError(refused)
    for name in names:
        deployed.tell("drain", name)
    for name in names:
        if wait:
            _wait(deployed, name, say)
        else:
            say(f"{name}: draining; {deployed.hint}`fleet drain {name} --undo` ends it")


def _refused(
    engines: Mapping[str, dict[str, Any]], name: str, drained: Sequence[str], *, force: bool
) -> Finding | None:
    """Why an engine cannot be drained together with the others."""
    engine = _named(engines, name)
    if engine["state"] not in CAN_DRAIN:
        return Finding(name, f"is {engine['state']}: it gets no requests that could be drained")
    others = any(
        row["engine"] not in drained and row["model"] == engine["model"] and row["state"] == "ready"
        for row in engines.values()
    )
    if others or engine["state"] == "draining" or force:
        return None
    problem = f"no other engine of the model `{engine['model']}` is ready: its clients would be refused"
    return Finding(name, problem, "wait until another one is ready, or add --force")


def undo(deployed: Fleet, name: str, say: Callable[[str], None]) -> None:
    """Let an engine have requests again.

    Raises:
        ConfigError: There is no such engine.
    """
    _named(deployed.engines(), name)
    row = deployed.tell("undrain", name)
    say(f"{name}: {row['state']}")


def _named(engines: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in engines:
        fix = did_you_mean(name, engines) if engines else "`fleet status` shows what there is"
        raise ConfigError([Finding(name, "there is no such engine", fix)])
    return engines[name]


def _wait(deployed: Fleet, name: str, say: Callable[[str], None]) -> None:
    limit = deployed.longest_s() + MARGIN_S
    start = said = time.monotonic()
    put_back = f"`fleet drain {name} --undo` puts it back"
    say(f"{name}: draining")
    while True:
        row = _named(deployed.engines(), name)
        took = time.monotonic() - start
        if row["drained"]:
            say(f"{name}: drained in {took:.0f} s; {put_back}")
            return
        if row["state"] not in CAN_DRAIN:
            raise ConfigError([Finding(name, f"is {row['state']}: it was restarted, and the drain ended with that")])
        if row["state"] == "ready":
            raise ConfigError([Finding(name, "is ready: someone else ended the drain")])
        if took > limit:
            problem = f"still has {row['in_flight']} requests after {limit:.0f} s"
            raise ConfigError([Finding(name, problem, f"it gets no new ones; wait longer, or {put_back}")])
        if time.monotonic() - said >= SAY_S:
            said = time.monotonic()
            say(f"{name}: {row['in_flight']} in flight, {took:.0f} of {limit:.0f} s")
        time.sleep(POLL_S)
