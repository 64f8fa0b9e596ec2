"""The tools that a local stack runs, found on PATH or in the toolchain; set-up puts there what was missing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from infra.findings import Finding
from infra.paths import engine_dir, toolchain_dir
from infra.plan.model import FleetPlan

SET_UP = "run `make setup`"
SET_UP_NGINX = "run `toolchain/run python -m toolchain install --only nginx`"


@dataclass(frozen=True)
class Tools:
    """Programs by path; None where there is none."""

    haproxy: Path | None
    prometheus: Path | None
    alertmanager: Path | None
    grafana: Path | None
    nginx: Path | None = None


@cache
def find() -> Tools:
    """Look for every tool, on PATH first."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(toolchain_dir() / "bin")])

    def which(name: str) -> Path | None:
        found = shutil.which(name, path=path)
        return Path(found).resolve() if found else None

    return Tools(
        haproxy=which("haproxy"),
        prometheus=which("prometheus"),
        alertmanager=which("alertmanager"),
        grafana=which("grafana") or which("grafana-server"),
        nginx=which("nginx"),
    )


def missing(plan: FleetPlan) -> list[Finding]:
    """What the plan needs and this machine lacks."""
    tools = find()
    vllm = engine_dir(f"vllm-{plan.vllm_version}") / "bin" / "vllm"
    needed = {
        plan.gateway.proxy: {"haproxy": tools.haproxy, "nginx": tools.nginx}[plan.gateway.proxy],
        "prometheus": tools.prometheus,
        "alertmanager": tools.alertmanager,
        f"vLLM {plan.vllm_version}": vllm if vllm.is_file() else None,
    }
    return [
        Finding("target", f"{name} is not installed", SET_UP_NGINX if name == "nginx" else SET_UP)
        for name, path in needed.items()
        if path is None
    ]
