"""Gateways that count together: which number each has, where the others are, and what is open here.

Each gateway has a number, and tags its own instance with it: so all can see who has which. HAProxy passes on what it
has counted, but not what is open at this moment (`conn_cur`): each request that begins writes that number beside it,
into a field that is passed on (`gpt0`), and `publish` does it for those that have ended.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fleet_agent import balancer
from fleet_agent.balancer import command
from fleet_agent.machine import AgentError, Machine
from fleet_agent.supervise import Supervisor

FILE = "peers.cfg"
NOWHERE = "127.0.0.1:1"
"""Of a gateway that is not there: nothing listens, and HAProxy asks again."""
FIELD = re.compile(r"(key|conn_cur)=(\S+)")
STACK, ROLE, NUMBER = "vllm-fleet:stack", "vllm-fleet:role", "vllm-fleet:gateway"
"""Tags of an instance."""
PUBLISH_S = 0.25
LOOK_S = 10
"""A gateway that is new counts for itself for so long."""
PROGRAM = "haproxy"

log = logging.getLogger("peers")


@dataclass(frozen=True)
class Member:
    """A gateway of this stack."""

    instance: str
    address: str
    launched: str
    """ISO 8601: of two with the same number the elder one keeps it."""
    number: int | None


def choose(own: str, members: Mapping[str, Member], room: int) -> int | None:
    """The number that a gateway should have.

    Args:
        own: its instance id; must be among `members`.
        members: all gateways that run, by instance id.
        room: how many there is room for.

    Returns:
        The one it has, if no elder gateway has it; else the lowest that is free; None where there is no room.
    """
    mine = members[own]
    others = [it for it in members.values() if it.instance != own]
    elder = {it.number for it in others if (it.launched, it.instance) < (mine.launched, own)}
    if mine.number is not None and mine.number not in elder and mine.number <= room:
        return mine.number
    taken = {it.number for it in others}
    return next((number for number in range(1, room + 1) if number not in taken), None)


def addresses(members: Mapping[str, Member], port: int) -> dict[int, str]:
    """Where each number is; of two with the same one the elder."""
    young_first = sorted(members.values(), key=lambda it: (it.launched, it.instance), reverse=True)
    return {it.number: f"{it.address}:{port}" for it in young_first if it.number is not None}


def render(own: int, gateways: int, addresses: Mapping[int, str]) -> str:
    """What HAProxy reads before its configuration.

    Args:
        own: the number of this gateway, from 1.
        gateways: how many there is room for.
        addresses: `address:port` by number; its own must be among them.
    """
    lines = [f"    setenv FLEET_GATEWAY_{n} {addresses.get(n, NOWHERE)}" for n in range(1, gateways + 1)]
    return "\n".join(("global", f"    setenv FLEET_GATEWAY {own}", *lines)) + "\n"


def own_number(run: Path) -> int | None:
    """Which gateway this one is; None where nothing has been said."""
    try:
        found = re.search(r"FLEET_GATEWAY (\d+)", (run / FILE).read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) if found else None


def publish(run: Path) -> None:
    """Tell the other gateways what of each key is open here. Meant to be done several times a second.

    All keys each time, not only those that changed: HAProxy (seen with 2.8) may lose the second of two updates that
    follow each other at once, and a gateway that has just started may hand back what it heard last.

    Raises:
        OSError: HAProxy does not answer.
    """
    number = own_number(run)
    if number is None:
        return
    table = f"keys/open-{number}"
    rows = opened(command(run, f"show table {table}"))
    if rows:
        command(run, ";".join(f"set table {table} key {key} data.gpt0 {now}" for key, now in rows.items()))


def opened(table: str) -> dict[str, int]:
    """Open requests by key, of the rows of `show table`."""
    rows = [dict(FIELD.findall(line)) for line in table.splitlines() if "key=" in line]
    return {row["key"]: int(row["conn_cur"]) for row in rows}


class Peers:
    """Keeps `run/peers.cfg` as the stack's instances are, and lets HAProxy take it up."""

    def __init__(self, machine: Machine, settings: Mapping[str, Any], clients: Any, own: str) -> None:
        self.machine = machine
        self.settings = settings
        self.clients = clients
        """boto3's, by service."""
        self.own = own

    def members(self) -> dict[str, Member]:
        """The gateways that run, by instance id."""
        filters = [
            {"Name": f"tag:{STACK}", "Values": [self.settings["stack"]]},
            {"Name": f"tag:{ROLE}", "Values": ["gateway"]},
            {"Name": "instance-state-name", "Values": ["pending", "running"]},
        ]
        found = {}
        for page in self.clients["ec2"].get_paginator("describe_instances").paginate(Filters=filters):
            for instance in (it for reservation in page["Reservations"] for it in reservation["Instances"]):
                tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", ())}
                number = tags.get(NUMBER, "")
                found[instance["InstanceId"]] = Member(
                    instance["InstanceId"],
                    instance["PrivateIpAddress"],
                    str(instance["LaunchTime"]),
                    int(number) if number.isdecimal() else None,
                )
        return found

    def look(self) -> str:
        """Take note of who is there. Repeatable.

        Returns:
            What `run/peers.cfg` should be; empty where this gateway is not among them yet or there is no room for it.
        """
        members, room = self.members(), int(self.settings["room"])
        if self.own not in members:
            return ""
        number = choose(self.own, members, room)
        if number is None:
            log.warning("there are more than %d gateways: this one counts for itself", room)
            return ""
        if number != members[self.own].number:
            self.clients["ec2"].create_tags(Resources=[self.own], Tags=[{"Key": NUMBER, "Value": str(number)}])
            log.info("this is gateway %d", number)
        found = addresses(members, int(self.settings["port"]))
        found[number] = f"{members[self.own].address}:{self.settings['port']}"
        return render(number, room, found)

    def take_up(self, text: str) -> bool:
        """Write the file if it is another one, and let HAProxy read it; whether it was.

        Raises:
            AgentError: HAProxy did not take it up.
        """
        file = self.machine.run / FILE
        if not text or (file.exists() and file.read_text(encoding="utf-8") == text):
            return False
        with self.machine.lock():
            fresh = file.with_suffix(".new")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(file)
            balancer.reload(self.machine, Supervisor(self.machine), PROGRAM)
        return True


def work(group: Peers, sleep: Callable[[float], None] = time.sleep) -> NoReturn:
    """Look and publish until the process ends. What fails is tried again: a gateway serves without it."""
    looked = float("-inf")
    while True:
        if time.monotonic() - looked >= LOOK_S:
            looked = time.monotonic()
            try:
                group.take_up(group.look())
            except (AgentError, OSError) as error:
                log.warning("%s", error)
            except Exception as error:  # noqa: BLE001 - boto3's, of many kinds
                log.warning("EC2 does not say which gateways there are: %s", error)
                group.clients.forget()
        try:
            publish(group.machine.run)
        except OSError as error:
            log.warning("HAProxy does not answer: %s", error)
        sleep(PUBLISH_S)


def peers(file: Path) -> NoReturn:
    """Run what `file` describes, on an instance of EC2."""
    from botocore.utils import IMDSFetcher  # noqa: PLC0415 - only machines of AWS have it

    from fleet_agent.cloud import Clients  # noqa: PLC0415 - as above

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
    settings = json.loads(file.read_text(encoding="utf-8"))
    fetcher = IMDSFetcher(timeout=5, num_attempts=20)
    token = fetcher._fetch_metadata_token()  # noqa: SLF001 - botocore has no public way to ask for anything but credentials
    own = fetcher._get_request("latest/meta-data/instance-id", None, token=token).text  # noqa: SLF001
    work(Peers(Machine(Path.cwd()), settings, Clients(settings["region"]), own))
