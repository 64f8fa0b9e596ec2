"""`fleet lock add`: from a repository to an entry that the cache can fetch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import weights
from infra.findings import ConfigError
from infra.weights.lock import LOCK, load
from tests.unit.hub import COMMIT, CONFIG, FACTS, REPOSITORY, Hub, fact, safetensors, tiny_model

INT8 = {"num_bits": 8, "type": "int"}
INT4 = {"num_bits": 4, "type": "int"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_token")
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path / "shared"))
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "models.lock.yaml"
    file.write_bytes(LOCK.read_bytes())
    return file


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_repository_is_locked_and_can_then_be_fetched(hub: Hub, lock: Path, revision: str) -> None:
    name, entry = weights.add(f"hf://{REPOSITORY}{revision}", path=lock)
    assert name == "tiny-model"
    assert entry.source == f"hf://{REPOSITORY}@{COMMIT}"
    assert entry.licence == "mit"
    assert entry.format == "bf16"
    assert {path: one.model_dump(exclude_none=True) for path, one in entry.files.items()} == {
        path: fact(content) for path, content in hub.files.items() if path != "README.md"
    }
    assert entry.facts.model_dump(exclude_none=True, exclude_defaults=True) == FACTS
    written = load(lock)
    assert written.models[name] == entry
    folder = weights.ensure(name, written)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_weights_are_not_downloaded_to_be_locked(hub: Hub, lock: Path) -> None:
    hub.files = tiny_model(elements=1_000_000)
    _, entry = weights.add(f"hf://{REPOSITORY}", path=lock)
    assert entry.files["model.safetensors"].size > 2_000_000
    assert sum(asked.length for asked in hub.asked) < 200_000


def test_the_rest_of_the_file_stays_as_it_is(hub: Hub, lock: Path) -> None:
    before = lock.read_text(encoding="utf-8")
    weights.add(f"hf://{REPOSITORY}", "chat", path=lock)
    after = lock.read_text(encoding="utf-8")
    assert after.startswith(before.rstrip("\n"))
    hub.files = tiny_model(seed=1)
    weights.add(f"hf://{REPOSITORY}", "chat", path=lock)
    digest = str(fact(hub.files["model.safetensors"])["sha256"])
    again = lock.read_text(encoding="utf-8")
    assert digest in again
    assert digest not in after
    assert again.replace(digest, str(fact(tiny_model()["model.safetensors"])["sha256"])) == after


def test_a_model_in_several_files(hub: Hub, lock: Path) -> None:
    shards = {
        f"model-0000{number}-of-00002.safetensors": safetensors({f"model.layers.{number}.weight": ("BF16", 500)})
        for number in (1, 2)
    }
    shards["model-00002-of-00002.safetensors"] = safetensors(
        {"model.layers.2.weight": ("BF16", 500), "lm_head.weight": ("BF16", 30)}
    )
    index = {
        "metadata": {},
        "weight_map": {
            "model.layers.1.weight": "model-00001-of-00002.safetensors",
            "model.layers.2.weight": "model-00002-of-00002.safetensors",
            "lm_head.weight": "model-00002-of-00002.safetensors",
        },
    }
    hub.files = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "consolidated.safetensors": safetensors({"everything": ("BF16", 9)}),
        **shards,
    }
    _, entry = weights.add(f"hf://{REPOSITORY}", path=lock)
    assert set(entry.files) == {"config.json", "model.safetensors.index.json", *shards}
    assert (entry.facts.parameters, entry.facts.weights_bytes) == (1030, 2060)
    assert not entry.facts.tied_embeddings


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq"}, "awq"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": INT8, "input_activations": INT8}},
            },
            "w8a8-int8",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": INT4}}}, "w4a16"),
    ],
)
def test_formats(hub: Hub, lock: Path, quantization: dict[str, object], expected: str) -> None:
    hub.files["config.json"] = json.dumps({**CONFIG, "quantization_config": quantization}).encode()
    assert weights.add(f"hf://{REPOSITORY}", path=lock)[1].format == expected


def test_a_licence_that_has_only_a_name(hub: Hub, lock: Path) -> None:
    hub.card = {"license": "other", "license_name": "qwen"}
    assert weights.add(f"hf://{REPOSITORY}", path=lock)[1].licence == "qwen"


def test_gptq_packs_as_many_as_its_bits_allow(hub: Hub, lock: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 8}
    hub.files["config.json"] = json.dumps({**CONFIG, "quantization_config": quantization}).encode()
    hub.files["model.safetensors"] = safetensors(
        {"a.qweight": ("I32", 100), "a.scales": ("F16", 10), "a.qzeros": ("I32", 5), "lm_head.qweight": ("I32", 1)}
    )
    entry = weights.add(f"hf://{REPOSITORY}", path=lock)[1]
    assert entry.format == "gptq"
    assert (entry.facts.parameters, entry.facts.tied_embeddings) == (404, False)


def test_an_edition_is_tied_to_its_base(hub: Hub, lock: Path) -> None:
    weights.add(f"hf://{REPOSITORY}", "tiny", path=lock)
    hub.files["config.json"] = json.dumps({**CONFIG, "quantization_config": {"quant_method": "fp8"}}).encode()
    weights.add(f"hf://{REPOSITORY}", "tiny-fp8", variant_of="tiny", path=lock)
    assert load(lock).variants("tiny").keys() == {"tiny-fp8"}
    before = lock.read_bytes()
    hub.files["config.json"] = json.dumps({**CONFIG, "num_hidden_layers": 3}).encode()
    with pytest.raises(ConfigError, match=r"tiny-3\.variant_of: `tiny` is another model: layers is 2 there and 3 here"):
        weights.add(f"hf://{REPOSITORY}", "tiny-3", variant_of="tiny", path=lock)
    assert lock.read_bytes() == before


def test_scales_are_no_parameters_and_packed_ones_count_eightfold(hub: Hub, lock: Path) -> None:
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": INT4}}}
    hub.files["config.json"] = json.dumps({**CONFIG, "quantization_config": quantization}).encode()
    hub.files["model.safetensors"] = safetensors(
        {"a.weight_packed": ("I32", 100), "a.weight_scale": ("BF16", 10), "b.weight": ("BF16", 7)}
    )
    facts = weights.add(f"hf://{REPOSITORY}", path=lock)[1].facts
    assert facts.parameters == 807


def without_weights(hub: Hub) -> None:
    del hub.files["model.safetensors"]


def of_another_kind(hub: Hub) -> None:
    hub.files["config.json"] = json.dumps({"architectures": ["BertModel"], "hidden_size": 64}).encode()


def strangely_quantised(hub: Hub) -> None:
    hub.files["config.json"] = json.dumps({**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}).encode()


def of_another_account(hub: Hub) -> None:
    hub.token = "hf_another_token"  # noqa: S105 - of a hub on loopback


def without_consent(hub: Hub) -> None:
    hub.gated = True


@pytest.mark.parametrize(
    ("spoil", "source", "expected"),
    [
        (without_weights, f"hf://{REPOSITORY}", "has no safetensors files"),
        (of_another_kind, f"hf://{REPOSITORY}", r"config\.json lacks 'num_hidden_layers'"),
        (strangely_quantised, f"hf://{REPOSITORY}", "quantised in a way that has no name in the lock .bitsandbytes."),
        (of_another_account, f"hf://{REPOSITORY}", r"\(HTTP 401\): it is gated\n.*with the account of the token"),
        (
            without_consent,
            f"hf://{REPOSITORY}",
            rf"\(HTTP 403\): it is gated\n.*accept .*/{REPOSITORY} with the account",
        ),
        (print, f"hf://{REPOSITORY}@v9", "no such revision"),
        (print, "hf://acme/nothing", "acme/nothing"),
        (print, "hf://not a repository", "cannot be"),
        (print, "file:///no/such/folder", "cannot be read|has no safetensors"),
        (print, "https://example.com/model", "cannot be locked"),
    ],
)
def test_what_cannot_be_locked_leaves_the_lock_alone(
    hub: Hub, lock: Path, spoil: object, source: str, expected: str
) -> None:
    assert callable(spoil)
    spoil(hub)
    with pytest.raises(weights.WeightsError, match=expected) as error:
        weights.add(source, path=lock)
    assert "hf_not_a_real_token" not in str(error.value)
    assert lock.read_bytes() == LOCK.read_bytes()


def test_a_folder_is_locked(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path / "shared"))
    folder = tmp_path / "My_Model"
    folder.mkdir()
    for path, content in tiny_model().items():
        (folder / path).write_bytes(content)
    name, entry = weights.add(f"file://{folder}", path=lock)
    assert name == "my-model"
    assert set(entry.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert weights.ensure(name, load(lock)).is_dir()


# fleet lock fill

OTHER = "f" * 40
UNKNOWN = f"""models:
  # Above the entry.
  tiny:
    # From memory.
    source: hf://{REPOSITORY}@main
    digests: unknown
    licence: MIT
    format: bf16
    # Computed.
    facts: {json.dumps({**FACTS, "parameters": 19_000})}

  # Above the next one.
  tiny-fp8:
    source: hf://{REPOSITORY}-FP8@{COMMIT}
    variant_of: tiny
    digests: unknown
    licence: mit
    format: fp8
    facts: {json.dumps(FACTS)}
"""


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    file = tmp_path / "models.lock.yaml"
    file.write_text(UNKNOWN, encoding="utf-8")
    return file


def test_an_entry_is_filled_in_from_its_own_source(hub: Hub, unknown: Path) -> None:
    said: list[str] = []
    name, entry = weights.fill("tiny", unknown, said.append)
    assert (name, entry.source, entry.licence) == ("tiny", f"hf://{REPOSITORY}@{COMMIT}", "mit")
    assert [text for text in said if " was " in text] == [
        "tiny: licence was MIT and is mit",
        "tiny: parameters was 19000 and is 20000",
    ]
    text = unknown.read_text(encoding="utf-8")
    before, after = (
        "models:\n  # Above the entry.\n  tiny:\n    # From memory.\n    # Computed.\n",
        "\n  # Above the next",
    )
    assert text.startswith(before + f"    source: hf://{REPOSITORY}@{COMMIT}\n")
    assert text.partition(after)[2] == UNKNOWN.partition(after)[2]
    assert contents(weights.ensure("tiny", load(unknown))) == {
        path: content for path, content in hub.files.items() if path != "README.md"
    }
    # The branch moves on: what was filled in stays what it is.
    hub.commit = OTHER
    assert weights.fill("tiny", unknown, said.append)[1] == entry
    assert said[-1] == "tiny: its digests are known already"
    assert unknown.read_text(encoding="utf-8") == text


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_made_here_is_filled_in_where_it_is_made_from(hub: Hub, unknown: Path) -> None:
    made = f"""
  tiny-w8a8:
    made_from: tiny
    recipe: nodeconfig/cache/quantize.py
    calibration: {{prompts: 1, tokens: 8}}
    licence: mit
    format: w8a8-int8
    facts: {json.dumps(FACTS)}
"""
    unknown.write_text(UNKNOWN + made, encoding="utf-8")
    assert weights.fill("tiny-w8a8", unknown)[0] == "tiny"
    assert load(unknown).unknown("tiny-w8a8") is None
    assert hub.asked


def test_what_an_entry_is_a_variant_of_stays(hub: Hub, unknown: Path) -> None:
    unknown.write_text(UNKNOWN.replace(f"{REPOSITORY}-FP8", REPOSITORY), encoding="utf-8")
    hub.files["config.json"] = json.dumps({**CONFIG, "quantization_config": {"quant_method": "fp8"}}).encode()
    assert weights.fill("tiny-fp8", unknown)[1].variant_of == "tiny"
    assert load(unknown).variants("tiny").keys() == {"tiny-fp8"}


@pytest.mark.parametrize(
    ("spoil", "token", "name", "expected"),
    [
        (of_another_account, "", "tiny", r"(?s)\(HTTP 401\): it is gated.*accept .*set HF_TOKEN .*none is set"),
        (
            without_consent,
            "hf_a_token",
            "tiny",
            rf"(?s)\(HTTP 403\): it is gated.*accept .*/{REPOSITORY} with the account",
        ),
        (print, "", "tinny", "(?s)models: has no `tinny`.*did you mean `tiny`"),
        (print, "", "tiny-fp8", "acme/Tiny_Model-FP8"),
    ],
)
def test_what_cannot_be_filled_in_leaves_the_lock_alone(  # noqa: PLR0913, PLR0917 - what differs
    hub: Hub, unknown: Path, monkeypatch: pytest.MonkeyPatch, spoil: object, token: str, name: str, expected: str
) -> None:
    assert callable(spoil)
    spoil(hub)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(weights.WeightsError, match=expected):
        weights.fill(name, unknown)
    assert unknown.read_text(encoding="utf-8") == UNKNOWN


def test_an_entry_without_entries_beside_it(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "models.lock.yaml"
    file.write_text("# Nothing yet.\nmodels: {}\n", encoding="utf-8")
    weights.add(f"hf://{REPOSITORY}", path=file)
    assert file.read_text(encoding="utf-8").startswith("# Nothing yet.\nmodels:\n  tiny-model:\n    source: hf")
    assert load(file).models.keys() == {"tiny-model"}
    assert hub.asked
