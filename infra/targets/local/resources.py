"""Pulumi dynamic resources of the `local` target.

Their providers run in a process of Pulumi's, which finds this module by its name: nothing comes from `__main__`.
What a provider prints is shown by Pulumi as progress. `diff` looks at the machine itself, so that `pulumi up` mends
what broke since the last one, without a refresh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pulumi
from pulumi.dynamic import CreateResult, DiffResult, ReadResult, Resource, ResourceProvider, UpdateResult

from infra.paths import NODECONFIG
from infra.render.bundle import Bundle

AGENT_PATH = NODECONFIG / "agent"
sys.path.insert(0, str(AGENT_PATH))  # the agent is a package of its own: machines have it without the rest

from fleet_agent import apply, supervise
from fleet_agent import machine as agent_machine

OK = "as declared"
HALT_S = 120


class LocalError(Exception):
    """A failure that was foreseen; its text is for the operator."""


def _designed(error: Exception) -> LocalError:
    """The same failure without the stack of calls, which Pulumi would print before it."""
    sys.tracebacklimit = 0
    return LocalError(str(error))


def _say(name: str) -> Any:
    def say(text: str) -> None:
        sys.stdout.write(f"{name}: {text}\n")
        sys.stdout.flush()

    return say


class _HostProvider(ResourceProvider):
    """The stack's folder. Made first and deleted last: whatever a killed run left behind goes with it."""

    serialize_as_secret_always = False

    def create(self, props: dict[str, Any]) -> CreateResult:
        folder = Path(props["folder"])
        (folder / "machines").mkdir(parents=True, exist_ok=True)
        return CreateResult(str(folder), {"folder": props["folder"]})

    def diff(self, _id: str, _olds: dict[str, Any], _news: dict[str, Any]) -> DiffResult:
        return DiffResult(changes=_olds["folder"] != _news["folder"], replaces=["folder"], delete_before_replace=True)

    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        return ReadResult(id_, props)

    def delete(self, _id: str, props: dict[str, Any]) -> None:
        folder = Path(props["folder"])
        for root in sorted((folder / "machines").glob("*")):
            _end_machine(root)
        shutil.rmtree(folder, ignore_errors=True)


class Host(Resource, module="fleet", name="Host"):
    """This machine, as far as a stack uses it: the folder that holds everything the stack owns."""

    def __init__(self, name: str, *, folder: str, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__(_HostProvider(), name, {"folder": folder}, opts)


class _WeightsProvider(ResourceProvider):
    """An entry of the lock in this machine's cache. The cache is shared between stacks, so nothing is ever deleted."""

    serialize_as_secret_always = False

    def _ensure(self, props: dict[str, Any]) -> dict[str, Any]:
        from infra import weights  # noqa: PLC0415 - slow to import, and most runs have nothing to fetch

        try:
            folder = weights.ensure(props["entry"], weights.load(), _say(props["entry"]))
        except (weights.WeightsError, weights.ConfigError) as error:
            raise _designed(error) from None
        return {**props, "folder": str(folder)}

    def create(self, props: dict[str, Any]) -> CreateResult:
        return CreateResult(f"{props['entry']}-{props['digest'][:12]}", self._ensure(props))

    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        changed = [key for key in ("entry", "digest") if olds.get(key) != news[key]]
        return DiffResult(changes=bool(changed) or not Path(olds["folder"]).is_dir(), replaces=changed)

    def update(self, _id: str, _olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        return UpdateResult(self._ensure(news))

    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        return ReadResult(id_, props)

    def delete(self, _id: str, _props: dict[str, Any]) -> None:
        pass


class Weights(Resource, module="fleet", name="Weights"):
    """One entry of models.lock.yaml, fetched and verified."""

    folder: pulumi.Output[str]

    def __init__(self, name: str, *, entry: str, digest: str, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__(_WeightsProvider(), name, {"entry": entry, "digest": digest, "folder": None}, opts)


class _MachineProvider(ResourceProvider):
    """A machine that runs a bundle."""

    serialize_as_secret_always = False

    def create(self, props: dict[str, Any]) -> CreateResult:
        return CreateResult(props["root"], self._converge(props))

    def update(self, _id: str, _olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        return UpdateResult(self._converge(news))

    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        if olds["root"] != news["root"]:
            return DiffResult(changes=True, replaces=["root"], delete_before_replace=True)
        if olds["digest"] != news["digest"]:
            return DiffResult(changes=True)
        broken = _differences(news)
        for difference in broken:
            _say(Path(news["root"]).name)(difference)
        return DiffResult(changes=bool(broken))

    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        return ReadResult(id_, {**props, "state": _state(props)})

    def delete(self, _id: str, props: dict[str, Any]) -> None:
        _end_machine(Path(props["root"]))

    def _converge(self, props: dict[str, Any]) -> dict[str, Any]:
        """Write the bundle and let the machine's own program take it up, as on any other machine."""
        root = Path(props["root"])
        name = root.name
        try:
            folder = agent_machine.Machine(root).store(props["files"])
        except (agent_machine.AgentError, OSError) as error:
            raise _designed(error) from None
        command = [sys.executable, "-m", "fleet_agent", "apply", str(folder), "--root", str(root)]
        with subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(AGENT_PATH)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            for line in process.stdout or ():
                _say(name)(line.rstrip())
            errors = process.stderr.read() if process.stderr else ""
        if process.returncode:
            raise _designed(LocalError(f"machine {name}: {errors.strip() or f'apply ended with {process.returncode}'}"))
        return {**props, "state": OK}


class Machine(Resource, module="fleet", name="Machine"):
    """A machine of the fleet and the bundle that it runs."""

    state: pulumi.Output[str]

    def __init__(self, name: str, *, root: str, bundle: Bundle, opts: pulumi.ResourceOptions | None = None) -> None:
        inputs = {"root": root, "digest": bundle.digest, "files": bundle.files, "state": None}
        super().__init__(_MachineProvider(), name, inputs, opts)


def _differences(props: Mapping[str, Any]) -> list[str]:
    machine = agent_machine.Machine(Path(props["root"]))
    folder = machine.bundles / props["digest"]
    if not (folder / "manifest.json").is_file():
        return ["its bundle is missing"]
    try:
        return apply.differences(machine, agent_machine.Bundle(folder))
    except agent_machine.AgentError as error:
        return [str(error)]


def _state(props: Mapping[str, Any]) -> str:
    return "; ".join(_differences(props)) or OK


def _end_machine(root: Path) -> None:
    """Stop everything that a machine runs, then remove it; also one that was made only in part."""
    if root.is_dir():
        try:
            supervise.Supervisor(agent_machine.Machine(root)).halt(HALT_S, _say(root.name))
        except agent_machine.AgentError as error:
            raise _designed(error) from None
        shutil.rmtree(root, ignore_errors=True)
