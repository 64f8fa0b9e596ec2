"""The monitor's bundle: Prometheus, Alertmanager and, where there is one, Grafana."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.paths import NODECONFIG
from infra.plan.aws import EXPORTER_PORTS
from infra.plan.model import EnginePlan, FleetPlan
from infra.render.bundle import Bundle, Layout, Program, templates

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
"""As Alertmanager names them."""

LOOPBACK = "127.0.0.1"

EXPORTERS = dict(zip(("machine", "gpu"), EXPORTER_PORTS, strict=True))
"""Jobs of what images/ puts on machines: node exporter on all, DCGM exporter on those with GPUs."""
XIDS_OF_PROGRAMS = (13, 31, 43, 45, 68, 109)
"""Xids that a program's own mistake gives: the GPU is well, and the engine that made it ends (NVIDIA's Xid catalog, and
those that its device plugin for Kubernetes takes for no fault of the GPU; 2026-11)."""

PERCENTILE_WINDOWS = 10
"""Alert windows that a rate or a percentile is taken over: enough requests for a 95th percentile to mean something."""


@dataclass(frozen=True)
class Burn:
    """An alert at a pace at which what may fail is used up: over a long window, and over a short one still."""

    factor: float
    """Failures, in what may fail."""
    long: str
    short: str
    severity: str


BURNS = (Burn(14.4, "1h", "5m", "page"), Burn(6, "6h", "30m", "page"), Burn(1, "3d", "6h", "warn"))
"""2 % of what may fail in 30 days in an hour, 5 % in six, 10 % in three days: Google's Site Reliability Workbook,
chapter 5, table 5-8."""

Slot = tuple[str, EnginePlan]
"""Name of a pool, and an engine that each of its nodes has."""


@dataclass(frozen=True)
class MachineLimits:
    """When a machine of a cloud is in need of somebody. Times in seconds, parts of a whole as fractions."""

    starting_s: int
    """A new machine may be without exporters, and fill its disk, for as long as its start may take."""
    gpus: Mapping[str, int]
    """Pool to the GPUs of each of its nodes."""
    gpu_missing_s: int
    """Ten alert windows: the exporter starts anew when the driver does."""
    disk_filling: float = 0.15
    disk_horizon_s: int = 4 * 3600
    disk_window_s: int = 6 * 3600
    """With less than that part free, and full within the horizon if it goes on as in the window: as the mixin of
    node-exporter, critical (2026-11)."""
    disk_full: float = 0.03
    """Likewise, however slowly."""
    clock_s: float = 0.05
    clock_unknown_s: int = 16
    clock_window_s: int = 300
    """An offset that does not shrink; or nobody corrects it, and the kernel has given up to say how far off it may be:
    as the same mixin. Far below the 300 s that AWS allows."""
    oom_window_s: int = 3600
    ecc_window_s: int = 24 * 3600
    """For so long what happened once is told."""
    xids_of_programs: tuple[int, ...] = XIDS_OF_PROGRAMS


def machine_limits(plan: FleetPlan) -> MachineLimits | None:
    """Those of a plan; None where machines are the user's own, or another's."""
    if plan.aws is None:
        return None
    return MachineLimits(
        starting_s=plan.aws.launch_hook_s,
        gpus={pool.name: pool.gpus_per_node for pool in plan.pools},
        gpu_missing_s=PERCENTILE_WINDOWS * plan.timings.alert_window_s,
    )


def monitor(plan: FleetPlan, layout: Layout, slots: Sequence[Slot] = ()) -> Bundle:
    """Render what watches the fleet.

    Args:
        plan: the fleet; every number comes from `plan.monitor` and `plan.timings`.
        layout: where the machine's programs are; `prometheus` and `alertmanager` must be given.
        slots: on AWS, where machines are found by their tags, what engines they have.

    Returns:
        A bundle of role `monitor`: programs `prometheus` and `alertmanager`, and `grafana` if the layout has it.

    Raises:
        ValueError: the layout lacks Prometheus or Alertmanager.
    """
    if layout.prometheus is None or layout.alertmanager is None:
        raise ValueError("Monitoring needs Prometheus and Alertmanager: put their paths in Layout.")
    programs = [
        Program(
            name="prometheus",
            command=(
                str(layout.prometheus),
                "--config.file=slots/prometheus/prometheus.yml",
                "--storage.tsdb.path=data/prometheus",
                f"--storage.tsdb.retention.time={plan.timings.retention}",
                f"--web.listen-address={LOOPBACK}:{plan.monitor.prometheus_port}",
            ),
            files={name: _render(plan, f"{name}.j2", slots) for name in ("prometheus.yml", "rules.yml")},
            reload="SIGHUP",
            stop_s=20,
        ),
        Program(
            name="alertmanager",
            command=(
                str(layout.alertmanager),
                "--config.file=slots/alertmanager/alertmanager.yml",
                "--storage.path=data/alertmanager",
                f"--web.listen-address={LOOPBACK}:{plan.monitor.alertmanager_port}",
                # Alone: no gossip, and no port for it.
                "--cluster.listen-address=",
            ),
            files={"alertmanager.yml": _render(plan, "alertmanager.yml.j2")},
            reload="SIGHUP",
        ),
    ]
    if layout.grafana is not None:
        programs.append(
            Program(
                name="grafana",
                command=("/bin/sh", "slots/grafana/start.sh", str(layout.grafana)),
                files={
                    "start.sh": (NODECONFIG / "monitoring/grafana/start.sh").read_text(encoding="utf-8"),
                    "grafana.ini": _render(plan, "grafana/grafana.ini.j2"),
                    "provisioning/datasources/prometheus.yml": _render(plan, "grafana/datasource.yml.j2"),
                    "provisioning/dashboards/fleet.yml": _render(plan, "grafana/dashboards.yml.j2"),
                    "dashboards/fleet.json": (NODECONFIG / "monitoring/dashboards/fleet.json").read_text(
                        encoding="utf-8"
                    ),
                },
                stop_s=20,
            )
        )
    return Bundle(role="monitor", programs=tuple(programs))


def _hours(plan: FleetPlan) -> list[dict[str, Any]]:
    """Pools that have their nodes in some hours alone, as Alertmanager names these.

    `ready` is when their engines have to be there: a machine boots and loads a model first.
    """
    booting = math.ceil((plan.aws.launch_hook_s if plan.aws else 0) / 60)
    found = []
    for pool in plan.pools:
        if hours := pool.schedule:
            on = [DAYS[day] for day in hours.days]
            found.append(
                {
                    "name": f"pool-{pool.name}-has-no-nodes",
                    "models": "|".join(re.escape(model) for model, _ in pool.engines),
                    "zone": hours.time_zone,
                    "on": on,
                    "off": [day for day in DAYS if day not in on],
                    "ready": hours.later(hours.start, booting),
                    "end": hours.end,
                }
            )
    return found


def _render(plan: FleetPlan, name: str, slots: Sequence[Slot] = ()) -> str:
    values: dict[str, Any] = {
        "region": plan.region,
        "slots": slots,
        "exporters": EXPORTERS,
        "limits": machine_limits(plan),
        "burns": BURNS,
        "stack": plan.stack,
        "hours": _hours(plan),
        "models": plan.models,
        "engines": plan.engines,
        "gateway": plan.gateway,
        "agent": plan.agent,
        "monitor": plan.monitor,
        "timings": plan.timings,
        "percentile_window_s": PERCENTILE_WINDOWS * plan.timings.alert_window_s,
    }
    return templates().get_template(f"monitoring/{name}").render(values)
