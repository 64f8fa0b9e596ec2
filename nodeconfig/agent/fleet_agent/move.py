"""Take a machine of a cloud that runs to another bundle: its weights first, then its programs, then what watches it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from fleet_agent.apply import apply
from fleet_agent.machine import Bundle, Machine, relink

UNITS = Path("/etc/systemd/system")
WANTED = "wanted"


def move(machine: Machine, bundle: Bundle, say: Callable[[str], None]) -> None:
    """Make this machine run `bundle`, now and after its next boot. Repeatable.

    Raises:
        AgentError: it could not; the machine then runs what it ran before.
    """
    weights = bundle.folder / "node" / "weights.json"
    if weights.is_file():
        from fleet_agent.fetch import fetch  # noqa: PLC0415 - a gateway has none

        fetch(weights, os.environ["FLEET_BUCKET"], os.environ["FLEET_REGION"], root=machine.root, say=say)
    apply(machine, bundle, say)
    before = (machine.root / WANTED).resolve()
    relink(machine.root / WANTED, bundle.folder)
    if install(bundle.folder / "node" / "units", UNITS):
        systemctl("daemon-reload")
    if before != bundle.folder:
        systemctl("restart", "--no-block", "fleet-node.service")
    say(f"runs bundle {bundle.digest[:12]}")


def install(units: Path, target: Path) -> bool:
    """Copy units that differ; whether one did. boot.py has the same: it runs where there is nothing of this yet."""
    changed = False
    for unit in sorted(units.iterdir()):
        text = unit.read_text(encoding="utf-8")
        file = target / unit.name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            changed = True
    return changed


def systemctl(*arguments: str) -> None:
    """Tell systemd."""
    subprocess.run(["systemctl", *arguments], check=True)
