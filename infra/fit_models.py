"""The models that `fleet fit` knows: those of the lock, and published configs in a folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.findings import ConfigError, Finding
from infra.weights.config_json import decoder, facts_from_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from infra.weights.facts import ModelFacts
    from infra.weights.lock import WeightsLock

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Formats of checkpoints that are not quantised, by the type of their numbers."""
_FORMATS = (
    (r"nvfp4", "nvfp4"),
    (r"mxfp4", "mxfp4"),
    (r"load_in_8bit\W+true", "w8a16"),
    (r"bnb|bitsandbytes", "bnb-4bit"),
    (r"awq", "awq"),
    (r"gptq(?!.*int8)", "gptq"),
    (r"w4a16|int4|4[- ]?bit|n?bits\W+4\b|auto-?round", "w4a16"),
    (r"w8a16", "w8a16"),
    (r"w8a8|int8", "w8a8-int8"),
    (r"fp8", "fp8"),
)
"""What names of formats look like, in the order in which they are tried."""
_SUFFIX = re.compile(r"[-_ ]+(fp8|awq|gptq|w8a8|w4a16|int8|int4|quanti[sz]ed)$")
"""What a name may end with that only says the format."""
_TOTALS = ("total_bytes", "total_size")
FOUR_BITS, EIGHT_BITS = 4, 8


class UnpredictableError(Exception):
    """A row does not say enough; the text says what is missing."""


@dataclass(frozen=True)
class Known:
    """A model, however it is known."""

    facts: ModelFacts
    format: str
    """Of the checkpoint."""
    stored: bool = True
    """The size of the checkpoint is known, not computed from its shape."""


def models(configs: Path | None, lock: WeightsLock) -> dict[str, Known | str]:
    """Every model that is known, by `org/name` or by its name in the lock, in small letters.

    A config that cannot be read stands there with what is wrong with it: one file does not spoil a table.

    Raises:
        ConfigError: There is no such folder.
    """
    known: dict[str, Known | str] = {name: Known(entry.facts, entry.format) for name, entry in lock.models.items()}
    if configs and not configs.is_dir():
        raise ConfigError([Finding(str(configs), "is no folder", "name one with files `org__name.json`")])
    for file in sorted(configs.glob("*.json")) if configs else ():
        if not file.name.endswith(".size.json"):
            known[file.stem.replace("__", "/", 1).lower()] = _known(file)
    return known


def _known(file: Path) -> Known | str:
    try:
        config = _read(file)
        size = _size(file.with_suffix(".size.json"))
        facts = facts_from_config(config, size)
        format_ = checkpoint_format(config, file.stem) or TYPES[facts.dtype]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        lacks = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        return f"{file.name} cannot be read as a model's config: {lacks}"
    return Known(facts, format_, stored=size is not None)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8-sig"))


def _size(file: Path) -> int | None:
    """Bytes of the safetensors files: a number alone, or the total in their index, or the largest number there is."""
    if not file.exists():
        return None
    leaves = list(_leaves("", _read(file)))
    totals = [number for key, number in leaves if key in _TOTALS] or [number for _, number in leaves]
    return max(totals, default=0) or None


def _leaves(key: str, value: Any) -> Iterator[tuple[str, int]]:
    """All numbers, each with the key that it stands under."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(name, item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(key, item)
    elif isinstance(value, int | float | str) and not isinstance(value, bool) and str(value).strip():
        yield key, int(float(value))


def checkpoint_format(config: Mapping[str, Any], name: str) -> str:
    """The format of a quantised checkpoint; empty if it is not quantised."""
    quantization = config.get("quantization_config") or decoder(config).get("quantization_config")
    quantization = quantization or config.get("compression_config")
    if not quantization:
        return ""
    if isinstance(quantization, str):
        return named_format(quantization) or "fp8"
    groups = quantization.get("config_groups")
    if groups == {} and quantization.get("sparsity_config"):
        return ""
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") or {}
        integers = {FOUR_BITS: "w4a16", EIGHT_BITS: "w8a8-int8" if group.get("input_activations") else "w8a16"}
        floats = {FOUR_BITS: named_format(str(quantization.get("format", ""))) or "nvfp4", EIGHT_BITS: "fp8"}
        kinds = floats if weights.get("type") == "float" else integers
        if format_ := kinds.get(int(weights.get("num_bits") or 0)):
            return format_
    method, bits = str(quantization.get("quant_method", "")).lower(), quantization.get("bits")
    if bits == EIGHT_BITS and re.match("gptq|auto-?round|awq|moe_wna16", method):
        return "w8a16"
    text = f"{method} {quantization.get('quant_algo', '')} {quantization.get('fmt', '')}"
    if "bitsandbytes" in method:
        text += f" load_in_8bit={quantization.get('load_in_8bit')}"
    return named_format(text) or named_format(name) or named_format(str(quantization)) or "fp8"


def named_format(text: str) -> str:
    """The format that a text names; empty if it names none."""
    return next((format_ for pattern, format_ in _FORMATS if re.search(pattern, text.lower())), "")


def find(name: str, known: Mapping[str, Known | str]) -> Known:
    """The model that a name means: exactly, whoever published it, or in whatever format.

    Raises:
        UnpredictableError: None, or its config cannot be read.
    """
    if not name.strip():
        raise UnpredictableError("the model is not named")
    bare = _plain(re.sub(r"\(.*?\)", " ", name))
    for wanted in (_plain(name), bare, _SUFFIX.sub("", bare)):
        exact = [model for key, model in known.items() if _plain(key) == wanted]
        named = [model for key, model in known.items() if _title(key) == wanted.rpartition("/")[2]]
        for model in (*exact, *named):
            if isinstance(model, str):
                raise UnpredictableError(model)
            return model
    raise UnpredictableError(f"the model {name} is not in the lock, and no config of it was given")


def _title(key: str) -> str:
    return _plain(key).rpartition("/")[2]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/.]+", "-", name.lower()).strip("-")
