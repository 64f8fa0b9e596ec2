"""The monitor's bundle: Prometheus, Alertmanager and, where there is one, Grafana."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infra.paths import NODECONFIG
from infra.plan.model import EnginePlan, FleetPlan
from infra.render.bundle import Bundle, Layout, Program, templates

LOOPBACK = "127.0.0.1"

EXPORTERS = (("machine", 9100), ("gpu", 9400))
"""Jobs of what images/ puts on engine nodes: node exporter and DCGM exporter, at their usual ports."""

PERCENTILE_WINDOWS = 10
"""Alert windows that a rate or a percentile is taken over: enough requests for a 95th percentile to mean something."""


Slot = tuple[str, EnginePlan]
"""Name of a pool, and an engine that each of its nodes has."""


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


def _render(plan: FleetPlan, name: str, slots: Sequence[Slot] = ()) -> str:
    own_image = plan.on_aws is not None and plan.on_aws.engine_image is not None
    values: dict[str, Any] = {
        "region": plan.region,
        "slots": slots,
        "exporters": EXPORTERS if own_image else (),
        "stack": plan.stack,
        "models": plan.models,
        "engines": plan.engines,
        "gateway": plan.gateway,
        "agent": plan.agent,
        "monitor": plan.monitor,
        "timings": plan.timings,
        "percentile_window_s": PERCENTILE_WINDOWS * plan.timings.alert_window_s,
    }
    return templates().get_template(f"monitoring/{name}").render(values)
