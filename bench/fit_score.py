"""Score the memory predictions against engines that really started, or did not.

    python bench/fit_score.py TABLE.csv --configs DIR

The table is one of observations as `fleet fit` reads it, with the columns that say what came out (kv_tokens, outcome).
Prints the error of KV tokens over the rows that started, and every row whose outcome is called wrongly.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from infra import weights
from infra.fit_csv import predict_file


@dataclass(frozen=True)
class Score:
    """How good the predictions of a table are."""

    rows: int
    predicted: int
    errors: list[float]
    """Of KV tokens, as a part of what was seen, without sign, sorted: rows that started and say their tokens."""
    missed: list[str]
    """Rows that did not start and were said to fit."""
    false_alarms: list[str]
    """Rows that started and were said not to fit."""

    @property
    def median(self) -> float:
        """Of the errors."""
        return statistics.median(self.errors)

    @property
    def p90(self) -> float:
        """Of the errors."""
        return self.errors[min(len(self.errors) - 1, int(0.9 * len(self.errors)))]


def score(table: Path, configs: Path) -> Score:
    """Predict a table and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "predicted.csv"
        count, predicted = predict_file(table, out, configs, weights.load())
        with out.open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["predicted_outcome"]]
    started = [row for row in rows if row["outcome"] == row["predicted_outcome"] == "ok" and row["kv_tokens"]]
    return Score(
        rows=count,
        predicted=predicted,
        errors=sorted(abs(int(row["predicted_kv_tokens"]) / float(row["kv_tokens"]) - 1) for row in started),
        missed=[row["id"] for row in rows if (row["outcome"], row["predicted_outcome"]) == ("misfit", "ok")],
        false_alarms=[row["id"] for row in rows if (row["outcome"], row["predicted_outcome"]) == ("ok", "misfit")],
    )


def main() -> None:
    """Print the score of one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--configs", type=Path, required=True, help="config.json files, named org__name.json")
    options = parser.parse_args()
    found = score(options.table, options.configs)
    print(f"rows {found.rows}, predicted {found.predicted}, with KV tokens {len(found.errors)}")
    print(f"KV tokens: median error {found.median:.1%}, p90 {found.p90:.1%}")
    print(f"misfits not seen: {', '.join(found.missed) or 'none'}")
    print(f"false alarms: {', '.join(found.false_alarms) or 'none'}")


if __name__ == "__main__":
    main()
