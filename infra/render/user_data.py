"""What a machine of a cloud is told when it boots: where it finds everything else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from infra.paths import NODECONFIG
from infra.render.bundle import templates

BOOT = NODECONFIG / "boot"


@dataclass(frozen=True)
class NodeSettings:
    """What a machine has to know of itself. It holds nothing that follows from models: another text is another machine.

    What does is in its bundle (`node/timings.json`), and in its pointer.
    """

    stack: str
    role: Literal["engine", "gateway", "monitor"]
    machine: str
    """Last part of the name of its pointer."""
    region: str
    bucket: str
    group: str | None
    """Name of its Auto Scaling group; None: it has none."""
    launch_hook: str | None = "ready"
    terminate_hook: str | None = "drain"
    data_volume: str | None = None
    """Device of a volume that outlives the machine."""
    baked: bool = False
    """The image has everything; else what is missing is installed at the first boot."""


def user_data(node: NodeSettings) -> str:
    """The cloud-config of a machine; EC2 takes 16,384 bytes."""
    settings = json.dumps(dataclasses.asdict(node), indent=1, sort_keys=True) + "\n"
    files = {
        name: (BOOT / name).read_text(encoding="utf-8") for name in ("boot.py", "fleet-boot.service", "fleet-apply")
    }
    return templates().get_template("boot/user-data.yaml.j2").render(node=node, settings=settings, files=files)
