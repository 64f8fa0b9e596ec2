"""Weights are compared with their digests before every start of an engine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fleet_agent import verified
from fleet_agent.start import REFUSED, check_weights, expected_files

from infra.paths import NODECONFIG

CONTENT = b"weights"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(CONTENT)
    return weights


def files() -> dict[str, dict[str, Any]]:
    return {"model.safetensors": {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}}


def start(tmp_path: Path, folder: Path, **weights: Any) -> subprocess.CompletedProcess[str]:
    """Start an engine that only says that it is there."""
    settings = {
        "name": "chat-1",
        "command": [
            sys.executable,
            "-c",
            "import os; print('started', os.environ['TMPDIR'], 'PYTHONPATH' in os.environ)",
        ],
        "weights": {"folder": str(folder), "files": files(), "record": None, **weights},
    }
    (tmp_path / "engine.json").write_text(json.dumps(settings))
    return subprocess.run(
        [sys.executable, "-m", "fleet_agent", "start", "engine.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(NODECONFIG / "agent"), "TMPDIR": "elsewhere"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_weights_that_are_right_start(tmp_path: Path, folder: Path) -> None:
    done = start(tmp_path, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("started ")
    assert done.stdout.rstrip().endswith("False"), "the agent's own path is not passed on"


def test_weights_that_are_not_refuse_and_say_which_file(tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    done = start(tmp_path, folder)
    assert done.returncode == REFUSED
    assert "model.safetensors: SHA-256" in done.stderr
    assert "pulumi up" in done.stderr


def test_each_kind_of_mismatch_has_its_words(folder: Path) -> None:
    assert check_weights(folder, files()) == []
    wanted = {**files(), "config.json": {"size": 1, "sha256": "0" * 64}}
    assert check_weights(folder, wanted) == ["config.json: No such file or directory"]
    (folder / "model.safetensors").write_bytes(CONTENT + b"!")
    assert check_weights(folder, files()) == ["model.safetensors: 8 bytes, must be 7"]


def test_what_was_verified_as_it_came_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a file was read")

    verified.write(folder, files())
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", refuse)
        assert check_weights(folder, files()) == []
    wanted = {"model.safetensors": {"size": len(CONTENT), "sha256": "0" * 64}}
    assert "must be 000" in check_weights(folder, wanted)[0], "the record is not what the lock says"
    (folder / "model.safetensors").write_bytes(CONTENT[::-1])
    assert "SHA-256" in check_weights(folder, files())[0], "it was written to since"


def test_digests_of_an_entry_that_was_made_here_come_from_its_record(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(files()))
    assert expected_files({"files": None, "record": str(record)}) == files()
    assert expected_files({"files": files(), "record": None}) == files()
