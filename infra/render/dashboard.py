"""The dashboard, as code. `python -m infra.render.dashboard` writes the file that Grafana reads.

The file is kept in the repository: nothing but that command needs the SDK, and no `pulumi preview` waits to import it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infra.paths import NODECONFIG

FILE = NODECONFIG / "monitoring" / "dashboards" / "fleet.json"
DATASOURCE = "prometheus"
"""Its uid; nodeconfig/monitoring/grafana/datasource.yml.j2 provides it."""
ROW_HEIGHT = 8


@dataclass(frozen=True)
class _Panel:
    title: str
    description: str
    unit: str
    """As Grafana names units."""
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend)."""
    width: int = 8
    kind: Literal["lines", "number", "states"] = "lines"


def _quantiles(histogram: str) -> tuple[tuple[str, str], ...]:
    """Median and 95th percentile of one of vLLM's histograms, by model."""
    buckets = f"sum by (model, le) (rate({histogram}_bucket[$__rate_interval]))"
    return tuple((f"histogram_quantile({q}, {buckets})", f"{{{{model}}}} {name}") for q, name in _QUANTILES)


_QUANTILES = (("0.5", "p50"), ("0.95", "p95"))

PANELS = (
    _Panel(
        "Ready engines",
        "Engines that the agent calls ready.",
        "none",
        (("model:engines_ready:sum", "{{model}}"),),
        width=4,
        kind="number",
    ),
    _Panel(
        "Alerts firing",
        "Each has a page in runbooks/alerts/.",
        "none",
        # Nothing is what there should be, and Prometheus has no series for it.
        (('count(ALERTS{alertstate="firing"}) or vector(0)', "alerts"),),
        width=4,
        kind="number",
    ),
    _Panel(
        "Engine states",
        "One row for each state that an engine was in.",
        "none",
        (("sum by (engine, state) (fleet_engine_state) == 1", "{{engine}} {{state}}"),),
        width=16,
        kind="states",
    ),
    _Panel(
        "Requests",
        "Running in engines; waiting in engines or in the gateway.",
        "none",
        (("model:requests_running:sum", "{{model}} running"), ("model:requests_waiting:sum", "{{model}} waiting")),
    ),
    _Panel(
        "Time to first token",
        "In the engine; the wait in the gateway comes on top.",
        "s",
        _quantiles("vllm:time_to_first_token_seconds"),
    ),
    _Panel(
        "Time per output token",
        "Between two tokens of one stream.",
        "s",
        _quantiles("vllm:inter_token_latency_seconds"),
    ),
    _Panel(
        "Generated tokens",
        "Tokens a second, by engine.",
        "none",
        (("sum by (engine) (rate(vllm:generation_tokens_total[$__rate_interval]))", "{{engine}}"),),
    ),
    _Panel(
        "Gateway responses",
        "Responses a second to clients, by class of status.",
        "reqps",
        (
            (
                'sum by (code) (rate(haproxy_frontend_http_responses_total{proxy="clients"}[$__rate_interval]))',
                "{{code}}",
            ),
        ),
    ),
    _Panel(
        "Gateway queue",
        "Requests that wait in the gateway for an engine.",
        "none",
        (('sum by (model) (haproxy_backend_current_queue{model!=""})', "{{model}}"),),
    ),
    _Panel(
        "KV-cache usage",
        "When it is full, requests wait or are preempted.",
        "percentunit",
        (("max by (engine) (vllm:kv_cache_usage_perc)", "{{engine}}"),),
        width=12,
    ),
    _Panel(
        "Engine starts",
        "Processes that an engine has had: updates, and crashes.",
        "none",
        (("sum by (engine) (fleet_engine_starts_total)", "{{engine}}"),),
        width=12,
    ),
)


def queries(dashboard: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every query of a dashboard, as (title of its panel, PromQL)."""
    return [(panel["title"], target["expr"]) for panel in _panels(dashboard) for target in panel.get("targets", [])]


def _panels(parent: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for panel in parent.get("panels") or []:
        yield panel
        yield from _panels(panel)


def build() -> str:
    """The dashboard as JSON, the same for the same code."""
    from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries  # noqa: PLC0415
    from grafana_foundation_sdk.cog.encoder import JSONEncoder  # noqa: PLC0415
    from grafana_foundation_sdk.models.common import (  # noqa: PLC0415
        BigValueGraphMode,
        LegendDisplayMode,
        LegendPlacement,
        TooltipDisplayMode,
        VisibilityMode,
    )
    from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef  # noqa: PLC0415

    source = DataSourceRef(type_val="prometheus", uid=DATASOURCE)
    legend = common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST)  # noqa: FBT003 - the SDK's
    legend = legend.placement(LegendPlacement.BOTTOM)
    made = (
        dashboard.Dashboard("Fleet")
        .uid("fleet")
        .description("Engines, gateway and what users feel, on one page.")
        .tags(["vllm-fleet"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-30m", "now")
        .refresh("10s")
        .timezone("browser")
    )
    for panel in PANELS:
        builder: timeseries.Panel | stat.Panel | statetimeline.Panel
        if panel.kind == "lines":
            builder = timeseries.Panel().min(0).fill_opacity(10).legend(legend)
            builder.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        elif panel.kind == "number":
            builder = stat.Panel().graph_mode(BigValueGraphMode.AREA)
        else:
            builder = statetimeline.Panel().show_value(VisibilityMode.NEVER)
        builder.title(panel.title).description(panel.description).unit(panel.unit).datasource(source)
        builder.span(panel.width).height(ROW_HEIGHT)
        for letter, (expression, name) in zip("ABCDEF", panel.queries, strict=False):
            query = prometheus.Dataquery().expr(expression).legend_format(name).ref_id(letter).range()
            builder.with_target(query.datasource(source))
        made.with_panel(builder)
    return json.dumps(made.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
