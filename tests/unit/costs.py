"""Machines, models and prices that costs are made of, small and fixed."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from infra.plan.cost import Rented, Served, Traffic
from infra.plan.model import PoolPlan, RungPlan, SpeedPlan

H100 = Rented("h100", "p5.48xlarge", 2, 55.04, "us-east-1, on demand", gpus=8)
GATEWAY = Rented("gateway", "c7i.large", 2, 0.09, "us-east-1")
MONITOR = Rented("monitor", "m7i.large", 1, 0.10, "us-east-1")
TRAFFIC = Traffic(requests=1_000_000, prompt_tokens=1000, answer_tokens=200)


def speed(requests_s: float = 2.0, prefill_tokens_s: float = 10_000.0, **changes: Any) -> SpeedPlan:
    values: dict[str, Any] = {"ttft_s": 0.2, "ttft_p95_s": 0.3, "tpot_s": 0.02, "tpot_p95_s": 0.03}
    values |= {"output_tokens_s": requests_s * 200, "prefill_tokens_s": prefill_tokens_s, "requests_s": requests_s}
    return SpeedPlan(**values | {"measured": False, "error_percent": 30, "basis": "roofline"} | changes)


def served(model: str = "chat", pool: str = "h100", engines: int = 8, gpus: int = 1, **changes: Any) -> Served:
    return Served(model, pool, engines, gpus, changes.get("speed", speed()), changes.get("traffic", TRAFFIC))


def pool(**changes: Any) -> PoolPlan:
    rung = RungPlan(kind="spot", id=None, instances=("g6.xlarge",), zones=("z",), usd_per_hour=0.5, basis="at most")
    values: dict[str, Any] = {"name": "l4", "gpu": "l4-24gb", "instance": "g6.xlarge", "nodes": 3, "gpus_per_node": 1}
    values |= {"slots": (), "engines": (), "zones": ("z",), "rungs": (rung,), "weights_bytes": 1, "volume_bytes": 1}
    return PoolPlan(**values | {"weights_on": "nvme", "min_healthy_percent": 66, "usd_per_hour": 1.5} | changes)


def text(view: Any) -> str:
    console = Console(width=200, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()
