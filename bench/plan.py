"""How long `fleet plan` takes, and whether that depends on the size of the fleet: `python bench/plan.py`.

Runs the whole command, in turn on a stack of 1 node and on one of 1,000, and compares the medians. Exits with 1 if the
large one takes more than a tenth longer, or a whole command more than a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STACK = """
config:
  aws:region: us-east-1
  vllm-fleet:target: aws
  vllm-fleet:models:
    chat: {{weights: llama-3.1-8b-instruct, tensor-parallel-size: 1, engines: {nodes}}}
  vllm-fleet:pools:
    p: {{instance: p5.4xlarge}}
"""
LONGEST_S = 1.0
LARGEST_RATIO = 1.1


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="of each stack")
    runs = parser.parse_args().runs
    sizes = (1, 1000)
    with tempfile.TemporaryDirectory() as folder:
        for nodes in sizes:
            (Path(folder) / f"Pulumi.nodes{nodes}.yaml").write_text(STACK.format(nodes=nodes))
        times: dict[int, list[float]] = {nodes: [] for nodes in sizes}
        for _ in range(runs):
            for nodes in sizes:  # in turn: whatever else the machine does hits both
                times[nodes].append(_run(folder, nodes))
    medians = {nodes: statistics.median(times[nodes]) for nodes in sizes}
    print("nodes  median s   min s   max s")
    for nodes in sizes:
        print(f"{nodes:5}  {medians[nodes]:8.3f}  {min(times[nodes]):6.3f}  {max(times[nodes]):6.3f}")
    ratio = medians[1000] / medians[1]
    print(f"ratio {ratio:.3f} (at most {LARGEST_RATIO})")
    print(f"longest median {max(medians.values()):.3f} s (at most {LONGEST_S})")
    sys.exit(ratio > LARGEST_RATIO or max(medians.values()) > LONGEST_S)


def _run(stacks: str, nodes: int) -> float:
    command = [sys.executable, "-m", "infra.cli", "plan", "-s", f"nodes{nodes}"]
    started = time.perf_counter()
    environ = os.environ | {"FLEET_STACKS": stacks}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
