"""Score the speed estimates against measurements that others published: `python bench/throughput_score.py [TABLE.csv]`.

The table is vllm-throughput.csv of the project's facts; throughput-rows.yaml beside this file says how rows are read.
Prints errors with the constants of catalog/efficiency.yaml. With `--calibrate` fits these constants, prints them, and
prints the errors of rows whose source was left out of the fit: the honest ones.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from infra.catalog import Gpu, gpus
from infra.catalog.efficiency import Constant, Efficiency, efficiency
from infra.paths import ROOT, shared_dir
from infra.plan.roofline import Engine
from infra.plan.throughput import Load, steady_state
from infra.weights.config_json import facts_from_config

READING: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("throughput-rows.yaml").read_text(encoding="utf-8"))
QUANTITIES = ("tokens/s", "TPOT", "TTFT")
NOISE = {"tokens/s": 0.07, "TPOT": 0.07, "TTFT": 0.21}
"""How much two measurements of the same differ, about; TTFT is of one request on an idle engine, or of few."""
SMALL_STEP = 1e-4
Errors = Mapping[str, float]
"""ln(predicted / measured) by quantity."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    source: str
    group: str
    """`scored`, `over capacity` (requests waited for room in the cache) or `former engine`."""
    engine: Engine
    load: Load
    rate: float | None
    """Requests a second that came whether or not others were done."""
    measured: Mapping[str, float]


def default_table() -> Path | None:
    """The table, where this checkout has it."""
    folders = (shared_dir(), ROOT.parent / "shared")
    return next((path for folder in folders if (path := folder / "facts" / "vllm-throughput.csv").exists()), None)


def read(table: Path) -> list[Row]:
    """Every row of speed that is not doubtful."""
    with table.open(newline="", encoding="utf-8") as stream:
        lines = [line for line in csv.DictReader(stream) if line["kind"] == "throughput"]
    return [_row(line) for line in lines if line["id"] not in READING["doubtful"]]


def _gpu(name: str) -> Gpu:
    changed = dict(READING["gpus"][name])
    base = gpus()[changed.pop("like")]
    return base.model_copy(update={**changed, "product": name, "formats": {**base.formats, "w8a16": "weight-only"}})


def _row(line: Mapping[str, str]) -> Row:
    how = next(how for start, how in READING["loads"].items() if line["note"].startswith(start))
    shape = next(shape for end, shape in READING["models"].items() if line["model"].endswith(end))
    config = {**shape, "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    group = int(line["tp"])
    engine = Engine(
        facts_from_config(config), READING["formats"][line["dtype_or_quant"]], _gpu(line["gpu"]), group, efficiency()
    )
    columns = {"prompt": "input_tokens", "answer": "output_tokens", "concurrency": "concurrency"}
    prompt, answer, count = (int(line[columns[key]]) if how[key] == "row" else how[key] for key in columns)
    rate = float(line["request_rate"]) if count == "rate" else None
    count = 1 if rate else count
    room = [
        row["tokens"]
        for row in READING["kv_tokens"]
        if (row["source"], row["tp"]) == (line["source_repo_or_site"], group)
    ]
    tokens = room[0] if room else math.inf
    full = count * (prompt + answer) > tokens
    repeats = line["source_repo_or_site"] == READING["repeats"]["source"] and count >= READING["repeats"]["from"]
    cached = prompt // 2 if repeats and 2 * count * (prompt + answer) <= tokens else 0
    measured = {
        "tokens/s": float(line["output_tok_s"] or 0),
        "TPOT": 0 if full else float(line["tpot_ms_mean"] or line["tpot_ms_p50"] or 0) / 1000,
        "TTFT": float(line["ttft_ms_p50"] or 0) / 1000 if count == 1 and how.get("ttft") else 0,
    }
    if full:  # as many as fit while half of the answer is written
        count = int(tokens / (prompt + answer / 2))
    former = line["vllm_version"].startswith(READING["former_engine"])
    return Row(
        name=line["id"],
        source=line["source_repo_or_site"],
        group="former engine" if former else "over capacity" if full else "scored",
        engine=engine,
        load=Load(prompt, answer, count, cached),
        rate=rate,
        measured={name: value for name, value in measured.items() if value},
    )


def errors(row: Row, constants: Efficiency) -> Errors:
    """How far an estimate is from each measurement of a row."""
    old = row.engine
    engine = Engine(old.facts, old.format_, old.gpu, old.tensor_parallel_size, constants)
    load = row.load
    speed = steady_state(engine, load, 0, "")
    for _ in range(20 if row.rate else 0):  # Little's law: as many are there as come while one is answered
        latency = speed.ttft_s + load.answer_tokens * speed.tpot_s
        if row.rate is None or READING["online_requests"] / row.rate < 3 * latency:
            return {}
        load = Load(load.prompt_tokens, load.answer_tokens, max(1, round(row.rate * latency)))
        speed = steady_state(engine, load, 0, "")
    predicted = {"tokens/s": speed.output_tokens_s, "TPOT": speed.tpot_s, "TTFT": speed.ttft_s}
    return {name: math.log(predicted[name] / value) for name, value in row.measured.items()}


def summary(found: Sequence[float]) -> tuple[float, float, float]:
    """Percent: what half of the estimates are off by at most; nine of ten; median with its sign."""
    sizes = sorted(abs(math.exp(error) - 1) * 100 for error in found)
    return (
        statistics.median(sizes),
        sizes[math.ceil(0.9 * len(sizes)) - 1],
        (math.exp(statistics.median(found)) - 1) * 100,
    )


def table(
    rows: Sequence[Row], label: Callable[[Row], str], found: Callable[[Row], Errors]
) -> dict[str, dict[str, list[float]]]:
    """Errors by label and quantity."""
    result: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, error in found(row).items():
            result.setdefault(label(row), {}).setdefault(name, []).append(error)
    return result


def show(title: str, errors_of: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Print one table."""
    print(f"{title:<48}" + "".join(f"{name:>30}" for name in QUANTITIES))
    for label in sorted(errors_of):
        cells = []
        for name in QUANTITIES:
            found = errors_of[label].get(name)
            cells.append("{:3d} rows {:4.0f} {:4.0f} {:+5.0f}".format(len(found), *summary(found)) if found else "")
        print(f"{label:<48}" + "".join(f"{cell:>30}" for cell in cells))


def changed(constants: Efficiency, values: Mapping[str, float]) -> Efficiency:
    """The same constants but for those."""
    return constants.model_copy(
        update={name: Constant(value=value, source="fit", date="2026-11") for name, value in values.items()}
    )


def calibrate(rows: Sequence[Row]) -> Efficiency:
    """The most likely constants: least squares of the logarithms, with priors (Levenberg-Marquardt).

    A row that is far out counts as one that is three times as noisy as others, whatever its distance.
    """
    priors: dict[str, list[float]] = READING["priors"]
    names = list(priors)

    def residuals(logs: Sequence[float]) -> list[float]:
        constants = changed(efficiency(), {name: math.exp(log) for name, log in zip(names, logs, strict=True)})
        far = [error / NOISE[name] for row in rows for name, error in errors(row, constants).items()]
        drift = [(log - math.log(priors[name][0])) / priors[name][1] for name, log in zip(names, logs, strict=True)]
        return [3 * math.atan(value / 3) for value in far] + drift

    logs = [math.log(priors[name][0]) for name in names]
    now, damping = residuals(logs), 1e-2
    for _ in range(60):
        columns = []
        for index in range(len(names)):
            moved = [log + (SMALL_STEP if other == index else 0) for other, log in enumerate(logs)]
            columns.append([(b - a) / SMALL_STEP for a, b in zip(now, residuals(moved), strict=True)])
        step = _solve(columns, now, damping)
        trial = [log + part for log, part in zip(logs, step, strict=True)]
        there = residuals(trial)
        if sum(value * value for value in there) < sum(value * value for value in now):
            logs, now, damping = trial, there, damping / 3
            if max(map(abs, step)) < SMALL_STEP:
                break
        else:
            damping *= 4
    return changed(efficiency(), {name: math.exp(log) for name, log in zip(names, logs, strict=True)})


def _solve(columns: Sequence[Sequence[float]], values: Sequence[float], damping: float) -> list[float]:
    """The damped Gauss-Newton step, by elimination."""
    size = range(len(columns))
    matrix = [
        [sum(a * b for a, b in zip(one, other, strict=True)) for other in columns]
        + [-sum(a * b for a, b in zip(one, values, strict=True))]
        for one in columns
    ]
    for i in size:
        matrix[i][i] *= 1 + damping
    for i in size:
        pivot = matrix[i]
        for j in size:
            if j != i:
                factor = matrix[j][i] / pivot[i]
                matrix[j] = [a - factor * b for a, b in zip(matrix[j], pivot, strict=True)]
    return [matrix[i][-1] / matrix[i][i] for i in size]


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, nargs="?", default=default_table())
    parser.add_argument("--calibrate", action="store_true")
    options = parser.parse_args()
    if options.table is None:
        sys.exit("vllm-throughput.csv is not here: name it")
    rows = read(options.table)
    print(
        "Each cell: rows, then in percent the median error, the error of nine in ten, and the median with its sign.\n"
    )
    with_constants = {row.name: errors(row, efficiency()) for row in rows}
    show("catalog/efficiency.yaml", table(rows, lambda row: row.group, lambda row: with_constants[row.name]))
    scored = [row for row in rows if row.group == "scored"]
    show("\nscored", table(scored, lambda row: row.source, lambda row: with_constants[row.name]))
    former = [row for row in rows if row.group == "former engine"]
    show(
        "\nformer engine",
        table(
            former,
            lambda row: f"{row.engine.gpu.product} x{row.engine.tensor_parallel_size}",
            lambda row: with_constants[row.name],
        ),
    )
    if options.calibrate:
        best = calibrate(scored)
        print("\ncalibrated on all that are scored:")
        for name in READING["priors"]:
            print(f"  {name}: {getattr(best, name).value:.3g}")
        without = {
            source: calibrate([row for row in scored if row.source != source])
            for source in {row.source for row in scored}
        }
        left_out = table(scored, lambda row: row.source, lambda row: errors(row, without[row.source]))
        show("\neach source predicted from the others", left_out)
        show("", table(scored, lambda _: "all", lambda row: errors(row, without[row.source])))


if __name__ == "__main__":
    main()
