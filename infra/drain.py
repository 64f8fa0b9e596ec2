"""`fleet drain`: take an engine out of rotation by hand, and put it back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from infra.deployed import Deployed
from infra.findings import ConfigError, Finding, did_you_mean

POLL_S = 0.25
SAY_S = 2.0
CAN_DRAIN = frozenset({"ready", "draining", "silent"})
DRAIN_S = 600.0
"""How long a drain is waited for where the agent's settings do not say."""
MARGIN_S = 10.0
"""Beyond the longest answer: the gateway has to hear of the drain first."""


def drain(deployed: Deployed, name: str, say: Callable[[str], None], *, wait: bool, force: bool) -> None:
    """Let an engine have no new requests, and wait until what it has is done.

    Args:
        deployed: The stack.
        name: The engine.
        say: Told how far it is.
        wait: Whether to wait.
        force: Whether it may be the last ready engine of its model.

    Raises:
        ConfigError: It cannot be drained, or was not in its time.
    """
    engines = deployed.engines()
    engine = _named(engines, name)
    if engine["state"] not in CAN_DRAIN:
        raise ConfigError([Finding(name, f"is {engine['state']}: it gets no requests that could be drained")])
    others = [
        row["engine"]
        for row in engines.values()
        if row["engine"] != name and row["model"] == engine["model"] and row["state"] == "ready"
    ]
    if not others and engine["state"] != "draining" and not force:
        problem = f"no other engine of the model `{engine['model']}` is ready: its clients would be refused"
        raise ConfigError([Finding(name, problem, "wait until another one is ready, or add --force")])
    deployed.tell("drain", name)
    if wait:
        _wait(deployed, name, say)
    else:
        say(f"{name}: draining; `fleet status` shows what is in flight, `fleet drain {name} --undo` ends it")


def undo(deployed: Deployed, name: str, say: Callable[[str], None]) -> None:
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


def _wait(deployed: Deployed, name: str, say: Callable[[str], None]) -> None:
    limit = _longest(deployed) + MARGIN_S
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


def _longest(deployed: Deployed) -> float:
    """Seconds that the longest answer may take, as the agent was told."""
    try:
        settings = json.loads((deployed.machines / "engine/slots/agent/agent.json").read_text(encoding="utf-8"))
        return float(settings["drain_s"])
    except (OSError, ValueError, LookupError):
        return DRAIN_S
