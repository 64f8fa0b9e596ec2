"""Tables and targets, from what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gateway.measure import PLAIN, ROUTER_POLICIES

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]
OURS, NEAREST = "haproxy, 3 models", "vllm-router, nearest to ours"
SATURATED = 0.9
"""A core that was busy for so large a part of the time was the limit."""


@dataclass(frozen=True)
class Target:
    """A promise and what became of it."""

    part: str
    """The measurement that it is about."""
    what: str
    measured: float | None
    """None: it could not be measured."""
    limit: float
    unit: str = "x"
    binding: bool = True
    """Decides over the exit code. The others are for information."""

    @property
    def met(self) -> bool:
        """It was measured, and is good."""
        return self.measured is not None and self.measured <= self.limit

    @property
    def verdict(self) -> str:
        """In a word."""
        return "not measured" if self.measured is None else "met" if self.met else "MISSED"


def ratio(found: Found, table: str, column: str, upper: str, lower: str) -> float | None:
    """One value divided by another, where there are both."""
    rows = found.get(table, {})
    if upper not in rows or lower not in rows:
        return None
    return float(rows[upper][column] / rows[lower][column])


def targets(found: Found) -> list[Target]:
    """Those of the gateway that is the default, then the same for information about nginx."""
    rows = found.get("skew", {})
    routers = [rows[name]["p95_ms"] for policy in ROUTER_POLICIES if (name := f"vllm-router, {policy}") in rows]
    listed = []
    for proxy, binding in (("haproxy", True), ("nginx", False)):
        full = f"{proxy}, {'3 models' if binding else '1 model'}"  # nginx routes by no body
        least = f"{proxy}, least-loaded"
        for other, counts in (("nearest to ours", binding), ("as it comes", False), ("cheapest", False)):
            value = ratio(found, "cost", "us_per_request", full, f"vllm-router, {other}")
            listed.append(Target("cost", f"{proxy}: CPU per request / vllm-router, {other}", value, 0.5, "x", counts))
        added = found.get("first-token", {}).get(full, {}).get("added_p50_ms")
        listed.append(Target("first-token", f"{proxy}: added to the first token, p50", added, 0.3, "ms", binding))
        value = ratio(found, "skew", "p95_ms", least, f"{proxy}, {PLAIN}")
        listed.append(
            Target("skew", f"{proxy}: p95 first token under skew, least-loaded / round-robin", value, 0.1, "x", binding)
        )
        best = rows[least]["p95_ms"] / min(routers) if least in rows and routers else None
        listed.append(Target("skew", f"{proxy}: the same / vllm-router's best policy", best, 1.0, "x", binding))
        value = ratio(found, "cost", "us_per_request", f"{proxy}, 64 engines", f"{proxy}, 1 model")
        listed.append(Target("cost", f"{proxy}: CPU per request, 64 engines / 1", value, 1.1, "x", binding))
    value = ratio(found, "cost", "us_per_request", "vllm-router, 64 engines", "vllm-router, cheapest")
    listed.append(Target("cost", "vllm-router: CPU per request, 64 engines / 1", value, 1.1, "x", binding=False))
    return listed


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown that is also readable as it is."""
    widths = [max(len(row[n]) for row in [head, *rows]) for n in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cost(found: Found) -> str:
    base = found["cost"].get(NEAREST, {}).get("us_per_request")
    rows = []
    for name, row in found["cost"].items():
        saturated = row["core_busy"] >= SATURATED
        one_core = f"{row['rps']:,.0f}" if saturated else f"~{1e6 / row['us_per_request']:,.0f}"
        times = f"{row['us_per_request'] / base:.2f}" if base else "-"
        rows.append(
            [
                name,
                f"{row['us_per_request']:.1f} ± {row['spread_us'] / 2:.1f}",
                times,
                f"{row['rps']:,.0f}",
                f"{row['core_busy']:.0%}",
                one_core,
                str(row["failed"]),
            ]
        )
    head = ["CPU per request", "us", "x nearest", "requests/s", "core busy", "of one core", "failed"]
    return table(head, rows)


def _first(found: Found) -> str:
    rows = [
        [name, *(f"{row[c]:.3f}" if c in row else "-" for c in ("p50_ms", "p99_ms", "added_p50_ms", "added_p99_ms"))]
        for name, row in found["first-token"].items()
    ]
    return table(["time to the first token, ms", "p50", "p99", "added p50", "added p99"], rows)


def _tokens(found: Found) -> str:
    rows = [
        [name, f"{row['us_per_token']:.1f}", f"{row['tokens_per_s']:,.0f}", str(row["broken"])]
        for name, row in found["tokens"].items()
    ]
    return table(["256 streams", "us CPU per token", "tokens/s", "broken"], rows)


def _memory(found: Found) -> str:
    columns = ("idle_mib", "mib", "kib_per_stream", "mib_at_10000")
    rows = [
        [name, f"{row['streams']:,}", *(f"{row[column]:.1f}" for column in columns), str(row["broken"])]
        for name, row in found["memory"].items()
    ]
    head = ["memory, PSS", "idle streams", "MiB without", "MiB with", "KiB each", "MiB at 10,000", "broken"]
    return table(head, rows)


def _skew(found: Found) -> str:
    rows = []
    for name, row in found["skew"].items():
        base = found["skew"].get(f"{name.split(',')[0]}, {'round_robin' if 'router' in name else PLAIN}")
        times = f"{row['p95_ms'] / base['p95_ms']:.3f}" if base else "-"
        rows.append([name, *(f"{row[c]:,.0f}" for c in ("p50_ms", "p95_ms", "p99_ms")), times, str(row["failed"])])
    return table(["first token under skew, ms", "p50", "p95", "p99", "p95 x plain round robin", "failed"], rows)


def _targets(found: Found) -> str:
    rows = [
        [
            one.what,
            "-" if one.measured is None else f"{one.measured:.3f} {one.unit}",
            f"{one.limit:g} {one.unit}",
            one.verdict if one.binding else f"({one.verdict})",
        ]
        for one in targets(found)
        if one.binding or one.measured is not None
    ]
    return table(["target", "measured", "at most", ""], rows)


def text(found: Found, skipped: Mapping[str, str], facts: Mapping[str, str]) -> str:
    """Everything, to be printed or put into a document."""
    parts = {"cost": _cost, "first-token": _first, "tokens": _tokens, "memory": _memory, "skew": _skew}
    said = [", ".join(f"{name} {value}" for name, value in facts.items())]
    said += [make(found) for name, make in parts.items() if found.get(name)]
    if skipped:
        said.append("\n".join(f"Not measured: {name}: {reason}" for name, reason in skipped.items()))
    return "\n\n".join([*said, _targets(found)])


def machine() -> dict[str, str]:
    """What it was measured on."""
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": f"{os.cpu_count()} ({cpu})",
        "memory": f"{pages / 2**30:.0f} GiB",
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }
