"""How soon a preview says what a stack costs, and whether that depends on the size of the fleet.

    toolchain/run python bench/preview.py [--pairs 5]

1. Without credentials of AWS: `fleet plan` of a stack, and `pulumi preview` until the plan's first line is there. Exit
   code 1 where either takes longer than 10 s, or the preview does not say what is wrong, or shows a trace.
2. `pulumi preview` of 10 nodes and of 1,000, in turn, against a stand-in for AWS (tests/aws/standin.py says what that
   needs). Nothing is deployed. Exit code 1 where the median of the pairs' ratios is above 1.1.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.aws.standin import PROD, Stack, StandIn, a_stack, stand_in  # noqa: E402 - needs the path

LONGEST_S = 10.0
LARGEST_RATIO = 1.1
SIZES = (10, 1000)
PER_NODE = {"chat": 4, "fast": 8}
"""Engines of a model on one node."""
FIRST_LINE = "stack prod on aws"


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="of previews, one of each size")
    pairs = parser.parse_args().pairs
    print(f"load average before: {_load()}")
    good = without_credentials()
    good &= by_size(pairs)
    print(f"load average after: {_load()}")
    sys.exit(not good)


def without_credentials() -> bool:
    """The first figure; whether it is good."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "infra.cli", "plan", "-s", "prod"]
    done = subprocess.run(command, cwd=ROOT, env=_anonymous(os.environ), capture_output=True, text=True, check=False)
    plan_s = time.perf_counter() - started
    said = done.returncode == 0 and FIRST_LINE in str(done.stdout)
    with a_stack("prod", StandIn(""), PROD) as stack:
        stack.environment = {**_anonymous(stack.environment), "HOME": str(stack.folder)}
        first_s, whole_s, text = _until_told(stack)
    clear = "there are no credentials of AWS" in text and "Traceback" not in text
    print(f"without credentials: `fleet plan` {plan_s:.1f} s{'' if said else ', and it FAILED'}")
    print(f"without credentials: `pulumi preview` says the plan after {first_s:.1f} s (at most {LONGEST_S})")
    print(f"    and ends after {whole_s:.1f} s, {'with a clear message' if clear else 'WITHOUT a clear message'}")
    return bool(said and clear) and max(plan_s, first_s) <= LONGEST_S


def by_size(pairs: int) -> bool:
    """The second figure; whether it is good."""
    wall: dict[int, list[float]] = {nodes: [] for nodes in SIZES}
    cpu: dict[int, list[float]] = {nodes: [] for nodes in SIZES}
    with ExitStack() as all_of_it:
        aws = all_of_it.enter_context(stand_in())
        stacks = {nodes: all_of_it.enter_context(a_stack("prod", aws, _config(nodes))) for nodes in SIZES}
        for stack in stacks.values():  # the first of each compiles what it imports
            stack.preview()
        for number in range(pairs):
            for nodes in SIZES if number % 2 else reversed(SIZES):  # whatever else the machine does hits both
                started, used = time.perf_counter(), _cpu_s()
                stacks[nodes].preview()
                wall[nodes].append(time.perf_counter() - started)
                cpu[nodes].append(_cpu_s() - used)
    print("nodes  median s   min s   max s   median CPU s")
    for nodes in SIZES:
        times = f"{statistics.median(wall[nodes]):8.2f}  {min(wall[nodes]):6.2f}  {max(wall[nodes]):6.2f}"
        print(f"{nodes:5}  {times}   {statistics.median(cpu[nodes]):12.2f}")
    ratio = _ratio("", wall)
    _ratio("of CPU time, which other work on the machine hardly changes: ", cpu)
    return ratio <= LARGEST_RATIO


def _ratio(of: str, times: dict[int, list[float]]) -> float:
    few, many = (times[nodes] for nodes in SIZES)
    ratios = [large / small for small, large in zip(few, many, strict=True)]
    median = statistics.median(ratios)
    print(f"{of}median ratio {median:.3f} (at most {LARGEST_RATIO}) of {', '.join(f'{it:.3f}' for it in ratios)}")
    return median


def _cpu_s() -> float:
    """What processes that have ended since used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _config(nodes: int) -> dict[str, Any]:
    """The same models and pools on so many nodes."""
    half = nodes // 2
    models: dict[str, Any] = {
        "chat": {
            "weights": "llama-3.3-70b-instruct",
            "quantization": "8bit",
            "tensor-parallel-size": 2,
            "pool": "h100",
        },
        "fast": {"weights": "qwen2.5-7b-instruct", "pool": "a100"},
    }
    for name, model in models.items():
        model |= {"context": 16384, "max-answer": 4096, "engines": half * PER_NODE[name]}
    pools = {
        "h100": {"gpu": "h100-80gb", "instance": "p5.48xlarge", "zones": 2, "nodes": half},
        "a100": {"gpu": "a100-40gb", "zones": 2, "nodes": half, "capacity": ["on-demand", {"spot": 0.7}]},
    }
    return {**PROD, "models": models, "pools": pools, "budget": {"usd_per_hour": 1_000_000}}


def _until_told(stack: Stack) -> tuple[float, float, str]:
    """Seconds until the plan is on the screen and until the end of a preview, and all that it said."""
    command = ["pulumi", "preview", "--stack", stack.name, "--non-interactive", "--color=never"]
    started, first = time.perf_counter(), float("inf")
    lines = []
    for line in _lines(command, stack):
        lines.append(line)
        if FIRST_LINE in line:
            first = min(first, time.perf_counter() - started)
    return first, time.perf_counter() - started, "".join(lines)


def _lines(command: list[str], stack: Stack) -> Iterator[str]:
    with subprocess.Popen(
        command,
        cwd=stack.project,
        env=stack.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield from process.stdout or ()


def _anonymous(environment: Any) -> dict[str, str]:
    """Without anything of AWS, and without asking whether this is a machine of AWS."""
    kept = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
    return {**kept, "AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "", "AWS_CONFIG_FILE": ""}


def _load() -> str:
    return " ".join(f"{it:.1f}" for it in os.getloadavg()) + f", {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
