"""The gateway's bundle: HAProxy's configuration from the plan, and the files that it reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from infra.paths import NODECONFIG
from infra.plan.model import EnginePlan, FleetPlan
from infra.render.bundle import Bundle, Layout, Program, templates

OPERATOR_CONNECTIONS = 16
"""Scrapes and readers of the status page at once."""

LOG_LINE_BYTES = 4096
"""Longest line of the access log: what a pipe takes in one piece, and more than the fields of a line can fill."""

STOP_S = 3600
"""From the stop signal to SIGKILL. HAProxy ends by itself, `hard-stop-after` that signal: this is for one that hangs.
Not taken from the plan, because a changed unit means a restart, and a restart drops what a reload keeps."""

RETURNED = frozenset({"415"})
"""Statuses that HAProxy has no error file for: the configuration returns their body itself."""


@dataclass(frozen=True)
class _Backend:
    """The engines of one model, as HAProxy sees them."""

    name: str
    model: str
    engines: tuple[EnginePlan, ...]
    server_maxconn: int


def gateway(plan: FleetPlan, layout: Layout) -> Bundle:
    """Render the gateway.

    Args:
        plan: the fleet; every number comes from `plan.gateway` and `plan.timings`.
        layout: where the machine's programs are; `haproxy` must be given.

    Returns:
        A bundle of role `gateway` with the one program `haproxy`.

    Raises:
        ValueError: the layout has no `haproxy`.
    """
    if layout.haproxy is None:
        raise ValueError("The gateway needs HAProxy: put its path in Layout.haproxy.")
    return Bundle(
        role="gateway",
        programs=(
            Program(
                name="haproxy",
                command=(
                    "/bin/sh",
                    "slots/haproxy/start.sh",
                    str(layout.haproxy),
                    "-W",
                    "-f",
                    "slots/haproxy/haproxy.cfg",
                ),
                files=_files(plan),
                reload="haproxy",
                # The master passes USR1 on: workers close their listeners, finish their streams and leave, those of
                # earlier reloads too. TERM would cut the streams.
                stop_signal="USR1",
                stop_s=STOP_S,
            ),
        ),
    )


def _files(plan: FleetPlan) -> dict[str, str]:
    """Path in the program's folder to text."""
    errors: dict[str, dict[str, str]] = json.loads((NODECONFIG / "gateway/errors.json").read_text())
    maxconn = dict(plan.gateway.server_maxconn)
    values: dict[str, Any] = {
        "gateway": plan.gateway,
        "timings": plan.timings,
        "agent": plan.agent,
        "keys": plan.gateway.keys,
        "backends": [
            _Backend(f"model-{model.name}", model.name, plan.engines_of(model.name), maxconn[model.name])
            for model in plan.models
        ],
        "error_statuses": sorted(errors.keys() - RETURNED),
        "operator_connections": OPERATOR_CONNECTIONS,
        "log_line_bytes": LOG_LINE_BYTES,
        # Headers and body share the buffer; a quarter is left for what HAProxy keeps beside them.
        "unsized_header_bytes": plan.gateway.buffer_bytes // 4,
        "unsized_body_bytes": min(plan.gateway.buffer_bytes // 2, plan.gateway.max_body_bytes),
        # An engine that gets ready is in rotation after so long; to ask again sooner is no use.
        "retry_after_s": math.ceil((plan.timings.check_ms * plan.timings.check_rise) / 1000),
    }

    def render(name: str, **more: Any) -> str:
        return templates().get_template(f"gateway/{name}").render(values | more)

    files = {name: render(f"{name}.j2") for name in ("haproxy.cfg", "keys.map", "models.map", "servers.state")}
    files["start.sh"] = (NODECONFIG / "gateway/start.sh").read_text()
    files["models.json"] = _models(plan)
    files["errors/unknown-model.json"] = render("unknown-model.json.j2")
    for status, error in errors.items():
        body = json.dumps({"error": {k: error.get(k) for k in ("message", "type", "param", "code")}})
        if status in RETURNED:
            files[f"errors/{status}.json"] = body
        else:
            files[f"errors/{status}.http"] = render(
                "error.http.j2", status=int(status), reason=error["reason"], body=body
            )
    return files


def _models(plan: FleetPlan) -> str:
    """The answer to `GET /v1/models`; `root` and `max_model_len` are vLLM's own additions, which its clients read."""
    return json.dumps(
        {
            "object": "list",
            "data": [
                {
                    "id": model.name,
                    "object": "model",
                    "created": 0,
                    "owned_by": "vllm-fleet",
                    "root": model.weights,
                    "parent": None,
                    "max_model_len": model.context,
                }
                for model in plan.models
            ],
        }
    )
