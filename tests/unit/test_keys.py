"""`fleet keys`: the key is shown once, the stack file gets its hash and stays as it was otherwise."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra import cli
from infra import keys as api_keys
from infra.config import ENCRYPTED, from_pulumi, parse, with_limits
from infra.keys import NOT_MADE, for_plan
from infra.paths import ROOT
from infra.plan import make_plan
from infra.plan.model import KeyPlan
from infra.stack_file import load_stack_file
from tests.unit.inputs import a_host, a_lock

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
    assert load_stack_file(stack).api_keys == with_limits({"alice": digest})
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


# Limits.

HASH = f"sha256:{'ab' * 32}"


def test_limits_stand_beside_the_hash(stack: Path) -> None:
    code, output, _ = run(
        "add", "alice", "--models", "chat", "--rpm", "60", "--concurrency", "4", "--expires", "2999-12-31"
    )
    assert code == 0
    digest = hashlib.sha256(output.strip().encode()).hexdigest()
    config = load_stack_file(stack)
    assert config.findings == ()
    assert config.api_keys["alice"].model_dump() == {
        "hash": digest,
        "models": ["chat"],
        "rpm": 60,
        "concurrency": 4,
        "expires": "2999-12-31",
    }
    text = stack.read_text()
    assert "models: [chat]\n" in text
    assert output.strip() not in text
    assert run("list") == (
        0,
        f"alice  {digest[:8]}  models chat; 60 requests a minute; 4 at once; until 2999-12-31\n",
        "",
    )
    run("add", "bob", "--rpm", "5")
    assert run("list")[1].splitlines()[1].endswith("  5 requests a minute")
    for name in ("alice", "bob"):
        run("revoke", name)
    assert stack.read_text() == BEFORE


@pytest.mark.usefixtures("stack")
def test_the_list_says_what_has_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "today", lambda: dt.date(2026, 12, 31))
    assert run("add", "alice", "--expires", "2026-12-31")[0] == 0
    assert run("list")[1].endswith("until 2026-12-31\n")
    monkeypatch.setattr(api_keys, "today", lambda: dt.date(2027, 1, 1))
    assert run("list")[1].endswith("expired after 2026-12-31\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--models", "caht"], "--models: there is no model `caht`\n    did you mean `chat`?\n"),
        (["--models", "chat,nothing"], "--models: there is no model `nothing`\n    one of: chat\n"),
        (["--models", ","], "--models: is empty"),
        (["--expires", "tomorrow"], "--expires: `tomorrow` is no day"),
        (["--expires", "2027-02-30"], "YYYY-MM-DD"),
        (["--expires", "2020-01-01"], "--expires: 2020-01-01 is over"),
    ],
)
def test_limits_that_are_refused(stack: Path, options: list[str], words: str) -> None:
    code, output, error = run("add", "alice", *options)
    assert (code, output) == (1, "")
    assert words in error
    assert stack.read_text() == BEFORE


@pytest.mark.parametrize("options", [["--rpm", "0"], ["--rpm", "x"], ["--concurrency", "-1"]])
def test_numbers_that_are_none(stack: Path, options: list[str]) -> None:
    assert run("add", "alice", *options)[:2] == (2, "")
    assert stack.read_text() == BEFORE


def config_of(**keys: object) -> dict[str, object]:
    return {"target": "local", "models": {"chat": {"weights": "small"}}, "api-keys": keys}


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ({"hash": HASH, "rpm": 0}, "api-keys.alice.rpm: is too small\n    at least 1"),
        ({"hash": HASH, "rpm": "60"}, "api-keys.alice.rpm: must be a whole number, not `60`\n    write 60"),
        ({"hash": HASH, "concurrency": True}, "api-keys.alice.concurrency: must be a whole number"),
        ({"hash": HASH, "models": "chat"}, "api-keys.alice.models: must be a list, not text\n    in brackets: `[chat"),
        ({"hash": HASH, "models": []}, "api-keys.alice.models: is empty"),
        ({"hash": HASH, "models": ["caht"]}, "alice.models.0: there is no model `caht`\n    did you mean `chat`?"),
        ({"hash": HASH, "expires": "31.12.2027"}, "api-keys.alice.expires: `31.12.2027` is no day"),
        ({"hash": HASH, "expires": 20271231}, "api-keys.alice.expires: 20271231 is no day"),
        ({"hash": HASH, "expires": "2027-12-31T12:00:00Z"}, "is no day"),
        ({"hash": HASH, "limit": 5}, "api-keys.alice.limit: unknown key"),
        ({"rpm": 5}, "api-keys.alice.hash: is missing"),
        ({"hash": "sk-fleet-Plain-text-key", "rpm": 5}, "api-keys.alice.hash: holds an API key in plain text"),
        ({"hash": "plain-text-key", "rpm": 5}, "api-keys.alice.hash: is not the hash of an API key"),
        ({}, "api-keys.alice.hash: is missing"),
        (5, "api-keys.alice: is not the hash of an API key"),
    ],
)  # fmt: skip
def test_config_that_is_refused(key: object, problem: str) -> None:
    findings = [str(finding) for finding in parse(config_of(alice=key)).findings]
    assert len(findings) == 1
    assert problem in findings[0]
    assert "-text-key" not in findings[0]


def test_the_name_of_the_stacks_own_key_is_refused() -> None:
    (finding,) = parse(config_of(default=HASH)).findings
    assert (finding.path, finding.problem) == ("api-keys.default", "is the name of the stack's own key")


def test_one_key_with_and_without_limits_is_one_key_too_often() -> None:
    (finding,) = parse(config_of(alice=HASH, bob={"hash": HASH, "rpm": 5})).findings
    assert "is the key of `alice`" in finding.problem


@pytest.mark.parametrize("day", [dt.date(2027, 12, 31), "2027-12-31", "2027-12-31 00:00:00 +0000 UTC"])
def test_a_day_however_yaml_and_pulumi_write_it(day: object) -> None:
    config = parse(config_of(alice={"hash": HASH, "expires": day}))
    assert config.findings == ()
    assert config.api_keys["alice"].expires == "2027-12-31"


def test_hashes_may_be_encrypted_beside_limits_too() -> None:
    config = parse(config_of(alice={"secure": "v1:xyz"}, bob={"hash": {"secure": "v1:abc"}, "rpm": 5}))
    assert config.findings == ()
    assert {name: key.hash for name, key in config.api_keys.items()} == {"alice": ENCRYPTED, "bob": ENCRYPTED}
    text = json.dumps({"alice": HASH, "bob": {"hash": HASH.replace("ab", "cd"), "rpm": 5}})
    known = from_pulumi({"vllm-fleet:target": "local", "vllm-fleet:api-keys": text} | MODELS)
    assert known.findings == ()
    assert {name: key.hash for name, key in known.api_keys.items()} == {"alice": "ab" * 32, "bob": "cd" * 32}


def test_nothing_else_of_a_key_may_be_encrypted() -> None:
    (finding,) = parse(config_of(alice={"hash": HASH, "rpm": {"secure": "v1:xyz"}})).findings
    assert (finding.path, finding.problem) == ("api-keys.alice.rpm", "is encrypted")


MODELS = {"vllm-fleet:models": '{"chat": {"weights": "small"}}'}


def test_the_plan_has_the_limits() -> None:
    config = parse(
        {
            "target": "local",
            "models": {"chat": {"weights": "small"}, "embed": {"weights": "small"}},
            "api-keys": {
                "all": {"hash": HASH, "models": ["embed", "chat"]},
                "some": {"hash": HASH.replace("ab", "cd"), "models": ["embed", "embed"], "rpm": 5},
            },
        }
    )
    gateway = make_plan("local", config, a_lock(), a_host(), config.api_keys).gateway
    assert gateway.keys == (("all", "ab" * 32), ("some", "cd" * 32))
    assert gateway.key_limits == (
        KeyPlan(name="all", sha256="ab" * 32),
        KeyPlan(name="some", sha256="cd" * 32, models=("embed",), rpm=5),
    )


def test_without_limits_the_plan_has_none() -> None:
    config = parse(config_of(alice=HASH, bob={"hash": HASH.replace("ab", "cd"), "models": ["chat"]}))
    gateway = make_plan("local", config, a_lock(), a_host(), config.api_keys).gateway
    assert [name for name, _ in gateway.keys] == ["alice", "bob"]
    assert gateway.key_limits == (), "a key for all models that there are has no limit"
