"""Plans made by hand, so that rendering is tested without the planner."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.plan.model import (
    AgentPlan,
    AlertThresholds,
    EnginePlan,
    FleetPlan,
    GatewayPlan,
    MemoryPlan,
    ModelPlan,
    MonitorPlan,
    Timings,
)
from infra.render.bundle import Layout

KEY = "sk-fleet-test-key"
KEYS = (("team-a", hashlib.sha256(KEY.encode()).hexdigest()),)

TIMINGS = Timings(
    longest_generation_s=120,
    drain_s=120,
    shutdown_s=15,
    stop_s=30,
    start_s=300,
    warmup_request_s=60,
    poll_ms=200,
    probe_timeout_ms=800,
    wedged_s=20,
    crash_loop_restarts=3,
    crash_loop_window_s=600,
    check_ms=300,
    check_fast_ms=100,
    check_timeout_ms=8000,
    check_fall=2,
    check_rise=1,
    connect_ms=1000,
    queue_s=30,
    server_s=900,
    client_s=60,
    request_s=30,
    keep_alive_s=75,
    gateway_stop_s=120,
    scrape_s=5,
    alert_window_s=30,
    retention="7d",
)


def counter(first: int) -> Callable[[], int]:
    """Ports for files that nobody binds."""
    ports = iter(range(first, 65536))
    return lambda: next(ports)


def a_plan(
    models: Sequence[str] = ("chat",),
    engines: int = 2,
    *,
    port: Callable[[], int] | None = None,
    timings: Mapping[str, Any] | None = None,
    gateway: Mapping[str, Any] | None = None,
) -> FleetPlan:
    """A plan: `engines` of each model, each port from `port()`, timings and gateway with single fields replaced."""
    port = port or counter(8000)
    balancer = GatewayPlan(
        proxy="haproxy",
        bind="127.0.0.1",
        port=port(),
        stats_port=port(),
        routing="least-loaded",
        maxconn=1000,
        server_maxconn=tuple((model, 16) for model in models),
        queue=64,
        max_body_bytes=4 * 2**20,
        buffer_bytes=256 * 2**10,
        route_by_body=len(models) > 1,
        keys=KEYS,
    )
    return FleetPlan(
        stack="test",
        target="local",
        vllm_version="0.32.0",
        models=tuple(
            ModelPlan(
                name=model,
                weights=f"{model}-weights",
                base_weights=f"{model}-weights",
                quantization="none",
                format="bf16",
                dtype="float32",
                context=2048,
                concurrency=8,
                queued=16,
                kv_cache_bytes=2**28,
                engine_memory_bytes=2**31,
            )
            for model in models
        ),
        engines=tuple(
            EnginePlan(name=f"{model}-{n}", model=model, port=port(), flags=(), environment=())
            for model in models
            for n in range(engines)
        ),
        gateway=balancer.model_copy(update=dict(gateway or {})),
        agent=AgentPlan(port=port()),
        monitor=MonitorPlan(
            prometheus_port=port(),
            alertmanager_port=port(),
            grafana_port=port(),
            thresholds=AlertThresholds(ttft_p95_s=2.0, queue_waiting=8),
        ),
        timings=TIMINGS.model_copy(update=dict(timings or {})),
        memory=MemoryPlan(available=2**34, services=2**29, engines=2**32, total=2**32 + 2**29),
    )


def a_layout(root: Path = Path("/srv/fleet/machine"), **programs: Any) -> Layout:
    """A machine whose programs are where `programs` says, else under /opt."""
    paths: dict[str, Any] = {
        name: Path(f"/opt/{name}/bin/{name}") for name in ("haproxy", "prometheus", "alertmanager")
    }
    return Layout(root=root, python=Path("/opt/python/bin/python"), **paths | programs)
