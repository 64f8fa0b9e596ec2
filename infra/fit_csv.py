"""`fleet fit`: predict every row of a table of engines, as they stand in vLLM's start-up logs.

Columns that are read: model, dtype_or_quant, kv_dtype, gpu, gpu_mem_gib, tp, pp, gpu_memory_utilization, max_model_len,
max_num_seqs, max_num_batched_tokens, enforce_eager, vllm_version. Columns that say what came out (weights_gib,
kv_tokens, outcome, note …) are not.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from infra.catalog.memory import GIB, memory_catalog
from infra.findings import ConfigError, Finding
from infra.fit_models import TYPES, Known, UnpredictableError, find, models, named_format
from infra.plan.fit import Engine, Fit, fit
from infra.plan.overhead import batch_defaults
from infra.plan.weights_memory import BITS, weights_bytes

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
SIZES = (2, 4, 8)
"""Tensor parallel sizes that are tried where none is stated."""


def predict_file(source: Path, target: Path, configs: Path | None, lock: WeightsLock) -> tuple[int, int]:
    """Predict every row of a CSV file.

    Returns:
        How many rows there are, and how many could be predicted.

    Raises:
        ConfigError: A file cannot be read or written.
    """
    try:
        with source.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="")
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


def predict(row: Mapping[str, str], known: Mapping[str, Known | str]) -> Row:
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


def _question(row: Mapping[str, str], known: Mapping[str, Known | str]) -> tuple[Engine, Regime]:
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
    # `--dtype auto` computes in 16 bits, whatever width the weights are stored in (vllm/config/model.py).
    usual = "bfloat16" if model.facts.dtype == "float32" else model.facts.dtype
    dtype = next((name for name in TYPES if name in told.lower()), usual)
    regime = memory_catalog().regime(row.get("vllm_version", ""), model.facts.architecture)
    utilization = _number(row, "gpu_memory_utilization") or regime.utilization
    if utilization > 1:
        raise UnpredictableError(f"gpu_memory_utilization is a share of at most 1, not {utilization:g}")
    context = int(_number(row, "max_model_len") or model.facts.max_positions)
    sequences, batched = batch_defaults(regime, gpu_bytes, context, a100=_is_a100(gpu, gpu_bytes))
    return Engine(
        facts=model.facts,
        weights_bytes=_weights(told, row.get("model", ""), model, dtype),
        gpu_bytes=gpu_bytes,
        utilization=utilization,
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


def _weights(told: str, name: str, model: Known, dtype: str) -> int:
    """Bytes of all weights in the format that the engine holds them in."""
    named = named_format(told) or named_format(name)
    if not named and re.search(r"quanti[sz]ed", name.lower()) and model.format in TYPES.values():
        raise UnpredictableError("the model is quantised, but the row does not say how")
    if model.format not in TYPES.values():
        return weights_bytes(model.facts, model.format, stored=model.stored)
    if named or not model.stored:
        return weights_bytes(model.facts, named or TYPES[dtype], stored=False)
    stored = weights_bytes(model.facts, model.format, stored=True)
    return round(stored * BITS[TYPES[dtype]] / BITS[model.format])


def _number(row: Mapping[str, str], column: str) -> float | None:
    """What a column says; None if it is empty.

    Raises:
        UnpredictableError: It is no number, or none that can be.
    """
    text = (row.get(column) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    whole = column not in {"gpu_mem_gib", "gpu_memory_utilization"}
    if not math.isfinite(value) or value <= 0 or (whole and value != int(value)):
        raise UnpredictableError(f"{column} is {text}, not {'a whole' if whole else 'a'} number over 0")
    return value
