"""Moves nodes along a pool's ladder: what a rung cannot get, the next one is asked for, until the first one has it.

A rung is an Auto Scaling group. The first wants all nodes that its pool is to have now. Every gateway does this: so
it is done while any is there. What is asked for follows from how things are, and two that ask it do no harm.

No one group can do it: reservations, on-demand and spot differ in their templates, and a mixed-instances policy divides
nodes between on-demand and spot by fixed shares: what one lacks the other does not take over.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LOOK_S = 30
COMING = ("Pending",)
HERE = "InService"

log = logging.getLogger("ladder")


@dataclass(frozen=True)
class Rung:
    """One group as it is."""

    name: str
    most: int
    desired: int
    ready: int
    """Nodes that serve."""
    coming: int
    """Nodes that boot."""
    failed: bool
    """The last thing that happened is that it could not get a node."""

    @property
    def has(self) -> int:
        """Nodes that serve or will."""
        return self.ready + self.coming

    @property
    def stuck(self) -> bool:
        """It wants more than it has, and there is no more to be had."""
        return self.failed and self.has < self.desired


def wanted(rungs: list[Rung]) -> dict[str, int]:
    """How many nodes each rung after the first is to want.

    More, if all before it together lack nodes and cannot get them. Not fewer than before, until what stands in for its
    nodes serves: a node that boots may yet fail.
    """
    total, found = rungs[0].desired, {}
    for index, rung in enumerate(rungs[1:], 1):
        before = rungs[:index]
        lacking = total - sum(it.has for it in before)
        short = lacking if any(it.stuck for it in before) else 0
        needed = total - sum(it.ready for it in before)
        found[rung.name] = max(0, min(rung.most, max(short, min(rung.desired, needed))))
    return found


def look(client: Any, names: list[str]) -> list[Rung]:
    """The groups of one pool, in the order of their names here."""
    answer = client.describe_auto_scaling_groups(AutoScalingGroupNames=names, MaxRecords=100)
    groups = {group["AutoScalingGroupName"]: group for group in answer["AutoScalingGroups"]}
    return [_rung(client, groups[name]) for name in names]


def _rung(client: Any, group: dict[str, Any]) -> Rung:
    name, states = group["AutoScalingGroupName"], [it["LifecycleState"] for it in group["Instances"]]
    activities = client.describe_scaling_activities(AutoScalingGroupName=name, MaxRecords=1)["Activities"]
    return Rung(
        name=name,
        most=group["MaxSize"],
        desired=group["DesiredCapacity"],
        ready=states.count(HERE),
        coming=sum(state.startswith(COMING) for state in states),
        failed=any(it["StatusCode"] == "Failed" for it in activities),
    )


def move(client: Any, ladders: list[list[str]]) -> list[str]:
    """Set every rung to what it is to want; what was changed, in words."""
    said = []
    for names in ladders:
        rungs = look(client, names)
        for name, nodes in wanted(rungs).items():
            was = next(rung.desired for rung in rungs if rung.name == name)
            if nodes != was:
                client.set_desired_capacity(AutoScalingGroupName=name, DesiredCapacity=nodes, HonorCooldown=False)
                stuck = [rung.name for rung in rungs if rung.stuck]
                said.append(f"{name}: {was} -> {nodes} nodes; without capacity: {', '.join(stuck) or 'none'}")
    return said


def ladder(file: Path) -> NoReturn:
    """Look after the pools that `file` describes, for ever. What fails is tried again at the next look.

    `ladders` of the file has for each pool the names of its groups, in order.
    """
    from fleet_agent.cloud import Clients  # noqa: PLC0415 - only machines of AWS have boto3

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
    settings = json.loads(file.read_text(encoding="utf-8"))
    clients = Clients(settings["region"])
    while True:
        try:
            for said in move(clients["autoscaling"], settings["ladders"]):
                log.info("%s", said)
        except Exception as error:  # noqa: BLE001 - boto3's, of many kinds
            log.warning("%s", error)
            clients.forget()
        time.sleep(LOOK_S)
