"""Where things are on the machine that runs the tool.

Two folders, both `.fleet/` in the checkout unless the environment says otherwise:

- `FLEET_DIR` holds what stacks own: machines, keys, Pulumi state. It goes with `pulumi destroy`.
- `FLEET_SHARED` holds what stacks share and what is slow to make: tools, engines, weights. Checkouts may share it.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NODECONFIG = ROOT / "nodeconfig"


def stacks_dir() -> Path:
    """The stack files that users write; `FLEET_STACKS` puts them elsewhere."""
    return Path(os.environ.get("FLEET_STACKS") or ROOT / "stacks").resolve()


def fleet_dir() -> Path:
    """The folder that holds everything the stacks of this checkout own."""
    return Path(os.environ.get("FLEET_DIR") or ROOT / ".fleet").resolve()


def shared_dir() -> Path:
    """The folder that holds tools, engines and weights."""
    return Path(os.environ.get("FLEET_SHARED") or fleet_dir()).resolve()


def stack_dir(stack: str) -> Path:
    """One stack's machines, keys and logs."""
    return fleet_dir() / stack


def machine_dir(stack: str, role: str) -> Path:
    """One machine of a stack; on `local` a machine is a folder."""
    return stack_dir(stack) / "machines" / role


def toolchain_dir() -> Path:
    """Tools that were not on PATH; `bin/` in it goes on PATH."""
    return shared_dir() / "toolchain"


def engine_dir(version: str) -> Path:
    """The virtual environment of one engine version, e.g. `vllm-0.32.0`."""
    return shared_dir() / "engines" / version


def weights_dir() -> Path:
    """The model cache: one folder an entry of `models.lock.yaml`, addressed by content."""
    return shared_dir() / "weights"
