"""`fleet fit`: predict every row of a table of engines, as they stand in vLLM's start-up logs.

Columns that are read: model, dtype_or_quant, kv_dtype, gpu, gpu_mem_gib, tp, pp, gpu_memory_utilization, max_model_len,
max_num_seqs, max_num_batched_tokens, enforce_eager, vllm_version. Columns that say what came out (weights_gib,
kv_tokens, outcome, note …) are not.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from infra.catalog.memory import GIB, memory_catalog
from infra.findings import ConfigError, Finding
from infra.plan.fit import Engine, Fit, fit
from infra.plan.overhead import batch_defaults
from infra.plan.weights_memory import weights_bytes
from infra.weights.facts import ModelFacts, decoder, facts_from_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from infra.catalog.memory import Regime
    from infra.weights.lock import WeightsLock

Row = dict[str, str]
ADDED = (
    *("predicted_outcome", "predicted_kv_tokens", "predicted_max_concurrency", "predicted_weights_gib"),
    *("predicted_kv_available_gib", "predicted_activation_gib", "predicted_kv_bytes_per_token", "predicted_note"),
)
_FORMATS = (
    (r"nvfp4", "nvfp4"),
    (r"mxfp4", "mxfp4"),
    (r"bnb|bitsandbytes", "bnb-4bit"),
    (r"awq", "awq"),
    (r"gptq(?!.*int8)", "gptq"),
    (r"w4a16|int4|4[- ]?bit|autoround", "w4a16"),
    (r"w8a16", "w8a16"),
    (r"w8a8|int8", "w8a8-int8"),
    (r"fp8", "fp8"),
)
"""What names of formats look like, in the order in which they are tried."""
SIZES = (2, 4, 8)
"""Tensor parallel sizes that are tried where none is stated."""
_SUFFIX = re.compile(r"[-_ ]+(fp8|awq|gptq|w8a8|w4a16|int8|int4|quanti[sz]ed)$")
"""What a name may end with that only says the format."""
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class UnpredictableError(Exception):
    """A row does not say enough; the text says what is missing."""


@dataclass(frozen=True)
class Known:
    """A model, however it is known."""

    facts: ModelFacts
    format: str
    """Of the checkpoint."""


def predict_file(source: Path, target: Path, configs: Path | None, lock: WeightsLock) -> tuple[int, int]:
    """Predict every row of a CSV file.

    Returns:
        How many rows there are, and how many could be predicted.

    Raises:
        ConfigError: A file cannot be read or written.
    """
    try:
        with source.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns, rows = list(reader.fieldnames or ()), list(reader)
        known = models(configs, lock)
        answers = [predict(row, known) for row in rows]
        with target.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [*columns, *(name for name in ADDED if name not in columns)])
            writer.writeheader()
            writer.writerows(
                {name: value for name, value in row.items() if name} | answer
                for row, answer in zip(rows, answers, strict=True)
            )
    except OSError as error:
        problem = f"cannot be opened: {error.strerror}"
        raise ConfigError([Finding(str(error.filename), problem, "name a file that can")]) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([Finding(str(source), f"is no CSV file: {error}")]) from None
    return len(rows), sum(bool(answer["predicted_outcome"]) for answer in answers)


def models(configs: Path | None, lock: WeightsLock) -> dict[str, Known]:
    """Every model that is known, by `org/name` or by its name in the lock, in small letters."""
    known = {name: Known(entry.facts, entry.format) for name, entry in lock.models.items()}
    for file in sorted(configs.glob("*.json")) if configs else ():
        if file.name.endswith(".size.json"):
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            facts = facts_from_config(config, _size(file.with_suffix(".size.json")))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                [Finding(str(file), f"cannot be read as a model's config: {error!r}", "mend it or take it away")]
            ) from None
        format_ = checkpoint_format(config, file.stem) or _TYPES[facts.dtype]
        if not file.with_suffix(".size.json").exists():
            facts = facts.model_copy(update={"weights_bytes": 0})
        known[file.stem.replace("__", "/", 1).lower()] = Known(facts, format_)
    return known


def _size(file: Path) -> int | None:
    """Bytes of the safetensors files: the number in the file, or the one it has under a name."""
    if not file.exists():
        return None
    value = json.loads(file.read_text(encoding="utf-8"))
    numbers = [value] if isinstance(value, int) else [item for item in _leaves(value) if isinstance(item, int)]
    return max(numbers, default=0) or None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def checkpoint_format(config: Mapping[str, Any], name: str) -> str:
    """The format of a quantised checkpoint; empty if it is not quantised."""
    quantization = config.get("quantization_config") or decoder(config).get("quantization_config")
    if not quantization:
        return ""
    method = str(quantization.get("quant_method", "")).lower()
    groups = quantization.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") or {}
        bits, kind = weights.get("num_bits"), weights.get("type")
        if bits == 4:  # noqa: PLR2004
            return "nvfp4" if kind == "float" else "w4a16"
        if bits == 8:  # noqa: PLR2004
            return "fp8" if kind == "float" else ("w8a8-int8" if group.get("input_activations") else "w8a16")
    if method in {"gptq", "auto-round", "autoround", "awq"} and quantization.get("bits", 4) == 8:  # noqa: PLR2004
        return "w8a16"
    text = f"{method} {quantization.get('quant_algo', '')} {quantization.get('fmt', '')}"
    return named_format(text) or named_format(name) or "fp8"


def named_format(text: str) -> str:
    """The format that a text names; empty if it names none."""
    return next((format_ for pattern, format_ in _FORMATS if re.search(pattern, text.lower())), "")


def predict(row: Mapping[str, str], known: Mapping[str, Known]) -> Row:
    """The columns that are added to a row."""
    answer = dict.fromkeys(ADDED, "")
    try:
        engine, regime = _question(row, known)
    except UnpredictableError as error:
        return answer | {"predicted_note": str(error)}
    found = fit(engine, regime)
    if _number(row, "tp") is None and found.misfit:
        # Whoever has several cards does not always say so: the fewest on which it starts.
        for size in SIZES:
            wider = fit(replace(engine, tensor_parallel_size=size), regime)
            if not wider.misfit:
                return answer | _answer(wider) | {"predicted_note": f"tp is not stated: taken to be {size}"}
    return answer | _answer(found)


def _answer(found: Fit) -> Row:
    return {
        "predicted_outcome": "misfit" if found.misfit else "ok",
        "predicted_kv_tokens": str(found.kv_tokens),
        "predicted_max_concurrency": f"{found.max_concurrency:.2f}",
        "predicted_weights_gib": f"{found.weights_bytes / GIB:.2f}",
        "predicted_kv_available_gib": f"{found.pool_bytes / GIB:.2f}",
        "predicted_activation_gib": f"{found.activation_bytes / GIB:.2f}",
        "predicted_kv_bytes_per_token": str(found.kv_bytes_per_token),
        "predicted_note": found.misfit,
    }


def _question(row: Mapping[str, str], known: Mapping[str, Known]) -> tuple[Engine, Regime]:
    """The engine that a row describes.

    Raises:
        UnpredictableError: It does not say enough.
    """
    model = find(row.get("model", ""), known)
    gpu = row.get("gpu", "")
    total = _number(row, "gpu_mem_gib")
    gpu_bytes = round(total * GIB) if total else memory_catalog().card_bytes(gpu)
    if gpu_bytes is None:
        raise UnpredictableError(f"the memory of the GPU is not known: {gpu or 'no name'}; give gpu_mem_gib")
    told = row.get("dtype_or_quant", "")
    dtype = next((name for name in _TYPES if name in told.lower()), model.facts.dtype)
    format_, stored = _format(told, row.get("model", ""), model, dtype)
    regime = memory_catalog().regime(row.get("vllm_version", ""), model.facts.architecture)
    context = int(_number(row, "max_model_len") or model.facts.max_positions)
    sequences, batched = batch_defaults(regime, gpu_bytes, context, a100=_is_a100(gpu, gpu_bytes))
    return Engine(
        facts=model.facts,
        weights_bytes=weights_bytes(model.facts, format_, stored=stored),
        gpu_bytes=gpu_bytes,
        utilization=_number(row, "gpu_memory_utilization") or regime.utilization,
        context=context,
        sequences=int(_number(row, "max_num_seqs") or sequences),
        batched_tokens=int(_number(row, "max_num_batched_tokens") or batched),
        kv_dtype=row.get("kv_dtype", ""),
        dtype=dtype,
        tensor_parallel_size=int(_number(row, "tp") or 1),
        pipeline_parallel_size=int(_number(row, "pp") or 1),
        eager=row.get("enforce_eager", "").lower() == "true",
    ), regime


def _is_a100(name: str, gpu_bytes: int) -> bool:
    """A card of 79 GiB without a name is an A100, unless it has an H100's total."""
    return "A100" in name.upper() or (not name and 79 < gpu_bytes / GIB < 79.4 and not 79.15 < gpu_bytes / GIB < 79.23)  # noqa: PLR2004


def _format(told: str, name: str, model: Known, dtype: str) -> tuple[str, bool]:
    """The format that the engine holds the weights in, and whether the checkpoint has it."""
    named = named_format(told) or named_format(name)
    if not named and re.search(r"quanti[sz]ed", name.lower()) and model.format in _TYPES.values():
        raise UnpredictableError("the model is quantised, but the row does not say how")
    if model.format not in _TYPES.values():
        return model.format, model.facts.weights_bytes > 0
    format_ = named or _TYPES[dtype]
    return format_, format_ == model.format and model.facts.weights_bytes > 0


def _number(row: Mapping[str, str], column: str) -> float | None:
    try:
        value = float(row.get(column) or "nan")
    except ValueError:
        return None
    return value if value > 0 else None


def find(name: str, known: Mapping[str, Known]) -> Known:
    """The model that a name means: exactly, whoever published it, or in whatever format.

    Raises:
        UnpredictableError: None.
    """
    if not name.strip():
        raise UnpredictableError("the model is not named")
    bare = _plain(re.sub(r"\(.*?\)", " ", name))
    for wanted in (_plain(name), bare, _SUFFIX.sub("", bare)):
        for key, model in known.items():
            if _plain(key) == wanted:
                return model
        for key, model in known.items():
            if _plain(key).rpartition("/")[2] == wanted.rpartition("/")[2]:
                return model
    raise UnpredictableError(f"the model {name} is not in the lock, and no config of it was given")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/.]+", "-", name.lower()).strip("-")
