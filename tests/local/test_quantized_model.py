"""The 8-bit model as this machine makes it from the default one; that it serves is proven by the update under load."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import parse_local_safetensors_file_metadata

from infra import weights

BASE = "smollm2-135m-instruct"
QUANTIZED = "smollm2-135m-instruct-w8a8"
QUANTIZED_LAYERS = 6  # q, k, v, o, gate and up of each block


def test_the_default_model_has_the_locked_bytes_on_this_machine() -> None:
    lock = weights.load()
    folder = weights.ensure(BASE, lock)
    assert weights.verify(folder, lock.models[BASE]) == []


def test_it_is_made_once_and_is_as_the_lock_describes_it() -> None:
    lock = weights.load()
    entry = lock.models[QUANTIZED]
    assert entry.calibration is not None
    assert entry.calibration.prompts < 32, "tests must not make the real one: set FLEET_CALIBRATION"
    folder = weights.ensure(QUANTIZED, lock)
    assert weights.verify(folder, entry) == []
    said: list[str] = []
    assert weights.ensure(QUANTIZED, lock, said.append) == folder
    assert said == []

    tensors = parse_local_safetensors_file_metadata(folder / "model.safetensors").tensors
    quantized = {name for name, tensor in tensors.items() if tensor.dtype == "I8"}
    assert len(quantized) == QUANTIZED_LAYERS * entry.facts.layers
    assert {f"{name}_scale" for name in quantized} < set(tensors)
    stored = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values())
    assert stored == pytest.approx(entry.facts.weights_bytes, rel=0.001)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    (group,) = config["quantization_config"]["config_groups"].values()
    assert (group["weights"]["num_bits"], group["input_activations"]["num_bits"]) == (8, 8)
