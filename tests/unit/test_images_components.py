"""Component documents of images, and the program that runs them here."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from infra.catalog import bakes, vllm_cpu
from infra.paths import ROOT

NAMES = sorted(file.stem for file in (ROOT / "images/components").glob("*.yaml"))
SCRIPTS = [
    (name, f"{phase['name']} {step['name']}", "\n".join(step["inputs"]["commands"]))
    for name in NAMES
    for phase in yaml.safe_load(bakes.component(name))["phases"]
    for step in phase["steps"]
    if step["action"] == "ExecuteBash"
]


@pytest.fixture
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_component", ROOT / "images/run_component.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_document_is_what_image_builder_takes(name: str) -> None:
    document = yaml.safe_load(bakes.component(name))

    assert document["schemaVersion"] == 1.0
    assert [phase["name"] for phase in document["phases"]] == ["build", "validate"]
    for phase in document["phases"]:
        steps = [step["name"] for step in phase["steps"]]
        assert len(steps) == len(set(steps))
        assert {step["action"] for step in phase["steps"]} <= {"ExecuteBash", "S3Download"}


@pytest.mark.parametrize(("name", "step", "script"), SCRIPTS)
def test_every_script_is_bash_that_stops_at_the_first_error(name: str, step: str, script: str) -> None:
    del name, step
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "\n" not in script.strip() or script.startswith("set -euo pipefail\n")


def test_every_image_is_made_of_components_that_there_are() -> None:
    assert set(bakes.images()) == {"engine", "gateway", "monitor"}
    for row in bakes.images().values():
        assert set(row.components) <= set(NAMES)
        assert row.components[0] == "fleet"  # it brings what the others install


def test_archives_are_pinned_by_digest() -> None:
    for program in bakes.programs().values():
        assert re.fullmatch("[0-9a-f]{64}", program.sha256)
        assert program.version in program.url


def test_the_engines_lock_is_of_the_version_that_the_plan_and_cpu_machines_have() -> None:
    lock = json.loads(bakes.install_files())["files"]["vllm-cuda.txt"]

    assert f"\nvllm=={vllm_cpu().version} " in f"\n{lock}"
    assert all("--hash=" in block for block in re.split(r"\n(?=\S)", lock) if block.strip())


DOCUMENT = """
name: small
schemaVersion: 1.0
parameters:
  - Word: {type: string}
phases:
  - name: build
    steps:
      - {name: get, action: S3Download, inputs: [{source: "s3://b/x/one.txt", destination: "@/deep/one.txt"}]}
      - name: tries
        action: ExecuteBash
        maxAttempts: 3
        inputs: {commands: ["echo x >>@/tries", "test $(wc -l <@/tries) = 2"]}
      - {name: says, action: ExecuteBash, inputs: {commands: ["echo '{{ Word }}' >@/word"]}}
  - name: validate
    steps:
      - {name: fails, action: ExecuteBash, inputs: {commands: ["exit 3"]}}
      - {name: never, action: ExecuteBash, inputs: {commands: ["touch @/never"]}}
"""


def test_steps_run_in_order_with_parameters_attempts_and_downloads(runner: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "objects").mkdir()
    (folder / "objects/one.txt").write_text("1")
    file = folder / "small.yaml"
    file.write_text(DOCUMENT.replace("@", str(folder)))
    objects = ["--objects", str(folder / "objects")]

    assert runner.main([str(file), "build", "--set", "Word=a b", *objects]) == 0
    assert (folder / "deep/one.txt").read_text() == "1"
    assert (folder / "tries").read_text() == "x\nx\n"
    assert (folder / "word").read_text() == "a b\n"
    assert runner.main([str(file), "validate", "--set", "Word=a"]) == 1
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "say what Word is"), (["--set", "Word=a", "--set", "Wort=b"], "no parameter is called Wort")],
)
def test_what_cannot_run_is_refused_before_any_step(
    runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    folder = tmp_path
    file = folder / "small.yaml"
    file.write_text(DOCUMENT.replace("@", str(folder)))

    assert runner.main([str(file), "build", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "tries").exists()
