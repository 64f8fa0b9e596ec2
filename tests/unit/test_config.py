"""Reading stack files: everything that is wrong, at once, in words that say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.config import ENCRYPTED, NAMESPACE, duration, from_pulumi, parse, schema, size, with_limits
from infra.config.plaintext import credential
from infra.findings import ConfigError
from infra.paths import ROOT
from infra.plan import make_plan
from infra.stack_file import add_key, load_stack_file, remove_key
from infra.weights import lock
from tests.unit.inputs import KEYS, a_host, a_lock, plan_of

BAD = Path(__file__).parent / "bad_stacks"
STACKS = ROOT / "stacks"


@pytest.mark.parametrize("file", sorted(BAD.glob("*.yaml")), ids=lambda file: file.stem)
def test_bad_stacks(file: Path, golden: Callable[[Path, str], None]) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(load_stack_file(file))
    text = f"{error.value}\n"
    assert not credential(text)
    assert [finding.path for finding in error.value.findings if not finding.fix] == []
    assert "sk-fleet-" not in text
    golden(file.with_suffix(".txt"), text)


def test_there_are_sixty_five_bad_stacks_and_no_golden_without_one() -> None:
    stacks = {file.stem for file in BAD.glob("*.yaml")}
    assert len(stacks) >= 65
    assert stacks == {file.stem for file in BAD.glob("*.txt")}


@pytest.mark.parametrize("file", sorted(STACKS.glob("Pulumi.*.yaml")), ids=lambda file: file.name)
def test_shipped_stacks_have_a_plan(file: Path) -> None:
    config = load_stack_file(file)
    make_plan("local", config, lock.load(), a_host() if config.target == "local" else None, KEYS)


def test_smallest_stack() -> None:
    config = parse({"target": "local", "models": {"small": {}}})
    assert config.findings == ()
    assert make_plan("local", config, a_lock(), a_host(), KEYS).models[0].weights == "small"


def test_pulumi_and_the_file_give_the_same_config(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "target": "local",
        "models": {"chat": {"weights": "small", "context": 1024}},
        "api-keys": {"team-a": f"sha256:{'a' * 64}"},
        "slo": {"ttft_p95": "500ms"},
        "gateway": {"max-body": "2MiB"},
        "local": {"base-port": 20000, "ports": {"gateway": 20500}},
    }
    file = tmp_path / "Pulumi.dev.yaml"
    whole = {"config": {f"{NAMESPACE}:{key}": value for key, value in config.items()} | {"aws:region": "eu-west-1"}}
    file.write_text(json.dumps(whole))
    texts = {
        f"{NAMESPACE}:{key}": value if isinstance(value, str) else json.dumps(value) for key, value in config.items()
    }
    assert from_pulumi(texts | {"aws:region": "eu-west-1"}) == load_stack_file(file)
    assert load_stack_file(file) == parse(config).in_region("eu-west-1")
    assert parse(config).findings == ()


@pytest.mark.parametrize("text", ["{", "[1,", "[" * 100_000])
def test_text_from_pulumi_that_is_no_json_is_a_finding(text: str) -> None:
    with pytest.raises(ConfigError, match="models: must be a mapping, not text"):
        from_pulumi({f"{NAMESPACE}:target": "local", f"{NAMESPACE}:models": text})


def test_findings_stay_until_the_plan() -> None:
    config = parse({"target": "local", "models": {"chat": {"weights": "small", "context": "x", "engines": 50}}})
    assert [finding.path for finding in config.findings] == ["models.chat.context"]
    with pytest.raises(ConfigError) as error:
        make_plan("local", config, a_lock(), a_host(), KEYS)
    assert {finding.path for finding in error.value.findings} == {
        "models.chat.context",
        "models.chat.engines",
        "models",
    }


def test_a_hash_may_be_encrypted_and_is_then_not_known() -> None:
    config = parse({"target": "local", "models": {"small": {}}, "api-keys": {"team-a": {"secure": "v1:xyz"}}})
    assert config.api_keys == with_limits({"team-a": ENCRYPTED})
    plan = make_plan("local", config, a_lock(), a_host(), config.api_keys)
    assert [notice.path for notice in plan.notices] == ["api-keys"]


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("30s", 30), ("1.5m", 90), ("1 h", 3600)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"), [("1B", 1), ("2kB", 2000), ("2KiB", 2048), ("4 MB", 4_000_000), ("1GiB", 1 << 30)]
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count


def test_missing_file_names_the_stacks_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Pulumi.none.yaml: there is no such stack file(.|\n)*local"):
        load_stack_file(STACKS / "Pulumi.none.yaml")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe\x00", "is not text in UTF-8"),
        (b"config: {a: *nothing}", "is not YAML"),
        (b"config: !!python/object:os.system {}", "is not YAML"),
        (b"config:\n  a:b: " + b"9" * 10_000, "is not YAML"),
        (b"config: " + b"[" * 5_000, "nested too deeply"),
        (b"a: &a x\n" + b"".join(b"%c: &%c [*%c,*%c,*%c]\n" % (n, n, *[n - 1] * 3) for n in b"bcdefghijk"), "nested"),
        (b"config: 2026-01-01", "has no mapping"),
        (b"config: {1: 2, null: 3, [a]: 4}", "is missing"),
    ],
)  # fmt: skip
def test_strange_files(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "Pulumi.x.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        load_stack_file(file)


def test_schema_is_current(golden: Callable[[Path, str], None]) -> None:
    golden(STACKS / "stack.schema.json", json.dumps(schema(), indent=1) + "\n")


# Keys in the stack file.

WRITTEN = """\
# before
config:
  aws:region: "us-east-1"   # quoted, and a comment
  vllm-fleet:target: local
  vllm-fleet:models:
    small: {context: 1024}  # a flow mapping

  # a comment of its own
  vllm-fleet:slo: {ttft_p95: 5s}
"""
HASH = "ab" * 32


@pytest.fixture
def stack_file(tmp_path: Path) -> Path:
    file = tmp_path / "Pulumi.x.yaml"
    file.write_text(WRITTEN)
    file.chmod(0o640)
    return file


def test_a_key_is_added_and_nothing_else_changes(stack_file: Path) -> None:
    add_key(stack_file, "team-a", HASH)
    text = stack_file.read_text()
    assert text.replace(f"  vllm-fleet:api-keys:\n    team-a: sha256:{HASH}\n", "") == WRITTEN
    assert load_stack_file(stack_file).api_keys == with_limits({"team-a": HASH})
    assert load_stack_file(stack_file).findings == ()
    assert stack_file.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in stack_file.parent.iterdir()] == [stack_file.name]


def test_keys_are_removed_again_to_the_last_byte(stack_file: Path) -> None:
    for name in ("team-a", "team-b"):
        add_key(stack_file, name, HASH)
    for name in ("team-a", "team-b"):
        remove_key(stack_file, name)
    assert stack_file.read_text() == WRITTEN


@pytest.mark.parametrize("name", ["", "Team A", "-x", "sk/x", "x" * 41, "a\nb"])
def test_names_that_no_key_can_have(stack_file: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a name"):
        add_key(stack_file, name, HASH)
    assert stack_file.read_text() == WRITTEN


def test_a_name_is_taken_once(stack_file: Path) -> None:
    add_key(stack_file, "team-a", HASH)
    with pytest.raises(ConfigError, match=r"api-keys\.team-a: is there already"):
        add_key(stack_file, "team-a", "cd" * 32)
    assert load_stack_file(stack_file).api_keys == with_limits({"team-a": HASH})


def test_a_key_that_is_not_there_cannot_be_removed(stack_file: Path) -> None:
    add_key(stack_file, "team-a", HASH)
    with pytest.raises(ConfigError, match=r"did you mean `team-a`\?"):
        remove_key(stack_file, "taem-a")
    remove_key(stack_file, "team-a")
    with pytest.raises(ConfigError, match="`fleet keys list`"):
        remove_key(stack_file, "team-a")


def test_a_folder_that_cannot_be_written_is_a_finding(stack_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        add_key(stack_file, "team-a", HASH)
    assert stack_file.read_text() == WRITTEN
    assert [file.name for file in stack_file.parent.iterdir()] == [stack_file.name]
