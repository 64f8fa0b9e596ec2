"""toolchain/bootstrap, env, run and down: the scripts that work before there is a virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.paths import ROOT

# Stands in for uv: notes each call, makes what the script looks for, and fails at the step named in FAIL_AT.
FAKE_UV = """#!/bin/sh
case $1 in --version) echo "uv 99.0.0 (fake)"; exit 0 ;; esac
echo "$1 $2 $3" >>"$UV_CALLS"
case $1 in venv)
    if [ -n "${HOLD:-}" ]; then read -r _ <"$HOLD"; fi
    for last; do :; done
    mkdir -p "$last/bin" && ln -sf "$(command -v python3)" "$last/bin/python" ;;
esac
[ "$1 $2" != "${FAIL_AT:-}" ]
"""


class Checkout:
    """A copy of the scripts, with an environment in which only they and the fake uv can be found."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.calls = folder / "calls"
        (self.root / "requirements").mkdir(parents=True)
        shutil.copytree(ROOT / "toolchain", self.root / "toolchain", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", *(f"requirements/{kind}.txt" for kind in ("fleet", "aws", "dev"))):
            (self.root / name).write_text(f"# {name}\n", encoding="utf-8")
        path = folder / "path"
        path.mkdir()
        (path / "uv").write_text(FAKE_UV, encoding="utf-8")
        (path / "uv").chmod(0o755)
        (path / "python3").symlink_to(sys.executable)
        self.env = {"PATH": f"{path}:/usr/bin:/bin", "UV_CALLS": str(self.calls), "HOME": str(folder / "home")}

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, **env: str) -> tuple[int, str]:
        process = self.start(*command, **env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def uv_calls(self) -> list[str]:
        """The fake's calls since the last question."""
        calls = self.calls.read_text(encoding="utf-8").splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return calls


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


MADE = ["venv --quiet --clear", "pip sync --python", "pip install --quiet"]


def test_bootstrap_works_once_and_then_knows_that_nothing_changed(checkout: Checkout) -> None:
    assert checkout.run("toolchain/bootstrap")[0] == 0
    assert checkout.uv_calls() == MADE
    code, output = checkout.run("toolchain/bootstrap", PATH="/usr/bin:/bin")
    assert (code, output, checkout.uv_calls()) == (0, "", [])


def test_bootstrap_syncs_in_place_when_a_lock_file_changed(checkout: Checkout) -> None:
    checkout.run("toolchain/bootstrap")
    checkout.uv_calls()
    (checkout.root / "requirements" / "fleet.txt").write_text("# changed\n", encoding="utf-8")
    assert checkout.run("toolchain/bootstrap")[0] == 0
    assert checkout.uv_calls() == MADE[1:]


def test_dev_serves_for_fleet_but_not_the_other_way_round(checkout: Checkout) -> None:
    checkout.run("toolchain/bootstrap")
    checkout.uv_calls()
    checkout.run("toolchain/bootstrap", "--dev")
    assert checkout.uv_calls() == MADE[1:]
    checkout.run("toolchain/bootstrap")
    checkout.run("toolchain/bootstrap", "--dev")
    assert checkout.uv_calls() == []


def test_a_stack_on_aws_gets_its_sdk_and_other_stacks_do_without(checkout: Checkout) -> None:
    (checkout.root / "stacks").mkdir()
    for stack, target in (("local", "local"), ("prod", "aws")):
        text = f"config:\n  # vllm-fleet:target: aws\n  vllm-fleet:target: {target} # as planned\n"
        (checkout.root / f"stacks/Pulumi.{stack}.yaml").write_text(text, encoding="utf-8")

    assert "requirements/fleet.txt" in checkout.run("toolchain/bootstrap", "--stack", "local")[1]
    assert "requirements/aws.txt" in checkout.run("toolchain/bootstrap", "--stack", "prod")[1]
    checkout.uv_calls()
    for stack in ("local", "prod", "not-there"):
        assert checkout.run("toolchain/bootstrap", "--stack", stack) == (0, "")
    assert checkout.uv_calls() == []


@pytest.mark.parametrize("step", ["pip sync", "pip install"])
def test_bootstrap_heals_what_an_interrupted_run_left(checkout: Checkout, step: str) -> None:
    assert checkout.run("toolchain/bootstrap", FAIL_AT=step)[0] != 0
    checkout.uv_calls()
    assert checkout.run("toolchain/bootstrap")[0] == 0
    assert checkout.uv_calls() == MADE, "a half-made environment is made anew, not patched"


def test_bootstrap_makes_anew_what_was_moved_or_lost_its_python(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run("toolchain/bootstrap")
    checkout.uv_calls()
    (checkout.root / ".venv" / "bin" / "python").unlink()
    checkout.run("toolchain/bootstrap")
    assert checkout.uv_calls() == MADE
    # Scripts in a virtual environment hold its path.
    checkout.root = checkout.root.rename(tmp_path / "moved")
    checkout.run("toolchain/bootstrap")
    assert checkout.uv_calls() == MADE


def test_of_two_bootstraps_at_once_one_works_and_one_waits(checkout: Checkout, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    os.mkfifo(hold)
    first = checkout.start("toolchain/bootstrap", HOLD=str(hold))
    with hold.open("w") as release:  # opens when the first is inside `uv venv`
        second = checkout.start("toolchain/bootstrap")
        assert second.stdout
        assert "waiting" in second.stdout.readline()
        release.write("go\n")
    assert first.wait(timeout=60) == 0
    assert second.wait(timeout=60) == 0
    for process in (first, second):
        process.communicate()
    assert checkout.uv_calls() == MADE


def test_bootstrap_says_what_to_do_without_a_python(checkout: Checkout, tmp_path: Path) -> None:
    """A version manager's python3 that only prints an error counts as none."""
    shim = tmp_path / "path" / "python3"
    shim.unlink()
    shim.write_text("#!/bin/sh\necho 'pyenv: python3: command not found'\nexit 127\n", encoding="utf-8")
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        (tmp_path / "path" / name).write_text(shim.read_text(encoding="utf-8"), encoding="utf-8")
        (tmp_path / "path" / name).chmod(0o755)
    code, output = checkout.run("toolchain/bootstrap")
    assert code == 1
    assert "needs Python 3.11 to 3.14 on PATH" in output
    assert "apt-get install python3" in output
    assert not (checkout.root / ".venv").exists()


def test_bootstrap_tries_every_way_to_uv_and_says_each(checkout: Checkout, tmp_path: Path) -> None:
    """On a bare machine: a Python without venv and pip, an apt-get and a curl that fail."""
    path = tmp_path / "bare"
    path.mkdir()
    for name in ("sh", "env", "sed", "cat", "cksum", "mkdir", "rm", "mv", "grep", "tail", "id", "dirname"):
        (path / name).symlink_to(shutil.which(name) or name)
    fails = {
        "python3": f'case $2 in venv | pip) echo "No module named $2" >&2; exit 1 ;; esac\nexec {sys.executable} "$@"',
        "apt-get": "echo 'apt: no such package'; exit 100",
        "curl": "echo 'curl: (6) Could not resolve host' >&2; exit 6",
    }
    for name, script in fails.items():
        (path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (path / name).chmod(0o755)
    # The script asks its Python for the interpreter under it: answer with the one that cannot.
    helper = f"case $1 in -c) case $2 in *_base_executable*) echo {path}/python3; exit 0 ;; esac ;; esac\n"
    python = (path / "python3").read_text(encoding="utf-8").replace("#!/bin/sh\n", f"#!/bin/sh\n{helper}")
    (path / "python3").write_text(python, encoding="utf-8")
    code, output = checkout.run("toolchain/bootstrap", PATH=str(path))
    assert code == 1
    ways = ["python3 -m venv", "pip install --target", "apt-get install python3-venv", "the installer at astral.sh"]
    assert [output.index(f"trying {way}") for way in ways] == sorted(output.index(f"trying {way}") for way in ways)
    assert "No module named venv" in output
    assert "Could not resolve host" in output
    assert "Install it by hand" in output
    assert [entry.name for entry in (checkout.root / ".fleet" / "toolchain").iterdir()] == ["bin"]


def test_bootstrap_refuses_options_it_does_not_know(checkout: Checkout) -> None:
    code, output = checkout.run("toolchain/bootstrap", "--prod")
    assert code == 1
    assert "usage: toolchain/bootstrap [--dev | --stack NAME]" in output


SHELLS = [shell for shell in ("sh", "dash", "bash", "zsh") if shutil.which(shell)]
PRINT = 'printf \'%s\\n\' "$PATH" "$PULUMI_BACKEND_URL" "$PULUMI_CONFIG_PASSPHRASE_FILE" "$PULUMI_HOME"'


@pytest.mark.parametrize("shell", SHELLS)
def test_env_can_be_sourced_twice_by_any_shell(checkout: Checkout, shell: str) -> None:
    code, output = checkout.run(shell, "-c", f". toolchain/env && . toolchain/env && {PRINT}")
    assert code == 0, output
    path, backend, passphrase, home = output.splitlines()
    root = checkout.root
    folders = path.split(":")
    assert folders[:2] == [f"{root}/.venv/bin", f"{root}/.fleet/toolchain/override"]
    assert folders[-1] == f"{root}/.fleet/toolchain/bin"
    assert folders.count(f"{root}/.venv/bin") == 1
    assert backend == f"file://{root}/.fleet/state"
    assert (root / ".fleet" / "state").is_dir()
    assert home == f"{root}/.fleet/pulumi-home"
    secret = Path(passphrase)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_text(encoding="ascii")) == 48
    assert [entry.name for entry in (root / ".fleet").iterdir() if entry.name.startswith("passphrase")] == [
        "passphrase"
    ]


def test_env_makes_the_passphrase_once(checkout: Checkout) -> None:
    read = 'cat "$PULUMI_CONFIG_PASSPHRASE_FILE"'
    first = checkout.run("toolchain/run", "sh", "-c", read)
    assert first[0] == 0
    assert first == checkout.run("toolchain/run", "sh", "-c", read)


def test_env_keeps_what_the_user_has_set(checkout: Checkout, tmp_path: Path) -> None:
    own = {
        "FLEET_DIR": str(tmp_path / "own"),
        "PULUMI_BACKEND_URL": "s3://bucket",
        "PULUMI_CONFIG_PASSPHRASE": "",
        "PULUMI_HOME": "/somewhere",
        "PULUMI_PYTHON_CMD": "/usr/bin/python3",
        "UV_CACHE_DIR": "/cache",
    }
    _, output = checkout.run("toolchain/run", "env", **own)
    lines = output.splitlines()
    assert {f"{name}={value}" for name, value in own.items()} <= set(lines)
    assert "PULUMI_CONFIG_PASSPHRASE_FILE" not in output
    assert not (tmp_path / "own").exists()
    assert not (checkout.root / ".fleet").exists()


def test_env_makes_relative_folders_absolute(checkout: Checkout) -> None:
    """The shell that sourced it will stand elsewhere later."""
    _, output = checkout.run("sh", "-c", f". toolchain/env && {PRINT}", FLEET_DIR="mine", FLEET_SHARED="ours")
    path, backend, *_ = output.splitlines()
    assert path.endswith(f":{checkout.root}/ours/toolchain/bin")
    assert backend == f"file://{checkout.root}/mine/state"


def test_env_lets_compiled_python_files_be_written(checkout: Checkout) -> None:
    _, output = checkout.run("toolchain/run", "env", PYTHONDONTWRITEBYTECODE="1")
    assert "PYTHONDONTWRITEBYTECODE=\n" in output


def test_plugins_are_fetched_only_when_a_providers_package_is_installed(checkout: Checkout) -> None:
    name = "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION"
    assert f"{name}=true" in checkout.run("toolchain/run", "env")[1]
    plugin = checkout.root / ".venv" / "lib" / "python3.11" / "site-packages" / "pulumi_aws" / "pulumi-plugin.json"
    plugin.parent.mkdir(parents=True)
    plugin.touch()
    assert name not in checkout.run("toolchain/run", "env")[1]


def test_down_has_nothing_to_do_in_a_fresh_checkout(checkout: Checkout) -> None:
    code, output = checkout.run("toolchain/down", "local")
    assert code == 0
    assert "is not up" in output
    assert checkout.uv_calls() == []
    assert not (checkout.root / ".fleet").exists()
