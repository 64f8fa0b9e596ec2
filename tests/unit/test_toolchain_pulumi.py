"""Our language host and the healing of locks, with the real Pulumi CLI."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.paths import ROOT, toolchain_dir
from toolchain.heal import heal

PROGRAM = """
import os
import pulumi
import files

config = pulumi.Config()
if config.get("fail"):
    raise ValueError("the program is broken")
secret = config.get_secret("secret")
files.File("file", path=config.require("path"), text=config.require("text"))
if secret is not None:
    pulumi.export("length", secret.apply(len))
with open("argv.txt", "w") as out:
    out.write(open("/proc/self/cmdline").read().replace("\\0", " ") if os.path.exists("/proc/self/cmdline") else "")
"""
PROVIDER = """
import pathlib
from pulumi.dynamic import CreateResult, DiffResult, ReadResult, Resource, ResourceProvider, UpdateResult


class Files(ResourceProvider):
    def create(self, props):
        hold = pathlib.Path(props["path"] + ".hold")
        if hold.exists():
            hold.write_text("creating")
            hold.read_text()
        pathlib.Path(props["path"]).write_text(props["text"])
        return CreateResult(props["path"], props)

    def diff(self, name, old, new):
        return DiffResult(changes=old["text"] != new["text"])

    def update(self, name, old, new):
        pathlib.Path(name).write_text(new["text"])
        return UpdateResult(new)

    def read(self, name, props):
        return ReadResult(name, {**props, "text": pathlib.Path(name).read_text()})

    def delete(self, name, props):
        pathlib.Path(name).unlink()


class File(Resource):
    def __init__(self, name, path, text):
        super().__init__(Files(), name, {"path": path, "text": text})
"""


class Project:
    """A small program with a dynamic provider, and a stack of it in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "made.txt"
        (folder / "__main__.py").write_text(PROGRAM, encoding="utf-8")
        (folder / "files.py").write_text(PROVIDER, encoding="utf-8")
        self.virtualenv(Path(sys.prefix))
        # FLEET_SHARED stays: that is where the CLI is. Everything that is written goes into this folder.
        self.env = os.environ | {
            "FLEET_SHARED": str(toolchain_dir().parent),
            "FLEET_DIR": str(folder / "fleet"),
            "PULUMI_PYTHON_CMD": sys.executable,
        }
        for name in ("PULUMI_BACKEND_URL", "PULUMI_HOME", "PULUMI_CONFIG_PASSPHRASE", "PULUMI_CONFIG_PASSPHRASE_FILE"):
            self.env.pop(name, None)
        self.pulumi("stack", "select", "--create", "test")
        self.config("path", str(self.file))
        self.config("text", "one")

    def virtualenv(self, path: Path) -> None:
        runtime = {"name": "python", "options": {"virtualenv": str(path)}}
        (self.folder / "Pulumi.yaml").write_text(json.dumps({"name": "small", "runtime": runtime}), encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [ROOT / "toolchain" / "run", "pulumi", "--non-interactive", *arguments],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pulumi(self, *arguments: str, fails: bool = False) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=300)
        assert (process.returncode != 0) is fails, output
        return output

    def config(self, key: str, value: str, *flags: str) -> None:
        self.pulumi("config", "set", key, value, *flags)

    @property
    def backend(self) -> str:
        return f"file://{self.folder}/fleet/state"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    path = os.pathsep.join([os.environ["PATH"], str(toolchain_dir() / "override"), str(toolchain_dir() / "bin")])
    if not shutil.which("pulumi", path=path):
        pytest.skip("pulumi is neither on PATH nor in the toolchain: run `make setup`")
    return Project(tmp_path)


def test_a_program_is_previewed_deployed_refreshed_and_destroyed(project: Project) -> None:
    assert "+ 2 to create" in project.pulumi("preview")
    assert not project.file.exists()
    project.pulumi("up", "--yes", "--skip-preview")
    assert project.file.read_text(encoding="utf-8") == "one"
    project.pulumi("up", "--yes", "--skip-preview", "--expect-no-changes")
    project.config("text", "two")
    assert "1 updated" in project.pulumi("up", "--yes", "--skip-preview")
    assert project.file.read_text(encoding="utf-8") == "two"
    project.file.write_text("by hand", encoding="utf-8")
    project.pulumi("refresh", "--yes", "--skip-preview")
    project.pulumi("up", "--yes", "--skip-preview")
    assert project.file.read_text(encoding="utf-8") == "two"
    project.pulumi("destroy", "--yes", "--skip-preview")
    assert not project.file.exists()


def test_no_plugin_is_taken_from_an_unexpected_place(project: Project) -> None:
    assert "warning" not in project.pulumi("preview")


def test_secrets_reach_the_program_and_are_not_in_its_arguments(project: Project) -> None:
    project.config("secret", "hunter2", "--secret")
    assert "hunter2" not in project.pulumi("preview")
    assert "hunter2" not in (project.folder / "argv.txt").read_text(encoding="utf-8")
    project.pulumi("up", "--yes", "--skip-preview")
    assert project.pulumi("stack", "output", "length", "--show-secrets").strip() == "7"


def test_a_program_that_fails_is_reported_once(project: Project) -> None:
    project.config("fail", "yes")
    output = project.pulumi("preview", fails=True)
    assert output.count("ValueError: the program is broken") == 1
    assert "exit code 32" not in output


@pytest.mark.parametrize("state", ["does not exist", "is broken"])
def test_an_unusable_virtual_environment_is_named_with_what_to_do(project: Project, state: str) -> None:
    venv = project.folder / "venv"
    if state == "is broken":
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to("/nonexistent/python")
    project.virtualenv(venv)
    output = project.pulumi("preview", fails=True)
    assert f"{venv} (option `virtualenv` in Pulumi.yaml) {state}" in " ".join(output.split())
    assert "toolchain/bootstrap" in output


def test_about_lists_the_interpreter_and_its_packages(project: Project) -> None:
    about = json.loads(project.pulumi("about", "--json", "--transitive"))
    assert about["runtime"]["executable"] == sys.executable
    assert {"name": "pulumi", "version": about_version()} in [
        {"name": d["name"], "version": d["version"]} for d in about["dependencies"]
    ]


def about_version() -> str:
    from importlib.metadata import version  # noqa: PLC0415

    return version("pulumi")


def test_a_killed_pulumi_leaves_a_lock_and_plugins_that_are_healed(project: Project) -> None:
    hold = Path(f"{project.file}.hold")
    os.mkfifo(hold)
    running = project.start("up", "--yes", "--skip-preview")
    assert hold.read_text(encoding="utf-8") == "creating"  # the provider is at work, and waits
    [lock] = (project.folder / "fleet" / "state" / ".pulumi" / "locks").rglob("*.json")
    pulumi = psutil.Process(json.loads(lock.read_text(encoding="utf-8"))["pid"])
    plugins = pulumi.children(recursive=True)
    assert plugins
    [sentence] = heal(project.backend, "test", project.folder / "Pulumi.test.yaml")
    assert "is being changed" in sentence
    assert lock.exists(), "a live process keeps its lock"
    assert all(plugin.is_running() for plugin in plugins), "and its plugins"

    pulumi.kill()
    running.wait(timeout=60)
    assert "locked" in project.pulumi("up", "--yes", "--skip-preview", fails=True)

    first, second = heal(project.backend, "test", project.folder / "Pulumi.test.yaml")
    assert "plugin processes" in first
    assert f"process {pulumi.pid}, which died" in second
    running.communicate(timeout=60)  # ends when no process of that run holds its output any more
    hold.unlink()
    project.pulumi("up", "--yes", "--skip-preview")
    assert project.file.read_text(encoding="utf-8") == "one"
    project.pulumi("destroy", "--yes", "--skip-preview")


NO_FILE = Path("/nonexistent/Pulumi.test.yaml")


def without_salt(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("encryptionsalt:"))


def test_a_stack_can_be_made_again_after_its_state_and_passphrase_are_gone(project: Project) -> None:
    config = project.folder / "Pulumi.test.yaml"
    project.pulumi("up", "--yes", "--skip-preview")
    before = config.read_text(encoding="utf-8")
    assert not list(heal(project.backend, "test", config)), "the salt of a stack that is up stays"
    fleet = project.folder / "fleet"
    aside = fleet.rename(project.folder / "aside")
    assert "incorrect passphrase" in project.pulumi("stack", "select", "--create", "test", fails=True)
    [sentence] = heal(project.backend, "test", config)
    assert "stale encryption salt" in sentence
    assert config.read_text(encoding="utf-8") == without_salt(before)
    project.pulumi("stack", "select", "--create", "test")
    # And back: the first state, with a file that now has the second one's salt.
    shutil.rmtree(fleet)
    aside.rename(fleet)
    assert "incorrect passphrase" in project.pulumi("preview", fails=True)
    assert list(heal(project.backend, "test", config))
    project.pulumi("up", "--yes", "--skip-preview", "--expect-no-changes")


def test_a_salt_that_secrets_are_encrypted_with_stays(tmp_path: Path) -> None:
    config = tmp_path / "Pulumi.test.yaml"
    text = "config:\n  small:key:\n    secure: v1:abc\nencryptionsalt: v1:def\n"
    config.write_text(text, encoding="utf-8")
    assert not list(heal(f"file://{tmp_path}", "test", config))
    assert config.read_text(encoding="utf-8") == text


def lock_file(folder: Path, text: str) -> Path:
    file = folder / ".pulumi" / "locks" / "organization" / "small" / "test" / "4711.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def lock_text(pid: int, host: str) -> str:
    return json.dumps({"pid": pid, "username": "u", "hostname": host, "timestamp": "2026-11-24T07:38:00Z"})


def test_a_dead_process_loses_its_lock(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, lock_text(dead_pid(), socket.gethostname()))
    assert "removed the lock" in "".join(heal(f"file://{tmp_path}", "test", NO_FILE))
    assert not lock.exists()


def test_a_number_that_another_program_has_now_is_no_pulumi(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, lock_text(os.getpid(), socket.gethostname()))
    assert "removed the lock" in "".join(heal(f"file://{tmp_path}", "test", NO_FILE))
    assert not lock.exists()


def test_another_hosts_lock_is_left_alone(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, lock_text(dead_pid(), "another-host"))
    assert "on another-host" in "".join(heal(f"file://{tmp_path}", "test", NO_FILE))
    assert lock.exists()


def test_a_half_written_lock_is_removed_and_other_stacks_are_not_looked_at(tmp_path: Path) -> None:
    lock = lock_file(tmp_path, '{"pid": 12')
    assert not list(heal(f"file://{tmp_path}", "production", NO_FILE))
    assert lock.exists()
    assert "not completely written" in "".join(heal(f"file://{tmp_path}", "test", NO_FILE))
    assert not lock.exists()


def test_remote_backends_are_left_alone() -> None:
    assert not list(heal("s3://bucket/state", "test", NO_FILE))
    assert not list(heal("", "test", NO_FILE))
