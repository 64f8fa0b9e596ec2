"""Bundles of machines that a cloud makes: the programs of `local`, where images have them, and what boots them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from infra.catalog import bakes
from infra.paths import NODECONFIG
from infra.plan.model import EnginePlan, EngineSetPlan, FleetPlan, PoolPlan
from infra.render import engine, gateway, monitor
from infra.render.bundle import Bundle, Layout, Program
from infra.render.user_data import BOOT
from infra.weights.cache import Place
from infra.weights.lock import WeightsLock

EVERYWHERE = "0.0.0.0"  # noqa: S104 - the security group decides who reaches it
FIRST_UNIT = "fleet-boot.service"
"""Comes with the user data, as it gets the others."""
UNPACK = "unpack"
"""Step of images/components/fleet.yaml."""
HEARTBEAT_S = 120
"""What machines take the hooks' time-outs for: they say that they live in time for the shortest there is."""
FIRST_PORT = 8000
"""Of the engine in the first slot."""
VERIFIED = ".verified.json"
"""What `fetch` writes into a folder of weights: see fleet_agent/verified.py."""
SECRET = re.compile(r"programs/[^/]+/(keys\.map|keeper\.json)")
"""Files that hold hashes of API keys: they are not kept in the bucket."""


@dataclass(frozen=True)
class CloudLayout:
    """Where images have things."""

    root: Path = Path("/var/lib/fleet/machine")
    weights: Path = Path("/var/lib/fleet/weights")
    fleet: Path = Path("/opt/fleet")

    def layout(self, plan: FleetPlan, weights: Mapping[str, Place]) -> Layout:
        """The same as the renderers want it."""
        baked_monitor = plan.on_aws is not None and plan.on_aws.monitor_image is not None
        return Layout(
            root=self.root,
            python=self.fleet / "venv/bin/python",
            vllm=self.fleet / f"vllm-{plan.vllm_version}/bin/vllm",
            weights=weights,
            haproxy=Path("/usr/sbin/haproxy"),
            nginx=Path("/usr/sbin/nginx"),
            prometheus=self.fleet / "bin/prometheus",
            alertmanager=self.fleet / "bin/alertmanager",
            # Not among what a machine without an image of its own installs.
            grafana=self.fleet / "grafana/bin/grafana" if baked_monitor else None,
        )


def engine_bundle(plan: FleetPlan, pool: PoolPlan, lock: WeightsLock, cloud: CloudLayout) -> Bundle:
    """What each node of a pool runs: the agent, and an engine in every slot."""
    entries = sorted({plan.model(slot.model).weights for slot in pool.slots})
    places = {name: _place(name, lock, cloud) for name in entries}
    programs = engine.programs(plan, cloud.layout(plan, places), engines(plan, pool), EVERYWHERE)
    node = {
        **_node(plan, plan.timings.drain_s),
        "weights.json": _json({"entries": [_entry(name, lock, places[name]) for name in entries]}),
    }
    return Bundle("engine", programs, node)


def engines(plan: FleetPlan, pool: PoolPlan) -> tuple[EnginePlan, ...]:
    """The engines of one node: the same on every node of the pool."""
    sets = {it.model: it for it in plan.engine_sets if it.pool == pool.name}
    return tuple(
        _engine(sets[slot.model], index, ",".join(map(str, slot.gpus))) for index, slot in enumerate(pool.slots)
    )


def _engine(kind: EngineSetPlan, index: int, gpus: str) -> EnginePlan:
    port = FIRST_PORT + index
    return EnginePlan(
        name=f"{kind.model}-{index + 1}",
        model=kind.model,
        port=port,
        flags=("--host", EVERYWHERE, "--port", str(port), *kind.flags),
        environment=(*kind.environment, ("CUDA_VISIBLE_DEVICES", gpus)),
    )


def gateway_bundle(plan: FleetPlan) -> Bundle:
    """What each gateway runs."""
    bundle = gateway.gateway(plan, CloudLayout().layout(plan, {}))
    return Bundle(bundle.role, bundle.programs, _node(plan, plan.timings.gateway_stop_s))


def monitor_bundle(plan: FleetPlan) -> Bundle:
    """What the monitor runs."""
    layout = CloudLayout().layout(plan, {})
    slots = [(pool.name, it) for pool in plan.pools for it in engines(plan, pool)]
    bundle = monitor.monitor(plan, layout, slots)
    return Bundle(bundle.role, (*bundle.programs, _sweep(plan, layout)), _node(plan, plan.timings.gateway_stop_s))


def _sweep(plan: FleetPlan, layout: Layout) -> Program:
    """What strikes out engines that died: once for a stack, and there is one monitor."""
    settings = {"region": plan.region, "stack": plan.stack, "namespace": f"{plan.stack}.internal"}
    return engine.helper("sweep", layout, settings)


def split(bundle: Bundle) -> tuple[dict[str, str], dict[str, str]]:
    """The files of a bundle that anyone with access to the bucket may read, and those that hold hashes of keys."""
    files = bundle.files
    secret = {path: text for path, text in files.items() if SECRET.fullmatch(path)}
    return {path: text for path, text in files.items() if path not in secret}, secret


def _node(plan: FleetPlan, drain_s: int) -> dict[str, str]:
    """What a machine has beside its programs: units, the agent's package, the process manager's configuration, timings.

    Args:
        plan: The plan.
        drain_s: How long a drain waits at most.
    """
    files = {f"agent/{path}": text for path, text in engine.agent_code().items()}
    files["machine/supervisord.conf"] = (NODECONFIG / "machine/supervisord.conf").read_text(encoding="utf-8")
    files["disk.sh"] = (BOOT / "disk.sh").read_text(encoding="utf-8")
    if plan.aws:
        timings = {
            "launch_heartbeat_s": HEARTBEAT_S,
            "terminate_heartbeat_s": HEARTBEAT_S,
            "boot_limit_s": plan.aws.launch_hook_s,
            "metadata_poll_s": plan.aws.metadata_poll_s,
            "spot_drain_s": plan.aws.spot_drain_s,
            "drain_s": drain_s,
        }
        files["timings.json"] = _json(timings)
    for unit in sorted([*BOOT.glob("*.service"), *BOOT.glob("*.target")]):
        if unit.name != FIRST_UNIT:
            files[f"units/{unit.name}"] = unit.read_text(encoding="utf-8")
    return files


def runtime() -> dict[str, str]:
    """What a machine without an image of its own installs: what its image would have, by the same steps.

    Returns:
        Files for /opt/fleet/install: locks and pins, and for each role a script `install-<role>.sh`.
    """
    files: dict[str, str] = json.loads(bakes.install_files())["files"]
    return {**files, **{f"install-{role}.sh": _install(row.components) for role, row in bakes.images().items()}}


def _install(components: Sequence[str]) -> str:
    """The build steps of components of images/ as one script; what gets their files is done already."""
    documents = [YAML(typ="safe").load(bakes.component(name)) for name in components]
    steps = [
        "\n".join(step["inputs"]["commands"])
        for document in documents
        for phase in document["phases"]
        if phase["name"] == "build"
        for step in phase["steps"]
        if step["action"] == "ExecuteBash" and step["name"] != UNPACK
    ]
    # Each in a shell of its own, as Image Builder runs it.
    return "#!/bin/bash\nset -e\n" + "\n".join(f"(\n{step}\n)" for step in steps) + "\n"


def _place(name: str, lock: WeightsLock, cloud: CloudLayout) -> Place:
    folder = cloud.weights / lock.folder(name)
    entry = lock.models[name]
    if entry.made_from is not None:  # its digests are known once the job has made it; `fetch` keeps what it verified
        return Place(folder, None, folder / VERIFIED)
    return Place(
        folder, {path: fact.model_dump(include={"size", "sha256"}) for path, fact in entry.files.items()}, None
    )


def _entry(name: str, lock: WeightsLock, place: Place) -> dict[str, Any]:
    digest = lock.digest(name)
    return {
        "name": name,
        "digest": digest,
        "prefix": f"weights/{name}/{digest}",
        "folder": str(place.folder),
        "files": place.files,
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, default=dict) + "\n"
