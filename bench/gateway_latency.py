"""What the gateway adds to the first token, and whether it lets tokens through one by one, on a fleet that is up.

    toolchain/run python bench/gateway_latency.py [--stack local] [--pairs 100]

Asks the same engine directly and through the gateway in turns, streaming, and prints medians and the ratio of both. A
clump is a token that arrives less than a tenth of the median gap after the one before it: proxies that buffer make
them. Exit code 1 if the gateway adds more than a millisecond at the median, or makes more clumps than the engine.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import sys
import time
import urllib.request

from infra.paths import machine_dir
from infra.targets.local.host import default_key_file

LIMIT_MS = 1.0
CLUMPS = 0.05
TOKENS = 8


def stream(connection: http.client.HTTPConnection, model: str, key: str, number: int) -> list[float]:
    """Seconds from the request to each token, on a connection that stays open, as clients keep theirs."""
    body = json.dumps(
        {"model": model, "prompt": f"{number}:", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    )
    begun = time.perf_counter()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    answer = connection.getresponse()
    if answer.status != http.client.OK:
        sys.exit(f"port {connection.port} answered {answer.status}: {answer.read(300)!r}")
    arrivals = []
    while line := answer.readline():
        if line.startswith(b"data: {"):
            arrivals.append(time.perf_counter() - begun)
    return arrivals


def clumps(runs: list[list[float]]) -> float:
    """Share of tokens that came together with the one before."""
    gaps = [b - a for run in runs for a, b in itertools.pairwise(run)]
    return sum(gap < statistics.median(gaps) / 10 for gap in gaps) / len(gaps)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stack", default="local")
    parser.add_argument("--pairs", type=int, default=100)
    args = parser.parse_args()
    slots = machine_dir(args.stack, "engine") / "slots"
    agent = json.loads((slots / "agent" / "agent.json").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{agent['port']}/engines", timeout=5) as answer:
        engines = json.load(answer)
    gateway = agent["port"] - 10  # the layout of a stack's ports: infra/plan/ports.py
    model, key = engines[0]["model"], default_key_file(args.stack).read_text().strip()
    for other in engines[1:]:  # both ways lead to the same engine
        urllib.request.urlopen(urllib.request.Request(drain(agent, other, "drain"), method="POST"), timeout=5).close()
    try:
        time.sleep(1)  # the gateway hears of it at its next check
        direct: list[list[float]] = []
        through: list[list[float]] = []
        ports = (engines[0]["port"], gateway)
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=120) for port in ports]
        for number in range(args.pairs):
            ways = [(connections[0], direct), (connections[1], through)]
            for place, (connection, runs) in enumerate(ways if number % 2 else reversed(ways)):
                runs.append(
                    stream(connection, model, key, 2 * number + place)
                )  # no prompt twice: nothing comes from a cache
    finally:
        for other in engines[1:]:
            urllib.request.urlopen(
                urllib.request.Request(drain(agent, other, "undrain"), method="POST"), timeout=5
            ).close()
    first = [statistics.median(run[0] for run in runs) * 1000 for runs in (direct, through)]
    added = statistics.median(b[0] - a[0] for a, b in zip(direct, through, strict=True)) * 1000
    shares = [clumps(runs) for runs in (direct, through)]
    print(
        f"first token, median of {args.pairs}: engine {first[0]:.2f} ms, gateway {first[1]:.2f} ms, "
        f"ratio {first[1] / first[0]:.3f}, median of the pairs' differences {added:+.2f} ms"
    )
    print(f"clumped tokens: engine {shares[0]:.2%}, gateway {shares[1]:.2%}")
    return int(added > LIMIT_MS or shares[1] > shares[0] + CLUMPS)


def drain(agent: dict[str, int], engine: dict[str, str], verb: str) -> str:
    """URL that drains an engine, or takes it back."""
    return f"http://127.0.0.1:{agent['port']}/{verb}?engine={engine['engine']}"


if __name__ == "__main__":
    sys.exit(main())
