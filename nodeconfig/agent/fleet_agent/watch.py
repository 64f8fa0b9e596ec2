"""The process between a machine and its cloud: sees what is, lets node.py decide, does that. For ever."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fleet_agent import balancer
from fleet_agent.cloud import Cloud, CloudError
from fleet_agent.machine import AgentError, Bundle, Machine
from fleet_agent.metadata import Metadata, Unreachable
from fleet_agent.node import Do, Memory, Row, Seen, Settings, Unit, decide, spare
from fleet_agent.verified import RECORD

LOOK_S = 1.0
"""Between two looks at the machine itself."""
AGENT_S = 3.0
GROUP_S = 20.0
"""Between two looks at the group, by a machine that is protected."""
AGAIN_S = 5.0
"""Before something that failed is tried again."""
LEAST_ROOM = 1 << 20
"""Bytes. With less on its disk a machine is taken for full."""
STATE = "node.json"
SERVICES = "services.json"
WEIGHTS, APPLY = "fleet-weights.service", "fleet-apply.service"
log = logging.getLogger("fleet_agent")


class Watch:
    """One machine."""

    def __init__(self, machine: Machine, facts: dict[str, Any], metadata: Metadata) -> None:
        self.machine = machine
        self.settings = Settings.of(facts)
        self.poll_s = float(facts["metadata_poll_s"])
        self.metadata = metadata
        self.stopping = False
        self.seen = Seen(now=time.monotonic())
        self.asked = float("-inf")
        self.counted = float("-inf")
        self.silent = False
        self.full = False
        self.failed: dict[Do, float] = {}
        self.instance = self._must("instance-id")
        address = self._must("local-ipv4")
        self.cloud = Cloud(facts["region"], self.instance, address, self.settings.group)
        self.file = machine.root.parent / STATE
        self.memory = self._recall()

    def _must(self, path: str) -> str:
        """What never changes, and without which nothing can be done."""
        while True:
            alive()
            try:
                return self.metadata.get(path)
            except Unreachable as error:
                log.warning("%s: waiting", error)
                time.sleep(AGAIN_S)

    # What outlives this process, and a reboot.

    def _recall(self) -> Memory:
        memory = Memory()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept["instance"] == self.instance:  # else it came with the image
                memory.launched = bool(kept["launched"])
                memory.services = dict(kept["services"])
                memory.detached = bool(kept["detached"])
        return memory

    def _remember(self) -> None:
        memory = self.memory
        kept = {"instance": self.instance, "launched": memory.launched, "services": memory.services}
        kept["detached"] = memory.detached
        text = json.dumps(kept)
        fresh = self.file.with_suffix(".new")
        try:
            if self.file.is_file() and self.file.read_text(encoding="utf-8") == text:
                return
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self.file)
        except OSError as error:  # a full disk must not take a serving machine out
            log.warning("cannot keep the state of this machine: %s", error)

    def _room(self) -> None:
        """Say once that the disk is full, and once that it is not any more: what runs goes on, its logs do not."""
        full = shutil.disk_usage(self.machine.root).free < LEAST_ROOM
        if full and not self.full:
            log.warning("the disk of %s is full: logs and state are lost until there is room", self.machine.root)
        elif self.full and not full:
            log.info("there is room in %s again", self.machine.root)
        self.full = full

    # Seeing.

    def look(self) -> Seen:
        """What is so now."""
        now = time.monotonic()
        seen = replace(self.seen, now=now, stopping=self.stopping)
        if now - self.asked >= self.poll_s:
            self.asked = now
            seen = self._ask_metadata(seen)
        weights, apply = units()
        seen = replace(seen, weights=weights, apply=apply)
        if self.settings.role == "engine" and (self.memory.protected or seen.spare):
            seen = replace(seen, spare=self._spare(seen))
        if self.settings.role == "engine":
            seen = replace(seen, expected=self._expected(), engines=self._engines(), filling=self._filling(seen))
        elif self.settings.role == "gateway":
            answers, count = self._gateway()
            seen = replace(seen, answers=answers, open=count)
        # Last: an engine that was not ready a moment ago may be so because of a change, which then still goes on.
        self.seen = replace(seen, changing=self._changing())
        return self.seen

    def _ask_metadata(self, seen: Seen) -> Seen:
        try:
            spot = bool(self.metadata.get("spot/instance-action"))
            if self.metadata.get("events/recommendations/rebalance") and not self.memory.leaving:
                log.info("AWS recommends to rebalance: the group starts another machine first, and then ends this one")
            seen = replace(seen, spot=spot, target=self.metadata.get("autoscaling/target-lifecycle-state"))
        except Unreachable as error:
            if not self.silent:
                log.warning("%s: what was known stays true", error)
            self.silent = True
            return seen
        if self.silent:
            log.info("the metadata service answers again")
        self.silent = False
        return seen

    def _spare(self, seen: Seen) -> bool:
        if seen.now - self.counted < GROUP_S:
            return seen.spare
        self.counted = seen.now
        try:
            return spare(*self.cloud.machines(), self.instance)
        except (CloudError, ValueError) as error:
            log.warning("cannot see the group: %s", error)
            return False

    def _wanted(self) -> Path:
        return self.machine.root / "wanted"

    def _expected(self) -> frozenset[str]:
        with contextlib.suppress(AgentError, KeyError):
            programs = Bundle(self._wanted()).programs
            return frozenset(name for name, program in programs.items() if program.engine)
        return frozenset()

    def _filling(self, seen: Seen) -> bool:
        """Whether the weights are waited for: everything of them that was begun is whole, and something was not."""
        if seen.weights.state != "activating":
            return False
        with contextlib.suppress(OSError, ValueError, KeyError):
            entries = json.loads((self._wanted() / "node/weights.json").read_text(encoding="utf-8"))["entries"]
            begun = [folder for entry in entries if (folder := Path(entry["folder"])).is_dir()]
            return len(begun) < len(entries) and all((folder / RECORD).is_file() for folder in begun)
        return False

    def _port(self) -> int:
        file = self.machine.slots / "agent" / "agent.json"
        return int(json.loads(file.read_text(encoding="utf-8"))["port"])

    def _agent(self, path: str, method: str = "GET") -> Any:
        """Ask the agent; None while it does not answer."""
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{self._port()}{path}", method=method)
            with urllib.request.urlopen(request, timeout=AGENT_S) as answer:  # noqa: S310 - loopback
                return json.load(answer)
        except (OSError, ValueError, KeyError, HTTPException):
            return None

    def _engines(self) -> tuple[Row, ...] | None:
        rows = self._agent("/engines")
        if rows is None:
            return None
        return tuple(
            Row(row["engine"], row["model"], row["port"], row["state"], row["in_flight"], row["drained"])
            for row in rows
        )

    def _gateway(self) -> tuple[bool, int]:
        """Whether HAProxy answers, and how many requests it has open."""
        try:
            table = balancer.command(self.machine.run, "show stat")
        except OSError:
            return False, 0
        rows = [line.split(",") for line in table.splitlines() if line and not line.startswith("#")]
        return True, sum(int(row[4] or 0) for row in rows if row[0].startswith("model-") and row[1] == "BACKEND")

    def _changing(self) -> bool:
        try:
            with (self.machine.run / "machine.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    # Doing.

    def act(self, action: Do) -> None:
        """Do it, and take note if that worked."""
        alive()
        now = time.monotonic()
        if now - self.failed.get(action, float("-inf")) < AGAIN_S:
            return
        words = " ".join(filter(None, (action.kind, action.name, action.why and f"({action.why})")))
        try:
            self._do(action)
        except (CloudError, OSError) as error:
            self.failed[action] = now
            log.warning("%s failed: %s", words, error)
            return
        if action.kind == "abandon":
            log.error("ABANDON: %s", action.why)
        elif action.kind != "heartbeat":
            log.info("%s", words)
        self.memory.done(action, now)

    def _do(self, action: Do) -> None:
        if action.kind == "start":
            systemctl("start", "--no-block", APPLY)
        elif action.kind != "drain":
            self._tell(action)
        elif self._agent(f"/drain?engine={action.name}", "POST") is None:
            raise CloudError("the agent does not answer")

    def _tell(self, action: Do) -> None:
        """AWS."""
        match action.kind:
            case "register":
                self.cloud.register(action.service, action.name, action.port)
            case "deregister":
                self.cloud.deregister(action.service, action.name)
            case "attach":
                self.cloud.balance(on=True)
            case "detach":
                try:
                    self.cloud.balance(on=False)
                finally:  # for a load balancer that does not hear of it
                    balancer.command(self.machine.run, balancer.LEAVING)
            case "continue" | "abandon":
                self.cloud.hook(action.name, action.kind.upper())
            case "heartbeat":
                self.cloud.heartbeat(action.name)
            case "protect" | "unprotect":
                self.cloud.protect(protected=action.kind == "protect")
            case "unhealthy":
                self.cloud.unhealthy()

    def run(self) -> None:
        """For ever, or until a shutdown has nothing left to wait for."""
        while not (self.stopping and self.memory.drained):
            alive()
            try:
                for action in decide(self.settings, self.memory, self.look()):
                    self.act(action)
                self._remember()
                self._room()
            except Exception:  # what watches must outlive what it sees
                log.exception("looking at this machine failed")
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """SIGTERM: of the whole machine it means that it is to leave; of this process alone nothing."""
        if systemctl("is-system-running").strip() != "stopping":
            raise SystemExit(0)
        self.stopping = True


def alive() -> None:
    """Tell systemd's watchdog; elsewhere nothing."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"WATCHDOG=1", address.replace("@", "\0", 1) if address[0] == "@" else address)


def systemctl(*arguments: str) -> str:
    """Ask systemd; its exit status is part of what it says."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    return done.stdout


def units() -> tuple[Unit, Unit]:
    """How weights and programs are."""
    properties = "--property=Id,ActiveState,Result,ExecMainStatus"
    found = read_units(systemctl("show", properties, WEIGHTS, APPLY))
    return found.get(WEIGHTS, Unit()), found.get(APPLY, Unit())


def read_units(text: str) -> dict[str, Unit]:
    """What `systemctl show` says of several units."""
    found = {}
    for block in text.split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in values:
            status = int(values.get("ExecMainStatus") or 0)
            found[values["Id"]] = Unit(values.get("ActiveState", ""), values.get("Result", ""), status)
    return found


def facts(file: Path, root: Path) -> dict[str, Any]:
    """What a machine knows of itself: from its user data, from its bundle, and from its pointer as boot.py kept it."""
    parts = (file, root / "wanted/node/timings.json", root / SERVICES)
    node, timings, services = (json.loads(part.read_text(encoding="utf-8")) for part in parts)
    return {**node, **timings, "services": services}


def watch(file: Path, root: Path) -> None:
    """Be the watcher of the machine that `file`, its node.json, describes."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
    watcher = Watch(Machine(root), facts(file, root), Metadata())
    signal.signal(signal.SIGTERM, lambda *_: watcher.stop())
    log.info("watching %s, %s", watcher.instance, "serving" if watcher.memory.launched else "launching")
    watcher.run()
