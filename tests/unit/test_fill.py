"""A stack's cache on S3: complete and as locked, or not said to be complete, whoever was killed or worked beside it."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from infra import weights
from infra.paths import NODECONFIG, ROOT
from infra.weights import upload
from infra.weights.cache import record_of
from infra.weights.entry import FileFact
from infra.weights.files import write_record
from infra.weights.upload import Target, fill
from tests.moto_server import moto
from tests.unit.hub import COMMIT, FACTS, REPOSITORY, Hub, fact, tiny_model

REGION = "us-east-1"
BUCKET = "fleet-test"
REQUEST = "fill/0123.json"
TOKEN = "hf_not_a_real_token"  # noqa: S105 - of a server on loopback
LARGE = 12_000_000
"""Elements of two bytes; uploaded in parts where those are made as small as S3 lets them."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto() as address:
        yield address


@functools.cache
def s3_at(address: str) -> Any:
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client("s3", endpoint_url=f"http://{address}", region_name=REGION, **keys)


class Cloud:
    """A bucket with a request in it, for a model on a hub."""

    def __init__(self, address: str, hub: Hub) -> None:
        self.s3 = s3_at(address)
        self.s3.create_bucket(Bucket=BUCKET)
        self.s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
        self.hub = hub
        self.said: list[str] = []
        self.lock = a_lock(hub.files)
        self.request({"tiny": self.lock.digest("tiny")})

    @property
    def prefix(self) -> str:
        return f"weights/tiny/{self.lock.digest('tiny')}"

    def request(self, entries: dict[str, str]) -> None:
        self.s3.put_object(Bucket=BUCKET, Key=REQUEST, Body=json.dumps({"entries": entries}).encode())

    def fill(self, **more: Any) -> None:
        fill(Target.of(BUCKET, REGION), REQUEST, self.lock, self.said.append, **more)

    def objects(self) -> dict[str, bytes]:
        found = self.s3.list_objects_v2(Bucket=BUCKET, Prefix="weights/").get("Contents", ())
        return {
            item["Key"].removeprefix(f"{self.prefix}/"): self.s3.get_object(Bucket=BUCKET, Key=item["Key"])[
                "Body"
            ].read()
            for item in found
        }

    def assert_complete(self, model: dict[str, bytes]) -> None:
        objects = self.objects()
        assert json.loads(objects.pop(".complete")) == {path: facts(content) for path, content in objects.items()}
        assert objects == model


def a_lock(model: dict[str, bytes]) -> weights.WeightsLock:
    files = {path: fact(content) for path, content in served(model).items()}
    source = f"hf://{REPOSITORY}@{COMMIT}"
    entry = {"source": source, "licence": "mit", "format": "bf16", "facts": FACTS, "files": files}
    return weights.WeightsLock.model_validate({"models": {"tiny": entry}})


def facts(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def served(model: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in model.items() if path != "README.md"}


@pytest.fixture
def cloud(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cloud]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path / "shared"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        cloud = Cloud(server, hub)
        yield cloud
        found = cloud.s3.list_object_versions(Bucket=BUCKET)
        for item in (*found.get("Versions", ()), *found.get("DeleteMarkers", ())):
            cloud.s3.delete_object(Bucket=BUCKET, Key=item["Key"], VersionId=item["VersionId"])


def test_what_is_complete_is_left_alone(cloud: Cloud) -> None:
    cloud.fill(discard=True)
    cloud.assert_complete(served(cloud.hub.files))
    assert not weights.place("tiny", cloud.lock).folder.exists()
    cloud.hub.asked.clear()
    cloud.fill(discard=True)
    assert cloud.said[-1] == f"tiny: is in s3://{BUCKET}/{cloud.prefix} already"
    assert cloud.hub.asked == []


def test_parts_carry_checksums(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PART_BYTES", 5 << 20)
    cloud.hub.files = tiny_model(elements=LARGE)
    cloud.lock = a_lock(cloud.hub.files)
    cloud.request({"tiny": cloud.lock.digest("tiny")})
    sent = []
    target = Target.of(BUCKET, REGION)
    target.first.meta.events.register("before-send.s3.UploadPart", lambda request, **_: sent.append(request.headers))
    fill(target, REQUEST, cloud.lock, cloud.said.append)
    cloud.assert_complete(served(cloud.hub.files))
    assert len(sent) == 5
    assert all(b"x-amz-checksum-sha256" in str(dict(headers)).lower().encode() for headers in sent)


def test_a_run_that_ended_on_the_way_is_gone_on_with(cloud: Cloud) -> None:
    files = served(cloud.hub.files)
    first, *rest = sorted(files)
    digest = facts(files[first])["sha256"]
    put = {"Bucket": BUCKET, "Body": files[first], "Metadata": {"sha256": digest}}
    cloud.s3.put_object(Key=f"{cloud.prefix}/{first}", **put)
    cloud.s3.put_object(Bucket=BUCKET, Key=f"{cloud.prefix}/{rest[0]}", Body=b"by another program")
    target = Target.of(BUCKET, REGION)
    sent = []
    for client in (target.s3, target.first):
        client.meta.events.register("before-send.s3.PutObject", lambda request, **_: sent.append(request.url))
    fill(target, REQUEST, cloud.lock, cloud.said.append)
    cloud.assert_complete(files)
    assert [url.rpartition("/")[2] for url in sent] == [*rest, ".complete"]


@pytest.mark.parametrize("gone", ["config.json", ".complete"])
def test_a_cache_with_a_hole_is_mended(cloud: Cloud, gone: str) -> None:
    cloud.fill()
    cloud.s3.delete_object(Bucket=BUCKET, Key=f"{cloud.prefix}/{gone}")
    cloud.fill()
    cloud.assert_complete(served(cloud.hub.files))


def test_what_is_not_as_locked_is_not_put_there(cloud: Cloud) -> None:
    cloud.hub.files["config.json"] = cloud.hub.files["config.json"].replace(b"64", b"65")
    with pytest.raises(weights.WeightsError, match=r"config\.json: has SHA-256"):
        cloud.fill()
    assert cloud.objects() == {}


def test_of_two_at_once_the_first_wins_and_both_end_well(cloud: Cloud) -> None:
    """The second is held where it has looked and not found: then the first has put the file there."""
    slow, fast = Target.of(BUCKET, REGION), Target.of(BUCKET, REGION)
    looked, go_on = threading.Event(), threading.Event()

    def hold(**_: Any) -> None:
        looked.set()
        go_on.wait(60)

    slow.first.meta.events.register_first("before-send.s3.PutObject", hold)
    failures = []

    def second() -> None:
        try:
            fill(slow, REQUEST, cloud.lock, cloud.said.append)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    assert looked.wait(60)
    fill(fast, REQUEST, cloud.lock, cloud.said.append)
    cloud.assert_complete(served(cloud.hub.files))
    before = versions(cloud)
    assert all(len(ids) == 1 for ids in before.values())
    go_on.set()
    thread.join(60)
    assert failures == []
    cloud.assert_complete(served(cloud.hub.files))
    assert versions(cloud) == before, "no file was written over"


def versions(cloud: Cloud) -> dict[str, list[str]]:
    """Every version that there is of each file: the stack's bucket keeps them."""
    found: dict[str, list[str]] = {}
    for item in cloud.s3.list_object_versions(Bucket=BUCKET, Prefix=f"{cloud.prefix}/")["Versions"]:
        if not item["Key"].endswith(".complete"):
            found.setdefault(item["Key"], []).append(item["VersionId"])
    return found


def test_of_an_entry_that_comes_out_different_each_time_what_is_there_counts(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock = yaml.safe_load((ROOT / "stacks/models.lock.yaml").read_text())
    models = {name: lock["models"][name] for name in ("smollm2-135m-instruct", "smollm2-135m-instruct-w8a8")}
    cloud.lock = weights.WeightsLock.model_validate({"models": models})
    name = "smollm2-135m-instruct-w8a8"
    prefix = f"weights/{name}/{cloud.lock.digest(name)}"
    cloud.request({name: cloud.lock.digest(name)})
    monkeypatch.setattr(upload, "_install_converter", lambda *_: None)

    def made(content: dict[str, bytes]) -> None:
        folder = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path, data in content.items():
            (folder / path).write_bytes(data)
        write_record(record_of(folder), {path: FileFact(**facts(data)) for path, data in content.items()})
        monkeypatch.setattr(upload, "ensure", lambda *_: folder)

    made({"a.safetensors": b"once", "b.safetensors": b"once"})
    cloud.fill()
    cloud.s3.delete_object(Bucket=BUCKET, Key=f"{prefix}/.complete")
    cloud.s3.delete_object(Bucket=BUCKET, Key=f"{prefix}/b.safetensors")
    made({"a.safetensors": b"more", "b.safetensors": b"more"})
    cloud.fill()
    complete = json.loads(cloud.s3.get_object(Bucket=BUCKET, Key=f"{prefix}/.complete")["Body"].read())
    assert complete == {"a.safetensors": facts(b"once"), "b.safetensors": facts(b"more")}


@pytest.mark.parametrize(
    ("entries", "text"),
    [({"tiny": "0" * 64}, "`tiny` is .* and 0+ is wanted"), ({"tony": "0" * 64}, "has no entry `tony`")],
)
def test_a_request_of_another_version_of_the_project_is_refused(
    cloud: Cloud, entries: dict[str, str], text: str
) -> None:
    cloud.request(entries)
    with pytest.raises(weights.WeightsError, match=text) as refusal:
        cloud.fill()
    assert "`pulumi up` again" in str(refusal.value)


def test_the_command_says_what_is_wrong_and_never_the_token(cloud: Cloud) -> None:
    command = [sys.executable, "-m", "infra.weights.fill", "--bucket", BUCKET, "--region", REGION]
    done = subprocess.run([*command, "--request", "fill/none.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"s3://{BUCKET}/fill/none.json: cannot be read: NoSuchKey")
    assert TOKEN not in done.stdout + done.stderr
    assert cloud.objects() == {}


def test_the_build_runs_the_command_with_locked_packages() -> None:
    spec = yaml.safe_load((NODECONFIG / "cache" / "buildspec.yml").read_text())
    commands = [" ".join(command.split()) for phase in spec["phases"].values() for command in phase["commands"]]
    assert any("--require-hashes -r requirements/aws.txt" in command for command in commands)
    assert any("-m infra.weights.fill --bucket" in command and "TOKEN" not in command for command in commands)
