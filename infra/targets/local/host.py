"""What the `local` target has to know of the machine that it runs on, and the one secret it makes."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from infra.api_key import digest, new_key
from infra.findings import Finding
from infra.paths import stack_dir
from infra.plan.model import FleetPlan, HostFacts

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def read_host() -> HostFacts:
    """Facts of this machine."""
    return HostFacts(
        ram_bytes=min(psutil.virtual_memory().total, *_cgroup_limits()),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        cpu_flags=_cpu_flags(),
        platform=f"{sys.platform}-{platform.machine().lower()}",
    )


def _cgroup_limits() -> Iterable[int]:
    """A container's memory limit; a number larger than any machine where there is none."""
    yield 1 << 62
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            yield int(file.read_text(encoding="ascii"))


def _cpu_flags() -> frozenset[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def default_key_file(stack: str) -> Path:
    """Where the API key is that a local stack makes for itself when its config names none."""
    return stack_dir(stack) / "keys" / "default.key"


def default_api_keys(stack: str) -> dict[str, str]:
    """The name and SHA-256 of that key; it is made if it is not there yet."""
    file = default_key_file(stack)
    try:
        key = file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        key = new_key()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(key + "\n")
        partial.replace(file)
    return {"default": digest(key)}


def ports(plan: FleetPlan) -> dict[str, int]:
    """Every port of a plan, by what listens there."""
    return {
        "gateway": plan.gateway.port,
        "gateway statistics": plan.gateway.stats_port,
        "agent": plan.agent.port,
        "prometheus": plan.monitor.prometheus_port,
        "alertmanager": plan.monitor.alertmanager_port,
        "grafana": plan.monitor.grafana_port,
        **{f"engine {engine.name}": engine.port for engine in plan.engines},
    }


def taken_ports(stack: str, wanted: Mapping[str, int]) -> list[Finding]:
    """Ports that something else than this stack holds."""
    findings = []
    for what, port in wanted.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                owner = _owner(port)
                if owner is None or not _belongs(owner, stack):
                    who = f"{owner.name()} (process {owner.pid})" if owner else "another user's process"
                    problem = f"port {port}, for {what}, is taken by {who}"
                    findings.append(Finding("local.base-port", problem, "stop it, or choose another base-port"))
    return findings


def _owner(port: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return psutil.Process(connection.pid)
    return None


def _belongs(process: psutil.Process, stack: str) -> bool:
    with contextlib.suppress(psutil.Error):
        machine = process.environ().get("FLEET_MACHINE", "")
        return Path(machine).is_relative_to(stack_dir(stack) / "machines")
    return False
