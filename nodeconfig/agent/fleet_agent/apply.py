"""Take a machine from the bundle that it runs to another one, program by program, and back if that fails.

Where each program is: `slots/<program>`. So a run that was killed halfway leaves a machine whose state can be read, and
the next run carries on from it. Order, for a machine with engines:

1. services (the agent first of all: it knows the engines by their slots);
2. engines that the new bundle no longer has: drain, stop;
3. engines that do not run: started together, until all are ready;
4. engines that run something else: one by one, drain → stop → swap → start → warm → ready.

If an engine of step 4 does not get ready in its deadline, every program that was moved goes back to where it was.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_agent import balancer
from fleet_agent.machine import AgentError, Bundle, Machine, Program
from fleet_agent.supervise import LIVE, Supervisor, wait_for

SAY_EVERY_S = 10
SERVICE_S = 20
POLL_S = 0.25

Say = Callable[[str], None]


def apply(machine: Machine, bundle: Bundle, say: Say) -> None:
    """Make the machine run `bundle`. Repeatable; does nothing where nothing differs.

    Raises:
        AgentError: it could not; the machine then runs what it ran before, or on a machine that ran nothing, what
            could be started. The text says which program failed and shows the end of its log.
    """
    with machine.lock():
        Change(machine, bundle, say).run()


def differences(machine: Machine, bundle: Bundle) -> list[str]:
    """What `apply` would have to mend, one line each, in words for the operator. Empty: the machine runs `bundle`."""
    supervisor = Supervisor(machine)
    if not supervisor.alive():
        return ["the machine is down"]
    found = [f"file {damage}" for damage in bundle.damage()]
    states = {process.program: process.state for process in supervisor.processes()}
    for name, program in bundle.programs.items():
        slot = machine.slot_bundle(name)
        if slot is None or name not in slot.programs:
            found.append(f"{name} is missing")
        elif slot.programs[name].digest != program.digest:
            found.append(f"{name} runs from another bundle, {slot.digest[:12]}")
        elif states.get(name) not in LIVE:
            found.append(f"process {name} is {states.get(name, 'missing').lower()}")
    found += [f"{name} must not run" for name in machine.occupied() if name not in bundle.programs]
    return found


@dataclass
class Change:
    """One run of apply."""

    machine: Machine
    bundle: Bundle
    say: Say
    moved: list[tuple[Program, Path | None]] = field(default_factory=list)
    """Programs that were moved, each with the folder that it ran from before."""

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(self.machine)

    def run(self) -> None:
        """See the module's docstring."""
        damage = self.bundle.damage()
        if damage:
            raise AgentError(f"bundle {self.bundle.digest[:12]} is damaged: {'; '.join(damage)}")
        booted = self.supervisor.boot(self.say)
        self._change(booted=booted)
        for (
            program
        ) in self.bundle.programs.values():  # what did not change moves to the new bundle's folder all the same
            self.machine.point(program.name, self.bundle.program_folder(program.name))
        self.machine.commit(self.bundle)

    def _change(self, *, booted: bool) -> None:
        programs = self.bundle.programs
        gone = [name for name in self.machine.occupied() if name not in programs]
        due = [program for program in programs.values() if not self._runs(program)]
        services = sorted((p for p in due if not p.engine), key=lambda p: (p.name != "agent", p.name))
        fresh = [p for p in due if p.engine and self._down(p.name)]
        rolling = [p for p in due if p.engine and p not in fresh]
        # After a reboot the process manager has started what had a slot.
        started = fresh + [p for p in programs.values() if booted and p.engine and p not in due]
        try:
            for program in services:
                self._service(program)
            for name in reversed(gone):  # what was started last goes first: nginx before its keeper
                self._remove(name)
            for program in fresh:
                self._start(program)
            for program in started:
                self._await_ready(program.name)
            for program in rolling:
                self._roll(program)
        except AgentError as error:
            self._back(error)
            raise

    def _runs(self, program: Program) -> bool:
        slot = self.machine.slot_bundle(program.name)
        same = (
            slot is not None and program.name in slot.programs and slot.programs[program.name].digest == program.digest
        )
        return same and not self._down(program.name)

    def _down(self, name: str) -> bool:
        processes = self.supervisor.of(name)
        return not processes or any(process.state not in LIVE for process in processes)

    def _swap(self, program: Program) -> None:
        self.moved.append((program, self.machine.slot(program.name)))
        self.machine.point(program.name, self.bundle.program_folder(program.name))

    def _service(self, program: Program) -> None:
        """Reload a service where that is enough, else restart it."""
        folder = self.bundle.program_folder(program.name)
        if program.reload == "haproxy":
            balancer.check(self.machine, folder)
        elif program.reload == "nginx":
            balancer.check_nginx(self.machine, folder)
        slot = self.machine.slot_bundle(program.name)
        before = slot.programs.get(program.name) if slot else None
        gentle = program.reload and not self._down(program.name) and before is not None and before.unit == program.unit
        self.say(f"{program.name}: {'reloading' if gentle else 'restarting' if before else 'starting'}")
        self._swap(program)
        if gentle:
            self._reload(program)
        else:
            self.supervisor.stop(program.name)
            self.supervisor.start(program.name)
        self._await_running(program.name)

    def _reload(self, program: Program) -> None:
        if program.reload == "haproxy":
            balancer.reload(self.machine, self.supervisor, program.name)
        else:
            self.supervisor.signal(program.name, "HUP")

    def _remove(self, name: str) -> None:
        slot = self.machine.slot_bundle(name)
        if slot and name in slot.programs and slot.programs[name].engine:
            self._drain(name)
        self.say(f"{name}: stopping")
        self.supervisor.stop(name)
        self.machine.point(name, None)
        self.supervisor.forget(name)

    def _start(self, program: Program) -> None:
        self.say(f"{program.name}: starting")
        self._swap(program)
        self.supervisor.stop(program.name)
        self._ask(f"/expect?engine={program.name}", "POST")
        self.supervisor.start(program.name)

    def _roll(self, program: Program) -> None:
        self._await_another(program.name)
        self._drain(program.name)
        self.say(f"{program.name}: stopping")
        self.supervisor.stop(program.name)
        self._start(program)
        self._await_ready(program.name)

    def _back(self, error: AgentError) -> None:
        """Return what was moved to the folder that it ran from; what ran nowhere before stays, to be looked at."""
        for program, folder in reversed(self.moved):
            if folder is None or not folder.is_dir() or folder == self.machine.slot(program.name):
                continue
            self.say(f"{program.name}: going back to bundle {folder.parent.parent.name[:12]} ({error})")
            if program.engine:
                self._drain(program.name)
            self.supervisor.stop(program.name)
            self.machine.point(program.name, folder)
            if program.engine:
                self._ask(f"/expect?engine={program.name}", "POST")
            self.supervisor.start(program.name)
            if program.engine:
                self._await_ready(program.name)
            else:
                self._await_running(program.name)

    # What the agent says of the engines.

    def _agent(self) -> dict[str, Any]:
        file = self.machine.slots / "agent" / "agent.json"
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return settings

    def _ask(self, path: str, method: str = "GET") -> Any:
        """Call the agent; None while it does not answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._agent()['port']}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            return None
        except (OSError, ValueError):
            return None

    def _engine(self, name: str) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self._ask("/engines") or []
        return next((row for row in rows if row["engine"] == name), {})

    def _drain(self, name: str) -> None:
        """Let no new request in and wait for those that are in, at most the drain deadline."""
        if self._engine(name).get("state") != "ready":
            return
        self.say(f"{name}: draining")
        deadline = time.monotonic() + self._agent()["drain_s"]
        self._ask(f"/drain?engine={name}", "POST")
        said = time.monotonic()
        while not (row := self._engine(name)).get("drained"):
            if row.get("state") not in ("draining", None):
                return  # it died meanwhile: nothing is left to wait for
            if time.monotonic() > deadline:
                self.say(
                    f"{name}: still {row.get('in_flight')} in flight at the end of the drain deadline: stopping it"
                )
                return
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                self.say(f"{name}: draining, {row.get('in_flight')} in flight")
            time.sleep(POLL_S)

    def _await_another(self, name: str) -> None:
        """Before the last ready engine of a model is taken away, wait for another one.

        Raises:
            AgentError: there is another one, and it does not get ready.
        """
        rows: list[dict[str, Any]] = self._ask("/engines") or []
        own = next((row for row in rows if row["engine"] == name), {})
        others = [row["engine"] for row in rows if row.get("model") == own.get("model") and row["engine"] != name]
        if not others or own.get("state") != "ready":
            return
        settings = self._agent()
        if not wait_for(
            lambda: any(self._engine(o).get("state") == "ready" for o in others), settings["start_s"], POLL_S
        ):
            raise AgentError(
                f"{name} is the only ready engine of its model, and {', '.join(others)} does not get ready"
            )

    def _await_ready(self, name: str) -> None:
        """Wait until an engine is ready.

        Raises:
            AgentError: it was given up, it crashes again and again, or its deadline is over.
        """
        settings = self._agent()
        begun = said = time.monotonic()
        while True:
            row = self._engine(name)
            took = time.monotonic() - begun
            if row.get("state") == "ready":
                self.say(f"{name}: ready after {took:.0f} s")
                return
            if any(process.state == "FATAL" for process in self.supervisor.of(name)):
                raise self._failure(name, "does not start")
            if row.get("crash_loop"):
                raise self._failure(name, f"crashes again and again: {row.get('last_error') or 'see its log'}")
            if took > settings["start_s"]:
                raise self._failure(
                    name, f"is not ready after {took:.0f} s: {row.get('last_error') or row.get('state')}"
                )
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                self.say(f"{name}: {row.get('state', 'starting')} for {took:.0f} s")
            time.sleep(POLL_S)

    def _await_running(self, name: str) -> None:
        """Wait until a service has stayed up for its settling time.

        Raises:
            AgentError: it does not stay up.
        """

        def settled() -> bool:
            states = {process.state for process in self.supervisor.of(name)}
            return states == {"RUNNING"} or "FATAL" in states

        if not wait_for(settled, SERVICE_S) or any(p.state == "FATAL" for p in self.supervisor.of(name)):
            raise self._failure(name, "does not stay up")

    def _failure(self, name: str, what: str) -> AgentError:
        log = self.machine.log / f"{name}.log"
        return AgentError(f"{name} {what}\n--- end of {log}\n{self.supervisor.tail(name)}\n---")
