"""Machines that must not serve: each says why in its log, and tells its group to try another one (ABANDON).

And machines that meet trouble on the way, and get there all the same.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from hosts.host import Host

from infra.weights.lock import WeightsLock
from tests.aws.hosts.world import ENTRY, FILES, Fleet, small_lock, tell, until

Figure = Callable[[str, object], None]
SMALL_DISK = (
    "bootcmd:\n  - mkdir -p /var/lib/fleet/weights\n  - mount -t tmpfs -o size=2m tmpfs /var/lib/fleet/weights\n"
)
S3: dict[str, Any] = {"service": "s3"}


def own_lock(name: str) -> tuple[WeightsLock, dict[str, bytes]]:
    """An entry that nobody else has: its own files, its own prefix."""
    files = {**FILES, "model-2.safetensors": name.encode() + os.urandom(1 << 20)}
    return small_lock(files), files


def corrupted(files: dict[str, bytes]) -> dict[str, bytes]:
    data = files["model-2.safetensors"]
    return {**files, "model-2.safetensors": bytes([data[0] ^ 1]) + data[1:]}


@pytest.fixture(scope="module")
def start(boots: Fleet) -> Callable[[str], str]:
    """Starts a group with one machine for a case, once; its name. Faults of S3 are those of its own prefix."""
    prepare(boots)
    more = {"disk": SMALL_DISK}
    group = functools.cache(lambda case: boots.group(f"engine-{case}", 1, more.get(case, "")))
    group("denied")  # takes a minute: it is tried again and again
    return group


def prepare(boots: Fleet) -> None:
    """What each case's machines find."""
    rules = []
    for case in ("digest", "missing", "denied", "disk", "crash", "bundle", "trouble", "clock"):
        lock, files = own_lock(case)
        stored = {"digest": corrupted(files), "missing": {k: v for k, v in files.items() if k != "config.json"}}
        prefix = boots.fill(lock, stored.get(case, files))
        flags = {"max_model_len": "1000"} if case == "crash" else {}
        bundle = boots.engine_bundle(lock, **flags)
        digest = boots.store(bundle)
        if case == "bundle":
            public = {**bundle.files, "programs/chat-1/engine.json": "{}"}
            boots.put(f"bundles/{digest}.json", json.dumps({"schema": 1, "files": public}).encode())
        if case == "denied":
            rules.append({**S3, "match": prefix, "code": "AccessDenied", "status": 403, "count": 100_000})
        if case == "trouble":
            of_files = {**S3, "match": f"{prefix}/model"}
            rules += [
                {**S3, "match": prefix, "code": "AccessDenied", "status": 403, "count": 2},
                {**of_files, "code": "SlowDown", "status": 503, "count": 6},
                {**of_files, "drop": True, "count": 2},
                {**of_files, "truncate": 300_000, "count": 2},
                {**of_files, "delay": 1.0, "count": 2},
            ]
        if case == "clock":
            skew = {"code": "RequestTimeTooSkewed", "message": "Signature not yet current", "status": 403, "count": 4}
            rules.append({"service": "ssm", "match": "engine-clock", **skew})
        boots.point(f"engine-{case}", digest)
    boots.faults(*rules)


def refused(boots: Fleet, group: str) -> str:
    """What a machine of a group said before it was given up."""
    known: set[str] = set()

    def given_up() -> tuple[str, str] | None:
        known.update(boots.members(group))  # which lists it no longer once its group has let go of it
        said = {name: tell(Host(name), 200) for name in known}
        return next(((name, text) for name, text in said.items() if "ABANDON" in text), None)

    name, said = until(f"{group} gives up", given_up)
    until("its group lets go of it", lambda: boots.members(group).get(name) != "Pending:Wait")
    boots.resize(group, 0)
    assert f"{name}-chat-1" not in boots.registered()
    return str(said)


def test_weights_that_are_not_what_was_locked(
    boots: Fleet, start: Callable[[str], str], record_property: Figure
) -> None:
    began = time.monotonic()
    said = refused(boots, start("digest"))
    record_property("refused after, s", round(time.monotonic() - began, 1))
    assert "has SHA-256" in said
    assert "model-2.safetensors" in said


def test_weights_that_are_not_there(boots: Fleet, start: Callable[[str], str]) -> None:
    assert "config.json: is not there" in refused(boots, start("missing"))


def test_a_disk_that_is_too_small(boots: Fleet, start: Callable[[str], str]) -> None:
    assert "are free: nothing was fetched" in refused(boots, start("disk"))


def test_a_bundle_that_is_not_what_its_digest_says(boots: Fleet, start: Callable[[str], str]) -> None:
    assert "programs/chat-1/engine.json has another SHA-256" in refused(boots, start("bundle"))


def test_an_engine_that_crashes_again_and_again(boots: Fleet, start: Callable[[str], str]) -> None:
    said = refused(boots, start("crash"))
    assert "chat-1 crashes again and again" in said or "chat-1 does not start" in said


def test_an_s3_that_denies_drops_cuts_and_is_slow_for_a_while(
    boots: Fleet, start: Callable[[str], str], record_property: Figure
) -> None:
    (host,) = boots.in_service(start("trouble"), 1)
    until("it is registered", lambda: f"{host.name}-chat-1" in boots.registered())
    record_property("what the fetch said last", tell(host, 200).split(f"{ENTRY} weights: ")[-1].splitlines()[0])
    boots.resize(start("trouble"), 0)


def test_aws_says_that_the_clock_is_off(boots: Fleet, start: Callable[[str], str]) -> None:
    (host,) = boots.in_service(start("clock"), 1)
    assert "is the clock right?" in tell(host, 200)
    boots.resize(start("clock"), 0)


def test_an_s3_that_denies(boots: Fleet, start: Callable[[str], str]) -> None:
    assert "the machine's role needs s3:GetObject" in refused(boots, start("denied"))
