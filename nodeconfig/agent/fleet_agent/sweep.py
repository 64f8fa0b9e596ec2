"""Strike out engines that died: a node that ends without warning stays registered in Cloud Map.

Gateways' checks take such an engine out of rotation at once. But it keeps its place in their lists, and one day another
machine has its address.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOK_S = 30
MISSED = 2
"""So many looks in a row an instance must be missing: what EC2 lists is a moment behind what it does."""
ALIVE = ("pending", "running", "stopping", "shutting-down")
"""A node that leaves takes its engines out itself."""

log = logging.getLogger("sweep")


@dataclass
class Roll:
    """Who is registered and does not live."""

    missed: dict[str, int] = field(default_factory=dict)

    def dead(self, registered: Iterable[str], alive: Iterable[str]) -> list[str]:
        """Ids of registered engines whose instance has been gone for long enough.

        Args:
            registered: as `i-0123456789abcdef0-chat-1`.
            alive: ids of the stack's instances.
        """
        living, gone = set(alive), {}
        for name in registered:
            if "-".join(name.split("-")[:2]) not in living:
                gone[name] = self.missed.get(name, 0) + 1
        self.missed = gone
        return sorted(name for name, times in gone.items() if times >= MISSED)


class Sweep:
    """Looks after one stack's namespace."""

    def __init__(self, settings: Mapping[str, Any], clients: Any) -> None:
        self.stack, self.namespace = settings["stack"], settings["namespace"]
        self.clients = clients
        """boto3's, by service: ec2, servicediscovery."""
        self.roll = Roll()

    def strike(self) -> None:
        """Take engines out of Cloud Map whose machine is no more."""
        cloud = self.clients["servicediscovery"]
        services = list(self._services(cloud))
        registered = {it: service for service in services for it in self._registered(cloud, service)}
        for name in self.roll.dead(registered, self._alive()):
            log.info("%s is gone, and was still registered", name)
            cloud.deregister_instance(ServiceId=registered[name], InstanceId=name)

    def _services(self, cloud: Any) -> Iterable[str]:
        wanted = [{"Name": "NAME", "Values": [self.namespace], "Condition": "EQ"}]
        for namespace in cloud.list_namespaces(Filters=wanted)["Namespaces"]:
            own = [{"Name": "NAMESPACE_ID", "Values": [namespace["Id"]], "Condition": "EQ"}]
            for page in cloud.get_paginator("list_services").paginate(Filters=own):
                yield from (service["Id"] for service in page["Services"])

    def _registered(self, cloud: Any, service: str) -> Iterable[str]:
        for page in cloud.get_paginator("list_instances").paginate(ServiceId=service):
            yield from (instance["Id"] for instance in page["Instances"])

    def _alive(self) -> list[str]:
        filters = [
            {"Name": "tag:vllm-fleet:stack", "Values": [self.stack]},
            {"Name": "instance-state-name", "Values": list(ALIVE)},
        ]
        pages = self.clients["ec2"].get_paginator("describe_instances").paginate(Filters=filters)
        return [it["InstanceId"] for page in pages for group in page["Reservations"] for it in group["Instances"]]


def sweep(file: Path) -> None:
    """Look after the stack that `file` describes, for ever. What fails is tried again at the next look."""
    from fleet_agent.cloud import Clients  # noqa: PLC0415 - only machines of AWS have boto3

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
    settings = json.loads(file.read_text(encoding="utf-8"))
    clients = Clients(settings["region"])
    keeper = Sweep(settings, clients)
    while True:
        try:
            keeper.strike()
        except Exception as error:  # noqa: BLE001 - boto3's, of many kinds
            log.warning("%s", error)
            clients.forget()
        time.sleep(LOOK_S)
