"""`stacks/benchmarks.yaml`: what users measured of their own engines. It goes before every estimate.

The file may be missing. One record is one run of `vllm bench serve --max-concurrency N --ignore-eos
--percentile-metrics ttft,tpot --metric-percentiles 95` against one engine:

    benchmarks:
      - weights: llama-3.1-8b-instruct       # an entry of models.lock.yaml
        gpu: h100-80gb                       # of the catalog
        tensor_parallel_size: 1
        vllm_version: 0.32.0
        max_num_batched_tokens: 8192
        prompt_tokens: 1000
        answer_tokens: 1000
        concurrency: 64
        output_tokens_s: 4673.4              # Output token throughput
        ttft_ms: 478                         # Mean TTFT
        ttft_p95_ms: 1100                    # P95 TTFT
        tpot_ms: 13.2                        # Mean TPOT
        tpot_p95_ms: 13.5                    # P95 TPOT
        date: 2026-11

Nothing is interpolated: a record counts for exactly its configuration and load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from infra.catalog.strict import Month, Strict
from infra.findings import ConfigError, Finding, did_you_mean, nearest
from infra.paths import ROOT
from infra.plan.throughput import Benchmark, Load

if TYPE_CHECKING:
    from infra.catalog import Gpu
    from infra.weights.lock import WeightsLock

__all__ = ["BENCHMARKS", "Benchmark", "Record", "load"]

BENCHMARKS = ROOT / "stacks" / "benchmarks.yaml"


class Record(Strict):
    """One run. The keys are explained above."""

    weights: str
    gpu: str
    tensor_parallel_size: PositiveInt = 1
    vllm_version: str
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    max_num_batched_tokens: PositiveInt
    prompt_tokens: PositiveInt
    answer_tokens: PositiveInt
    concurrency: PositiveInt
    output_tokens_s: PositiveFloat
    ttft_ms: PositiveFloat
    ttft_p95_ms: PositiveFloat
    tpot_ms: PositiveFloat
    tpot_p95_ms: PositiveFloat
    date: Month


class Records(Strict):
    """The whole file."""

    benchmarks: list[Record] = Field(default_factory=list)


def load(
    lock: WeightsLock, gpus: Mapping[str, Gpu], vllm_version: str, path: Path = BENCHMARKS
) -> tuple[Benchmark, ...]:
    """Every record of that version of vLLM.

    Raises:
        ConfigError: With everything that is wrong in the file.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError([Finding(path.name, f"cannot be read: {error.strerror}", "make it readable")]) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([Finding(path.name, f"is not YAML: {error}", "mend it by hand")]) from None
    try:
        records = Records.model_validate({} if raw is None else raw).benchmarks
    except ValidationError as error:
        raise ConfigError([_finding(path, problem) for problem in error.errors()]) from None
    if findings := list(_unknown(path, records, lock, gpus)):
        raise ConfigError(findings)
    return tuple(_benchmark(record, lock, gpus) for record in records if record.vllm_version == vllm_version)


def _finding(path: Path, problem: Mapping[str, Any]) -> Finding:
    """One of pydantic's errors, in the words of this file."""
    where = f"{path.name}: " + ".".join(str(part) for part in problem["loc"])
    key = str(problem["loc"][-1]) if problem["loc"] else ""
    match problem["type"]:
        case "extra_forbidden":
            near = nearest(key, Record.model_fields)
            return Finding(where, "is not a key of a benchmark", f"did you mean `{near}`?" if near else "remove it")
        case "missing":
            return Finding(where, "is missing", "every record says what was measured, and of what")
        case _:
            return Finding(where, problem["msg"])


def _unknown(path: Path, records: list[Record], lock: WeightsLock, gpus: Mapping[str, Gpu]) -> Iterator[Finding]:
    """Names that nothing has."""
    for number, record in enumerate(records):
        where = f"{path.name}: benchmarks.{number}"
        if record.weights not in lock.models:
            problem = f"there is no entry `{record.weights}` in models.lock.yaml"
            yield Finding(f"{where}.weights", problem, did_you_mean(record.weights, lock.models))
        if record.gpu not in gpus:
            yield Finding(f"{where}.gpu", f"the catalog has no GPU `{record.gpu}`", did_you_mean(record.gpu, gpus))


def _benchmark(record: Record, lock: WeightsLock, gpus: Mapping[str, Gpu]) -> Benchmark:
    entry = lock.models[record.weights]
    return Benchmark(
        name=f"{record.weights} on {record.tensor_parallel_size} {record.gpu}, {record.date} (stacks/benchmarks.yaml)",
        facts=entry.facts,
        format_=entry.format,
        gpu=gpus[record.gpu],
        tensor_parallel_size=record.tensor_parallel_size,
        kv_cache_dtype=record.kv_cache_dtype,
        max_num_batched_tokens=record.max_num_batched_tokens,
        load=Load(record.prompt_tokens, record.answer_tokens, record.concurrency),
        output_tokens_s=record.output_tokens_s,
        ttft_s=record.ttft_ms / 1000,
        ttft_p95_s=record.ttft_p95_ms / 1000,
        tpot_s=record.tpot_ms / 1000,
        tpot_p95_s=record.tpot_p95_ms / 1000,
    )
