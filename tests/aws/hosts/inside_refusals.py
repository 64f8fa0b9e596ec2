"""Machines that must not serve: each says why in its log, and tells its group to try another one (ABANDON).

And machines that meet trouble on the way, and get there all the same. They boot side by side, each in a group of its
own that differs from the pool's in what it runs, while `pulumi up` still waits for the load balancer.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hosts.host import Host, HostError

from tests.aws.hosts.clients import Figure
from tests.aws.hosts.world import ENTRY, FILES, Fleet, read_lock, small_lock, tell, until

Fault = dict[str, Any]
SMALL_DISK = (
    "bootcmd:\n  - mkdir -p /var/lib/fleet/weights\n  - mount -t tmpfs -o size=2m tmpfs /var/lib/fleet/weights\n"
)
REFUSED = ("denied", "digest", "missing", "disk", "crash", "bundle")
DELAYED = ("silent", "slow", "trouble", "clock")
SLOW, SLOW_BYTES = "8mbit", 12 << 20
"""The network that weights come over, and how much: 12 s and more."""
LOG_LINES = 200
CLOUD_INIT = "var/log/cloud-init.log"
IN_VAIN = " failed [50/120s]"
"""What cloud-init says of a metadata service that does not answer."""


class Cases:
    """One machine for each case, and what became of it."""

    def __init__(self, boots: Fleet) -> None:
        self.boots = boots
        self.began = time.monotonic()
        self.groups: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.said: dict[str, str] = {}
        """What machines that gave up had said."""
        self.after: dict[str, float] = {}
        self.muted = ""
        """Address of the machine that the metadata service does not answer."""

    def start(self) -> None:
        rules: list[Fault] = []
        digests = {}
        for case in (*REFUSED, *DELAYED):
            digests[case], faults = prepare(self.boots, case)
            rules += faults
        self.boots.faults(*rules)
        self.began = time.monotonic()
        for case, digest in digests.items():
            more = SMALL_DISK if case == "disk" else ""
            self.groups[case] = self.boots.case(case, digest, more, once=case in REFUSED)
            (self.names[case],) = self.boots.members(self.groups[case])
            if case == "silent":
                self.muted = self.boots.address(self.names[case])
                answers("add", self.muted)
            if case == "slow":
                slow_down(Host(self.names[case]))

    def look(self) -> None:
        """At all of them: those that gave up are soon gone, with what they said."""
        self.boots.follower.check()
        for case in (it for it in REFUSED if it not in self.said):
            text = tell(Host(self.names[case]), LOG_LINES)
            if "ABANDON" in text:
                self.said[case], self.after[case] = text, round(time.monotonic() - self.began, 1)
        if self.muted and IN_VAIN in cloud_init(self.names["silent"]):
            answers("del", self.muted)
            self.muted = ""

    def refused(self, case: str) -> str:
        """What the machine of a case said before it was given up."""

        def given_up() -> bool:
            self.look()
            return case in self.said

        until(f"{case} gives up", given_up)
        name = self.names[case]
        until("its group lets go of it", lambda: name not in self.boots.members(self.groups[case]))
        assert f"{name}-chat-1" not in self.boots.registered()
        return self.said[case]

    def arrived(self, case: str) -> Host:
        """The machine of a case, once it serves."""
        name = self.names[case]

        def serving() -> bool:
            self.look()
            return self.boots.members(self.groups[case]).get(name) == "InService"

        until(f"{case} serves", serving)
        until("it is registered", lambda: f"{name}-chat-1" in self.boots.registered())
        self.after[case] = round(time.monotonic() - self.began, 1)
        return Host(name)


def own_files(case: str) -> dict[str, bytes]:
    """Those of an entry that nobody else has, and that has a prefix of its own."""
    size = SLOW_BYTES if case == "slow" else 1 << 20
    return {**FILES, "model-2.safetensors": case.encode() + os.urandom(size)}


def corrupted(files: dict[str, bytes]) -> dict[str, bytes]:
    data = files["model-2.safetensors"]
    return {**files, "model-2.safetensors": bytes([data[0] ^ 1]) + data[1:]}


def prepare(boots: Fleet, case: str) -> tuple[str, list[Fault]]:
    """What a case's machine finds: the digest of its bundle; and what the stand-in does wrong, to nobody else."""
    files = own_files(case)
    lock = read_lock(small_lock(files))
    stored = {"digest": corrupted(files), "missing": {k: v for k, v in files.items() if k != "config.json"}}
    prefix = boots.fill(ENTRY, stored.get(case, files), lock)
    bundle = boots.engine_bundle(lock, **({"max_model_len": "1000"} if case == "crash" else {}))
    digest = boots.store(bundle)
    if case == "bundle":
        public = {**bundle.files, "programs/chat-1/engine.json": "{}"}
        boots.put(f"bundles/{digest}.json", json.dumps({"schema": 1, "files": public}).encode())
    any_file, model = ({"service": "s3", "match": f"{prefix}{path}"} for path in ("", "/model"))
    skew = {"code": "RequestTimeTooSkewed", "message": "Signature not yet current", "status": 403, "count": 4}
    faults: dict[str, list[Fault]] = {
        "denied": [{**any_file, "code": "AccessDenied", "status": 403, "count": 100_000}],
        "trouble": [
            {**any_file, "code": "AccessDenied", "status": 403, "count": 2},
            {**model, "code": "SlowDown", "status": 503, "count": 6},
            {**model, "drop": True, "count": 2},
            {**model, "truncate": 300_000, "count": 2},
            {**model, "delay": 1.0, "count": 2},
        ],
        "clock": [{"service": "ssm", "action": "GetParameter", "match": "engine-clock", **skew}],
    }
    return digest, faults.get(case, [])


def slow_down(host: Host) -> None:
    """From the beginning of its boot."""
    until("it is on", lambda: host.dir.exists() and host.alive)
    host.slow(SLOW)


def answers(verb: str, address: str) -> None:
    """Whether what the metadata service answers a machine gets lost: `add`, `del`."""
    lost = ["ip", "rule", verb, "from", "169.254.169.254", "to", address, "blackhole"]
    subprocess.run(lost, check=True)


def cloud_init(name: str) -> str:
    with contextlib.suppress(HostError, OSError):
        return str((Host(name).root / CLOUD_INIT).read_text())
    return ""


@pytest.fixture(scope="module")
def cases(boots: Fleet) -> Iterator[Cases]:
    made = Cases(boots)
    try:
        made.start()
        yield made
    finally:
        boots.faults()


@pytest.fixture
def refused(cases: Cases, record_property: Figure) -> Callable[[str], str]:
    def said(case: str) -> str:
        text = cases.refused(case)
        record_property("refused after, s", cases.after[case])
        return text

    return said


@pytest.fixture
def arrived(cases: Cases, record_property: Figure) -> Callable[[str], Host]:
    def host(case: str) -> Host:
        found = cases.arrived(case)
        record_property("in service after, s", cases.after[case])
        cases.boots.resize(cases.groups[case], 0)
        return found

    return host


def test_weights_that_are_not_what_was_locked(refused: Callable[[str], str]) -> None:
    said = refused("digest")
    assert "has SHA-256" in said
    assert "model-2.safetensors" in said


def test_weights_that_are_not_there(refused: Callable[[str], str]) -> None:
    assert "config.json: is not there" in refused("missing")


def test_a_disk_that_is_too_small(refused: Callable[[str], str]) -> None:
    assert "are free: nothing was fetched" in refused("disk")


def test_a_bundle_that_is_not_what_its_digest_says(refused: Callable[[str], str]) -> None:
    assert "programs/chat-1/engine.json has another SHA-256" in refused("bundle")


def test_an_engine_that_crashes_again_and_again(refused: Callable[[str], str]) -> None:
    said = refused("crash")
    assert "chat-1 crashes again and again" in said or "chat-1 does not start" in said


def test_an_s3_that_denies(refused: Callable[[str], str]) -> None:
    assert "the machine's role needs s3:GetObject" in refused("denied")


def test_an_s3_that_denies_drops_cuts_and_is_slow_for_a_while(
    arrived: Callable[[str], Host], record_property: Figure
) -> None:
    said = tell(arrived("trouble"), LOG_LINES)
    record_property("what the fetch said last", said.split(f"{ENTRY} weights: ")[-1].splitlines()[0])


def test_aws_says_that_the_clock_is_off(arrived: Callable[[str], Host]) -> None:
    assert "is the clock right?" in tell(arrived("clock"), LOG_LINES)


def test_weights_come_over_a_slow_network(arrived: Callable[[str], Host], record_property: Figure) -> None:
    host = arrived("slow")
    said = tell(host, LOG_LINES)
    host.mend()
    assert " s left" in said
    record_property("what the fetch said last", said.split(f"{ENTRY} weights: ")[-1].splitlines()[0])


def test_no_metadata_from_the_very_start_of_the_boot(cases: Cases, arrived: Callable[[str], Host]) -> None:
    host = arrived("silent")
    assert IN_VAIN in cloud_init(host.name)
    assert not cases.muted
