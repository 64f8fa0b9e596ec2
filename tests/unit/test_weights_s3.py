"""S3 as a source, through the real boto3."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import weights
from infra.weights import cache, s3
from infra.weights.lock import LOCK, load
from tests.unit.bucket import KEY_ID, NAME, S3, SECRET
from tests.unit.hub import FACTS, fact, safetensors, tiny_model

PREFIX = "chat/v1/"
SOURCE = f"s3://{NAME}/chat/v1"
WEIGHTS = f"{PREFIX}model.safetensors"
LARGE = 6_000_000
"""Elements of two bytes: several of the pieces in which it is read."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path / "shared"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return monkeypatch


@pytest.fixture
def bucket(environment: pytest.MonkeyPatch) -> Iterator[S3]:
    with S3() as bucket:
        bucket.put(PREFIX, tiny_model())
        bucket.put("chat/v10/", tiny_model(seed=3))
        environment.setenv("AWS_ENDPOINT_URL", bucket.url)
        yield bucket


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "models.lock.yaml"
    file.write_bytes(LOCK.read_bytes())
    return file


def a_lock(model: dict[str, bytes], **more: Any) -> weights.WeightsLock:
    locked = {path: fact(content) for path, content in model.items() if path != "README.md"}
    entry = {"source": SOURCE, "licence": "mit", "format": "bf16", "facts": FACTS, "files": locked, **more}
    return weights.WeightsLock.model_validate({"models": {"tiny": entry}})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def served(model: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in model.items() if path != "README.md"}


# fleet lock add


@pytest.mark.parametrize("checksums", [None, "FULL_OBJECT", "COMPOSITE"])
def test_a_prefix_is_locked_and_can_then_be_fetched(bucket: S3, lock: Path, checksums: str | None) -> None:
    bucket.checksums = checksums
    name, entry = weights.add(f"{SOURCE}/", path=lock)
    assert name == "v1"
    assert entry.source == SOURCE
    assert {path: one.model_dump(exclude_none=True) for path, one in entry.files.items()} == {
        path: fact(content) for path, content in served(tiny_model()).items()
    }
    assert entry.facts.parameters == 20_000
    assert contents(weights.ensure(name, load(lock))) == served(tiny_model())


def test_what_s3_has_the_digest_of_is_not_read(bucket: S3, lock: Path) -> None:
    bucket.checksums = "FULL_OBJECT"
    weights.add(SOURCE, path=lock)
    assert bucket.starts("model.safetensors") == [0, 8]  # the header alone
    assert bucket.starts("tokenizer.json") == []
    bucket.checksums = "COMPOSITE"
    weights.add(SOURCE, path=lock)
    assert bucket.starts("model.safetensors") == [0, 8, 0, 8, 0]


def test_a_model_in_several_files_over_several_pages(bucket: S3, lock: Path) -> None:
    bucket.page = 2
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards = {
        first: safetensors({"model.layers.1.weight": ("BF16", 500)}),
        second: safetensors({"model.layers.2.weight": ("BF16", 500), "lm_head.weight": ("BF16", 30)}),
    }
    of = {"model.layers.1.weight": first, "model.layers.2.weight": second, "lm_head.weight": second}
    index = f'{{"metadata": {{}}, "weight_map": {of!r}}}'.replace("'", '"').encode()
    bucket.objects = {
        f"{PREFIX}config.json": tiny_model()["config.json"],
        f"{PREFIX}model.safetensors.index.json": index,
        f"{PREFIX}consolidated.safetensors": safetensors({"everything": ("BF16", 9)}),
        f"{PREFIX}original/params.json": b"{}",
        f"{PREFIX}": b"",
        **{f"{PREFIX}{path}": content for path, content in shards.items()},
    }
    _, entry = weights.add(SOURCE, path=lock)
    assert set(entry.files) == {"config.json", "model.safetensors.index.json", *shards}
    assert (entry.facts.parameters, entry.facts.tied_embeddings) == (1030, False)


def test_a_whole_bucket_can_be_the_source(bucket: S3, lock: Path) -> None:
    bucket.objects = tiny_model()
    name, entry = weights.add(f"s3://{NAME}", path=lock)
    assert (name, entry.source) == (NAME, f"s3://{NAME}")
    assert contents(weights.ensure(name, load(lock))) == served(tiny_model())


def test_versions_are_pinned_where_the_bucket_keeps_them(bucket: S3, lock: Path) -> None:
    model = tiny_model()
    bucket.versions = {WEIGHTS: "v.1_a", f"{PREFIX}config.json": "null"}
    name, entry = weights.add(SOURCE, "chat", path=lock)
    assert entry.files["model.safetensors"].version == "v.1_a"
    assert entry.files["config.json"].version is None
    # Somebody writes over it: what was locked is still what is fetched.
    bucket.old = {"v.1_a": model["model.safetensors"]}
    bucket.versions[WEIGHTS] = "v.2_b"
    bucket.objects[WEIGHTS] = tiny_model(seed=1)["model.safetensors"]
    assert contents(weights.ensure(name, load(lock))) == served(model)
    assert {asked.version for asked in bucket.asked if asked.key == WEIGHTS} == {None, "v.1_a"}
    place = weights.place(name, load(lock))
    assert place.files is not None
    assert place.files["model.safetensors"] == fact(model["model.safetensors"])


def test_an_object_that_changes_while_it_is_read_is_noticed(bucket: S3, lock: Path, monkeypatch: Any) -> None:
    head = s3._Client.head

    def then_changed(client: s3._Client, path: str) -> dict[str, Any]:
        answer = head(client, path)
        if path == "tokenizer.json":  # the last one
            bucket.objects[WEIGHTS] = tiny_model(seed=1)["model.safetensors"]
        return answer

    monkeypatch.setattr(s3._Client, "head", then_changed)
    with pytest.raises(weights.WeightsError, match=r"model\.safetensors changed while it was read"):
        weights.add(SOURCE, path=lock)
    assert lock.read_bytes() == LOCK.read_bytes()


def test_an_entry_is_filled_in_and_keeps_its_licence(bucket: S3, lock: Path) -> None:
    weights.add(SOURCE, "chat", path=lock)
    text = lock.read_text(encoding="utf-8")
    unknown = re.sub(
        r"(?s)(  chat:\n.*?)    licence: unknown\n(.*?)    files:.*",
        r"\1    digests: unknown\n    licence: mit\n\2",
        text,
    )
    lock.write_text(unknown, encoding="utf-8")
    assert load(lock).unknown("chat") == "chat"
    weights.fill("chat", lock)
    assert lock.read_text(encoding="utf-8") == text.replace("licence: unknown", "licence: mit")
    assert bucket.asked


# Into the cache


def test_a_connection_that_breaks_is_taken_up_again(bucket: S3) -> None:
    model = tiny_model(elements=LARGE)
    bucket.put(PREFIX, model)
    bucket.cut = {WEIGHTS: [5_000_000, 0, 4_500_000]}
    assert contents(weights.ensure("tiny", a_lock(model))) == served(model)
    starts = bucket.starts("model.safetensors")
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert starts[-1] > 9_000_000


def test_a_run_that_gave_up_halfway_is_continued_by_the_next(bucket: S3) -> None:
    model = tiny_model(elements=LARGE)
    bucket.put(PREFIX, model)
    bucket.cut = {WEIGHTS: [5_000_000, 0, 0]}
    lock = a_lock(model)
    with pytest.raises(weights.WeightsError, match=r"(?s)model\.safetensors cannot be read.*goes on where"):
        weights.ensure("tiny", lock)
    assert not weights.place("tiny", lock).folder.exists()
    part = cache._Build("tiny", lock, print).part / "model.safetensors"
    there = part.stat().st_size
    assert 0 < there <= 5_000_000
    bucket.asked.clear()
    assert contents(weights.ensure("tiny", lock)) == served(model)
    assert bucket.starts("model.safetensors") == [there]


def test_a_damaged_beginning_is_fetched_again(bucket: S3) -> None:
    lock = a_lock(tiny_model())
    part = cache._Build("tiny", lock, print).part
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(bytes(10_000))
    assert contents(weights.ensure("tiny", lock)) == served(tiny_model())
    assert bucket.starts("model.safetensors") == [10_000, 0]


def test_other_content_than_locked_is_refused(bucket: S3) -> None:
    lock = a_lock(tiny_model())
    bucket.put(PREFIX, tiny_model(seed=1))
    with pytest.raises(weights.WeightsError, match=r"models\.tiny\.files\.model\.safetensors: has SHA-256"):
        weights.ensure("tiny", lock)
    assert not weights.place("tiny", lock).folder.exists()


def test_an_object_shorter_than_what_is_here_already(bucket: S3) -> None:
    lock = a_lock(tiny_model())
    part = cache._Build("tiny", lock, print).part
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(tiny_model()["model.safetensors"][:30_000])
    bucket.objects[WEIGHTS] = b"short"
    with pytest.raises(weights.WeightsError, match=r"model\.safetensors: has 5 bytes, expected \d+"):
        weights.ensure("tiny", lock)


# What goes wrong


def test_without_credentials_a_public_bucket_answers(bucket: S3, environment: pytest.MonkeyPatch, lock: Path) -> None:
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(
        weights.WeightsError, match=r"(?s)refused: AccessDenied.*no AWS credentials here: set AWS_PROFILE"
    ):
        weights.add(SOURCE, path=lock)
    bucket.public = True
    assert weights.add(SOURCE, path=lock)[0] == "v1"


@pytest.mark.parametrize(
    ("spoil", "source", "expected"),
    [
        ({"refuse": "AccessDenied"}, SOURCE, rf"(?s)refused: AccessDenied.*allow them s3:ListBucket .* {NAME}"),
        ({"refuse": "ExpiredToken"}, SOURCE, "(?s)refused: ExpiredToken.*renew the credentials"),
        ({}, "s3://acme-nothing/chat", "(?s)there is no bucket `acme-nothing`.*check the name"),
        ({}, f"s3://{NAME}/nothing", "there is nothing below it"),
        ({"objects": {f"{PREFIX}config.json": b"{}"}}, SOURCE, "has no safetensors files"),
        ({"objects": {WEIGHTS: tiny_model()["model.safetensors"]}}, SOURCE, r"has no readable config\.json"),
        ({"objects": {WEIGHTS: b"\xff" * 900, f"{PREFIX}config.json": b"{}"}}, SOURCE, "cannot be read: "),
        ({}, "s3://A/b", "cannot be locked"),
    ],
)
def test_what_cannot_be_locked(bucket: S3, lock: Path, spoil: dict[str, Any], source: str, expected: str) -> None:
    for name, value in spoil.items():
        setattr(bucket, name, value)
    with pytest.raises(weights.WeightsError, match=expected) as error:
        weights.add(source, path=lock)
    assert SECRET not in str(error.value)
    assert source in str(error.value)
    assert lock.read_bytes() == LOCK.read_bytes()


def test_an_object_that_is_gone(bucket: S3) -> None:
    del bucket.objects[WEIGHTS]
    with pytest.raises(weights.WeightsError, match=rf"models\.tiny\.source: s3://{NAME}/{WEIGHTS} is not there"):
        weights.ensure("tiny", a_lock(tiny_model()))


def test_an_object_that_may_be_looked_at_but_not_read(bucket: S3, lock: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(s3._Client, "listing", lambda _client: ["config.json"])
    bucket.refuse = "AccessDenied"
    with pytest.raises(weights.WeightsError, match=rf"{PREFIX}config\.json is refused: AccessDenied"):
        weights.add(SOURCE, path=lock)


def test_nobody_answers(environment: pytest.MonkeyPatch, lock: Path) -> None:
    environment.setattr("time.sleep", lambda _s: None)  # the client waits between its attempts
    with S3() as gone:
        url = gone.url
    environment.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(weights.WeightsError, match=f"(?s){url}.*AWS_ENDPOINT_URL"):
        weights.add(SOURCE, path=lock)


def test_a_profile_that_does_not_exist(environment: pytest.MonkeyPatch, lock: Path) -> None:
    environment.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(weights.WeightsError, match=r"profile \(nobody\) could not be found"):
        weights.add(SOURCE, path=lock)


def test_boto3_is_asked_for_only_where_it_is_needed(environment: pytest.MonkeyPatch, lock: Path) -> None:
    environment.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(weights.WeightsError, match=r"(?s)needs boto3, which is not installed.*uv pip install"):
        weights.add(SOURCE, path=lock)
