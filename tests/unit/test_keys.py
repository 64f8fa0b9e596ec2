"""`fleet keys`: the key is shown once, the stack file gets its hash and stays as it was otherwise."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra import cli
from infra.keys import NOT_MADE, for_plan
from infra.paths import ROOT
from infra.stack_file import load_stack_file

BEFORE = """\
# The stack of team A.
config:
  vllm-fleet:target: "local"   # quoted
  aws:region: eu-west-1

  vllm-fleet:models:
    chat:        # what clients put in "model"
      weights: small
      # context: 4096
"""
KEY = re.compile(r"sk-fleet-[A-Za-z0-9_-]{43}")


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEET_STACKS", str(tmp_path / "stacks"))
    monkeypatch.setenv("FLEET_DIR", str(tmp_path / "fleet"))
    monkeypatch.setenv("PULUMI_STACK", "test")
    file = tmp_path / "stacks" / "Pulumi.test.yaml"
    file.parent.mkdir()
    file.write_text(BEFORE)
    file.chmod(0o640)
    return file


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `fleet keys`."""
    result = CliRunner().invoke(cli.app, ["keys", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_add_shows_the_key_once_and_keeps_its_hash(stack: Path) -> None:
    code, output, error = run("add", "alice")
    assert code == 0
    key = output.strip()
    assert KEY.fullmatch(key)
    assert key not in error
    assert "`pulumi up -s test`" in error
    assert "the key that the stack made for itself stops working" in error
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert load_stack_file(stack).api_keys == {"alice": digest}
    assert all(key not in file.read_text() for file in stack.parent.rglob("*"))
    assert all(key not in file.read_text() for file in (stack.parent.parent / "fleet").rglob("*"))


def test_the_rest_of_the_file_stays_as_it_was(stack: Path) -> None:
    run("add", "alice")
    text = stack.read_text()
    added = [line for line in text.splitlines() if line not in BEFORE.splitlines()]
    assert added[0] == "  vllm-fleet:api-keys:"
    assert re.fullmatch(r" +alice: sha256:[0-9a-f]{64}", added[1])
    assert len(added) == 2
    assert [line for line in text.splitlines() if line in BEFORE.splitlines()] == BEFORE.splitlines()
    assert stack.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in stack.parent.iterdir()] == [stack.name]
    run("revoke", "alice")
    assert stack.read_text() == BEFORE


def test_a_second_key(stack: Path) -> None:
    first = run("add", "alice")[1]
    code, second, error = run("add", "bob")
    assert code == 0
    assert second != first
    assert "made for itself" not in error, "that was said with the first one"
    assert list(load_stack_file(stack).api_keys) == ["alice", "bob"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alice", "`fleet keys revoke alice` first"),
        ("Alice!", "cannot be a name"),
        ("default", "the stack's own key"),
        ("x" * 41, "cannot be a name"),
    ],
)
def test_names_that_are_refused(stack: Path, name: str, words: str) -> None:
    run("add", "alice")
    before = stack.read_bytes()
    code, output, error = run("add", name)
    assert code == 1
    assert output == ""
    assert words in error
    assert stack.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["config: [", "", "config:\n  vllm-fleet:api-keys: text\n  vllm-fleet:target: local\n"]
)
def test_a_file_that_is_wrong_is_left_alone(stack: Path, text: str) -> None:
    stack.write_text(text)
    code, output, error = run("add", "alice")
    assert code == 1
    assert output == ""
    assert error
    assert stack.read_text() == text


def test_no_stack_file(stack: Path) -> None:
    code, _, error = run("add", "alice", "-s", "other")
    assert (code, error) == (
        1,
        "Pulumi.other.yaml: there is no such stack file\n    stacks that have one: test\n",
    )
    assert not stack.with_name("Pulumi.other.yaml").exists()


def test_list(stack: Path) -> None:
    code, output, error = run("list")
    assert (code, output) == (0, "")
    assert str(stack.parent.parent / "fleet/test/keys/default.key") in error
    assert "after `pulumi up`" in error
    key = run("add", "alice")[1].strip()
    assert run("list") == (0, f"alice  {hashlib.sha256(key.encode()).hexdigest()[:8]}\n", "")


def test_list_tells_of_a_key_that_is_wrong(stack: Path) -> None:
    run("add", "alice")
    stack.write_text(stack.read_text().replace("alice:", "bob: sk-fleet-in-plain-text\n    alice:"))
    code, output, error = run("list")
    assert code == 1
    assert output.startswith("alice  ")
    assert "api-keys.bob" in error
    assert "in-plain-text" not in error


def test_revoke(stack: Path) -> None:
    run("add", "alice")
    code, _, error = run("revoke", "alcie")
    assert (code, error) == (1, "api-keys.alcie: is not there\n    did you mean `alice`?\n")
    code, _, error = run("revoke", "alice")
    assert code == 0
    assert "works until `pulumi up -s test`" in error
    assert "own key works again" in error
    assert load_stack_file(stack).api_keys == {}


def test_edits_at_once_lose_nothing(stack: Path) -> None:
    names = [f"user-{number}" for number in range(4)]
    adds = [
        subprocess.Popen([sys.executable, "-m", "infra.cli", "keys", "add", name], cwd=ROOT, stdout=subprocess.PIPE)
        for name in names
    ]
    for add in adds:
        with add:
            assert add.wait(60) == 0
    assert set(load_stack_file(stack).api_keys) == set(names)


def test_planning_makes_no_key(stack: Path) -> None:
    config = load_stack_file(stack)
    assert for_plan("test", config) == {"default": NOT_MADE}
    file = stack.parent.parent / "fleet/test/keys/default.key"
    assert not file.exists()
    file.parent.mkdir(parents=True)
    file.write_text("sk-fleet-x\n")
    assert for_plan("test", config) == {"default": hashlib.sha256(b"sk-fleet-x").hexdigest()}
    run("add", "alice")
    assert set(for_plan("test", load_stack_file(stack))) == {"alice"}
