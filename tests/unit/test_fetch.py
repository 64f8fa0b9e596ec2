"""A node's weights: on its disk under their names only when every byte is as locked, whatever happens on the way."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from boto3.session import Session
from fleet_agent import bucket, verified
from fleet_agent.__main__ import main
from fleet_agent.bucket import Late, Refused
from fleet_agent.fetch import Files, Patience, fetch, of, read_entries, there
from fleet_agent.start import check_weights, expected_files

from infra.paths import NODECONFIG
from tests.moto_server import Road, moto

REGION = "us-east-1"
BUCKET = "fleet-test"
PART = bucket.PART_BYTES
HASTY = Patience(limit_s=60, poll_s=0.02, first_s=0.02, denied_s=0)
DEADLINE_S = 60
LARGE = random.Random(1).randbytes(PART + 1000)  # noqa: S311 - noise
MODEL = {"model.safetensors": b"weights" * 1000, "config.json": b"{}", "deep/er/empty.txt": b""}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto() as address:
        yield address


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setattr(bucket, "Session", session)


@pytest.fixture
def road(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Road]:
    with Road(server) as road:
        monkeypatch.setenv("AWS_ENDPOINT_URL", road.url)
        s3_at(road.address).create_bucket(Bucket=BUCKET)
        yield road
        for item in s3_at(road.address).list_objects_v2(Bucket=BUCKET).get("Contents", ()):
            s3_at(road.address).delete_object(Bucket=BUCKET, Key=item["Key"])


@functools.cache
def session(region_name: str) -> Session:
    """One for all tests: the first client of a session takes longer than a test."""
    return Session(region_name=region_name)


@functools.cache
def s3_at(address: str) -> Any:
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client("s3", endpoint_url=f"http://{address}", region_name=REGION, **keys)


def facts(model: dict[str, bytes]) -> Files:
    return {
        path: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for path, content in model.items()
    }


class Node:
    """A node with one entry to have."""

    def __init__(self, road: Road, folder: Path, model: dict[str, bytes]) -> None:
        self.road = road
        self.root = folder
        self.model = model
        self.s3 = s3_at(road.address)
        self.prefix = "weights/chat/0123456789abcdef"
        self.folder = folder / "weights" / "chat-0123456789ab"
        self.file = folder / "weights.json"
        self.said: list[str] = []
        self.locked: Files | None = facts(model)
        self.put(model)
        self.write()

    def put(self, model: dict[str, bytes], *, complete: bool = True) -> None:
        for path, content in model.items():
            self.s3.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{path}", Body=content)
        if complete:
            text = json.dumps(facts(model))
            self.s3.put_object(Bucket=BUCKET, Key=f"{self.prefix}/.complete", Body=text.encode())

    def write(self) -> None:
        entry = {"name": "chat", "digest": "0123456789abcdef", "prefix": self.prefix, "folder": str(self.folder)}
        self.file.write_text(json.dumps({"entries": [{**entry, "files": self.locked}]}))

    def fetch(self, patience: Patience = HASTY, name: str = BUCKET) -> None:
        fetch(self.file, name, REGION, root=self.root, patience=patience, say=self.said.append)

    def command(self, *more: str) -> list[str]:
        fetch = [sys.executable, "-m", "fleet_agent", "fetch", str(self.file), "--bucket", BUCKET, "--region", REGION]
        return [*fetch, "--root", str(self.root), *more]

    def assert_whole(self) -> None:
        assert self.locked is not None
        assert check_weights(self.folder, self.locked) == []
        assert not list(self.folder.rglob("*.partial"))


@pytest.fixture
def node(road: Road, tmp_path: Path) -> Node:
    return Node(road, tmp_path, MODEL)


@pytest.fixture
def large(road: Road, tmp_path: Path) -> Node:
    return Node(road, tmp_path, {"model.safetensors": LARGE})


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(NODECONFIG / "agent")}


def test_what_is_there_is_not_asked_for_again(node: Node) -> None:
    node.fetch()
    node.assert_whole()
    assert node.said[-1].startswith("chat weights: 7.0 kB verified, 7.0 kB fetched, ")
    node.road.requests = 0
    node.fetch()
    assert node.road.requests == 0


def test_the_record_stands_for_digests_that_the_lock_does_not_have(node: Node) -> None:
    node.locked = None
    node.write()
    node.fetch()
    record = {"files": None, "record": str(node.folder / verified.RECORD)}
    expected = expected_files(record)
    assert expected.keys() == MODEL.keys()
    assert check_weights(node.folder, expected) == []
    node.road.requests = 0
    node.fetch()
    assert node.road.requests == 0


def test_a_file_that_was_written_to_since_is_no_longer_verified(node: Node) -> None:
    node.fetch()
    file = node.folder / "model.safetensors"
    before = file.stat()
    assert verified.read(node.folder).keys() == MODEL.keys()
    file.write_bytes(b"WEIGHTS" * 1000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verified.read(node.folder).keys() == MODEL.keys() - {"model.safetensors"}
    node.fetch()
    node.assert_whole()


def test_a_file_that_nobody_locked_does_not_stay_beside_those_that_were(node: Node) -> None:
    node.folder.mkdir(parents=True)
    (node.folder / "other.safetensors").write_bytes(b"an engine would load it")
    node.fetch()
    assert sorted(path.name for path in node.folder.glob("*")) == [
        verified.RECORD,
        "config.json",
        "deep",
        "model.safetensors",
    ]


def test_a_cache_that_is_being_filled_is_waited_for(road: Road, tmp_path: Path) -> None:
    node = Node(road, tmp_path, {})
    node.s3.delete_object(Bucket=BUCKET, Key=f"{node.prefix}/.complete")
    node.locked = facts(MODEL)
    node.write()

    def fill(text: str) -> None:
        if "being filled" in text and not node.said:
            node.put(MODEL)
        node.said.append(text)

    fetch(node.file, BUCKET, REGION, patience=HASTY, say=fill)
    assert "s3://fleet-test/weights/chat/0123456789abcdef/.complete is not there yet" in node.said[0]
    node.assert_whole()


def test_a_limit_ends_the_wait(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.s3.delete_object(Bucket=BUCKET, Key=f"{node.prefix}/.complete")
    with pytest.raises(Late, match=r"nothing came for 0 s: the cache is being filled"):
        node.fetch(Patience(limit_s=0.1, poll_s=0.02))
    monkeypatch.setattr("sys.argv", node.command("--wait-s", "0.1")[2:])
    assert main() == 75


@pytest.mark.parametrize(
    "faults",
    [
        ["503 SlowDown"] * 3,
        ["500 InternalError", "503 ServiceUnavailable"],
        ["412 PreconditionFailed", "429 TooManyRequests"],  # the runtime does not try these again, we do
        [1000, 0, 5_000_000],
        ["wrong"],
    ],
    ids=["slow down", "errors", "not by the runtime", "cut", "wrong once"],
)
def test_trouble_that_passes_is_outlasted(large: Node, faults: list[Any]) -> None:
    large.road.faults = {"model.safetensors": faults}
    large.fetch()
    large.assert_whole()
    assert not faults, "all of them were met"


def test_trouble_with_the_small_requests_is_outlasted(node: Node) -> None:
    node.road.faults = {".complete": ["503 SlowDown"] * 4}
    node.fetch()
    node.assert_whole()


def test_wrong_bytes_are_fetched_once_more_and_then_refused(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {**MODEL, "model.safetensors": b"WEIGHTS" * 1000}
    node.put(wrong, complete=False)
    with pytest.raises(Refused) as refusal:
        node.fetch()
    text = str(refusal.value)
    assert f"model.safetensors: has SHA-256 {facts(wrong)['model.safetensors']['sha256']}" in text
    assert f"wanted {facts(MODEL)['model.safetensors']['sha256']}" in text
    assert "delete s3://fleet-test/weights/chat/0123456789abcdef/ and start the stack's fill job again" in text
    assert node.road.starts("model.safetensors") == [0, 0]
    assert not list(node.folder.glob("model.safetensors*"))
    assert not there_now(node)
    monkeypatch.setattr("sys.argv", node.command()[2:])
    assert main() == 78
    assert capsys.readouterr().err.startswith("chat weights: the cache has another file than was locked\n")


def there_now(node: Node) -> bool:
    return there(read_entries(node.file)[0])


def test_a_size_that_differs_is_refused_before_anything_is_read(node: Node) -> None:
    node.put({**MODEL, "config.json": b"{} "}, complete=False)
    with pytest.raises(Refused, match=r"config.json: has 3 bytes, wanted 2"):
        node.fetch()
    assert node.road.starts("config.json") == []


def test_what_a_killed_run_has_is_not_fetched_again(large: Node) -> None:
    stalled = threading.Event()
    # The last part never comes: parts are asked for in any order, so the proxy goes by where a range begins.
    fault = large.road.fault

    def last_stalls(key: str) -> Any:
        return stalled if large.road.asked[-1] == (key, PART) and not stalled.is_set() else fault(key)

    large.road.fault = last_stalls  # type: ignore[method-assign]
    partial = large.folder / "model.safetensors.partial"
    with subprocess.Popen(large.command(), env=environment(), stdout=subprocess.DEVNULL) as process:
        try:
            until("the first part", lambda: partial.exists() and partial.stat().st_size == PART)
        finally:
            process.send_signal(signal.SIGKILL)
    stalled.set()
    large.road.asked.clear()
    large.fetch()
    large.assert_whole()
    assert large.road.starts("model.safetensors") == [PART]
    assert "1.0 kB fetched" in large.said[-1]


def test_files_of_a_run_that_was_killed_before_it_wrote_its_record_are_read_and_not_fetched(node: Node) -> None:
    node.fetch()
    (node.folder / verified.RECORD).unlink()
    node.road.asked.clear()
    node.fetch()
    node.assert_whole()
    assert node.road.starts("model.safetensors") == []


def test_what_is_no_beginning_of_the_file_is_found_out(node: Node) -> None:
    node.folder.mkdir(parents=True)
    (node.folder / "model.safetensors.partial").write_bytes(b"zeros after a loss of power")
    node.fetch()
    node.assert_whole()


@pytest.mark.parametrize(
    ("where", "fault", "text"),
    [
        (".complete", "403 AccessDenied", r"S3 refuses .*/.complete \(403 AccessDenied\): the machine's role needs"),
        ("model.safetensors", "403 AccessDenied", r"S3 refuses .*kms:Decrypt"),
        ("model.safetensors", "404 NoSuchKey", r"model.safetensors is not there, though the entry is complete"),
        (".complete", "404 NoSuchBucket", r"there is no bucket `fleet-test`"),
        (".complete", "400 AuthorizationHeaderMalformed", r"check bucket and region"),
    ],
)
def test_what_does_not_pass_is_refused(node: Node, where: str, fault: str, text: str) -> None:
    node.road.faults = {where: [fault] * 100}
    with pytest.raises(Refused, match=text):
        node.fetch()
    assert not there_now(node)


def test_permissions_that_are_new_are_waited_for(node: Node) -> None:
    node.road.faults = {".complete": ["403 AccessDenied"] * 2, "model.safetensors": ["403 AccessDenied"]}
    node.fetch(Patience(limit_s=60, first_s=0.02, denied_s=60))
    node.assert_whole()


def test_a_bucket_that_is_gone_is_refused(node: Node) -> None:
    with pytest.raises(Refused, match="there is no bucket `fleet-gone`"):
        node.fetch(name="fleet-gone")


def test_a_disk_that_is_too_small_is_said_before_anything_is_read(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    with pytest.raises(Refused, match=r"chat weights need 7.0 kB \(7002 bytes\) more in .*, and 1.0 kB"):
        node.fetch()
    assert node.road.starts("model.safetensors") == []


def test_a_disk_that_becomes_full_is_said_so(node: Node) -> None:
    node.folder.mkdir(parents=True)
    (node.folder / "model.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(Refused, match="became full"):
        node.fetch()


def test_room_is_made_of_what_no_bundle_names(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: node.folder.parent / name for name in ("old-0123456789ab", "used-0123456789ab", "a user's folder")}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x")
    os.utime(folders["used-0123456789ab"], (0, 0))  # the oldest would go first
    bundle = node.root / "bundles" / "digest" / "weights.json"
    bundle.parent.mkdir(parents=True)
    entry = {"name": "used", "digest": "d", "prefix": "weights/used/d", "folder": str(folders["used-0123456789ab"])}
    bundle.write_text(json.dumps({"entries": [{**entry, "files": None}]}))

    def usage(_path: Path) -> Any:
        free = 1_000 if folders["old-0123456789ab"].exists() else 100_000
        return shutil._ntuple_diskusage(1_000_000, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    node.fetch()
    assert [name for name, folder in folders.items() if folder.exists()] == ["used-0123456789ab", "a user's folder"]
    node.assert_whole()


def test_a_path_that_leaves_the_folder_is_refused(node: Node) -> None:
    node.locked = None
    node.write()
    text = json.dumps(facts({"../../outside": b"x"}))
    node.s3.put_object(Bucket=BUCKET, Key=f"{node.prefix}/.complete", Body=text.encode())
    with pytest.raises(Refused, match="is no path of a file"):
        node.fetch()
    assert not (node.root / "outside").exists()


def test_a_run_waits_for_another(node: Node) -> None:
    node.folder.parent.mkdir()
    with (node.folder.parent / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with subprocess.Popen(node.command(), env=environment(), stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout
            assert run.stdout.readline() == "weights: waiting for another run that fetches to this disk\n"
            assert node.road.requests == 0
            fcntl.flock(file, fcntl.LOCK_UN)
            run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 0
    node.assert_whole()


def test_progress_reads_well() -> None:
    assert of(34_100_000_000, 70_600_000_000) == "34.1 of 70.6 GB"
    assert of(3, 412) == "3 of 412 bytes"


def until(what: str, condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {DEADLINE_S} s: {what}"
        time.sleep(0.02)
