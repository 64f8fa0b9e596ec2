"""The gateway's bundle with nginx: its configuration from the plan, and the keeper, which does what nginx cannot.

Stock nginx computes no SHA-256 and asks no agent whether an engine is ready. The keeper, a small process on the same
machine, does both: nginx asks it about each key (`auth_request` on a Unix socket), and it marks engines as down in the
file that nginx includes, and has nginx read it again. docs/gateway.md says what nginx does otherwise than HAProxy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from infra.paths import NODECONFIG
from infra.plan.model import EnginePlan, FleetPlan, KeyPlan, ModelPlan
from infra.render.bundle import Bundle, Layout, Program, templates

OPERATOR_CONNECTIONS = 16
"""Scrapes and readers of the status page at once."""

CONNECTIONS_A_REQUEST = 3
"""Of a worker: to the client, to the keeper, to the engine."""

HEADER_BUFFERS, HEADER_BUFFER_BYTES = 4, 16 << 10
"""Of one request, at most; one header fits into one buffer."""

ENGINE_IDLE_S = 2
"""An idle connection to an engine is closed after so long: before the engine does it, which is after 5 s (vLLM's
VLLM_HTTP_TIMEOUT_KEEP_ALIVE). Else a request could be sent into a connection that is being closed."""

IDLE_CONNECTIONS = 256
"""To the engines of one model, kept by one worker."""

KEEPER_CONNECTIONS = 32
"""Kept by one worker."""

ZONE_BYTES, ZONE_ENGINE_BYTES = 128 << 10, 2 << 10
"""Shared memory for what workers know of the engines of one model, and of one engine (1.1 KB measured, nginx 1.22)."""

LIMIT_ZONE_BYTES = 128 << 10
"""Of the keys that share a limit on open requests: a thousand and more."""

TLS_ZONE_BYTES = 10 << 20
"""Of the TLS sessions that are resumed: 40,000. Every request is a connection of its own."""

STOP_S = 3600
"""From the stop signal to SIGKILL. nginx ends by itself, `worker_shutdown_timeout` after that signal: this is for one
that hangs. Not taken from the plan, because a changed unit means a restart."""

SPOOFED = (
    "Forwarded",
    "X-Forwarded-Host",
    "X-Forwarded-Port",
    "X-Forwarded-Prefix",
    "X-Forwarded-Proto",
    "X-Forwarded-Scheme",
    "X-Forwarded-Server",
    "X-Forwarded-Ssl",
    "X-Forwarded-User",
    "X-Real-Ip",
)
"""Headers in which clients could speak for the gateway. nginx cannot drop headers by the beginning of their name."""

GENERATE = ("chat/completions", "completions", "embeddings", "responses")
AUDIO = ("audio/transcriptions", "audio/translations")

ALSO = {400: (412, 414, 421, 494, 495, 496, 497), 501: (505,)}
"""Statuses that nginx alone has, by the error that they are told as."""

MILLISECONDS = {
    "connect_ms": "upstream_connect_time",
    "headers_ms": "upstream_header_time",
    "total_ms": "request_time",
}
"""Fields of the log, by nginx's variable in seconds."""

MODEL = "$fleet_log_model"
UNKNOWN_MODEL = {
    "message": f"The model '{MODEL}' does not exist. GET /v1/models lists those that do.",
    "type": "invalid_request_error",
    "param": "model",
    "code": "model_not_found",
}
NO_MODEL = {
    "message": "There are several models, and this gateway reads it from the path alone: /models/MODEL/v1/...",
    "type": "invalid_request_error",
    "param": "model",
    "code": "bad_request",
}


@dataclass(frozen=True)
class _Backend:
    """The engines of one model, as nginx sees them."""

    name: str
    model: str
    engines: tuple[EnginePlan, ...]
    max_conns: int
    """Requests at one engine at once: those that it runs, and those that it lets wait, as nginx has no queue."""
    idle: int
    zone_bytes: int

    @property
    def pattern(self) -> str:
        """The model's name in a regular expression."""
        return re.escape(self.model)


@dataclass(frozen=True)
class _Limit:
    """Keys that may have the same number of requests open."""

    concurrency: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Error:
    """A page of nginx's, and the statuses that it is for."""

    status: int
    statuses: tuple[int, ...]


def nginx(plan: FleetPlan, layout: Layout) -> Bundle:
    """Render the gateway for nginx.

    Args:
        plan: the fleet; every number comes from `plan.gateway` and `plan.timings`.
        layout: where the machine's programs are; `nginx` must be given.

    Returns:
        A bundle of role `gateway` with the programs `nginx` and `keeper`.

    Raises:
        ValueError: the layout has no `nginx`, or the plan asks for what nginx cannot do: the planner refuses it.
    """
    if layout.nginx is None:
        raise ValueError("The gateway needs nginx: put its path in Layout.nginx.")
    if plan.gateway.discovery != "static" or plan.gateway.routing == "prefix-affinity":
        raise ValueError("nginx finds no engines by SRV records and routes by no prefix.")
    return Bundle("gateway", (_keeper(plan, layout), _nginx(plan, layout)))


def _keeper(plan: FleetPlan, layout: Layout) -> Program:
    timings = plan.timings
    settings = {
        "agent_port": plan.agent.port,
        "engines": [{"name": e.name, "model": e.model, "port": e.port} for e in plan.engines],
        "check_ms": timings.check_ms,
        "check_fast_ms": timings.check_fast_ms,
        "check_timeout_ms": timings.check_timeout_ms,
        "check_fall": timings.check_fall,
        "check_rise": timings.check_rise,
        "keys": [key.model_dump(mode="json", exclude={"concurrency"}) for key in _keys(plan)],
    }
    return Program(
        name="keeper",
        command=(str(layout.python), "slots/keeper/keeper.py"),
        files={"keeper.json": json.dumps(settings, indent=1, sort_keys=True) + "\n", "keeper.py": _text("keeper.py")},
        # The socket outlives a crash, and what was asked meanwhile is answered by the second process.
        listen=f"unix://{layout.root}/run/keeper.sock",
        standby=True,
        reload="SIGHUP",
    )


def _nginx(plan: FleetPlan, layout: Layout) -> Program:
    return Program(
        name="nginx",
        command=(str(layout.python), "slots/nginx/launch.py", str(layout.nginx)),
        files=_files(plan),
        reload="nginx",
        # Workers close their listeners, finish their streams and leave, those of earlier reloads too.
        stop_signal="QUIT",
        stop_s=STOP_S,
    )


def _keys(plan: FleetPlan) -> tuple[KeyPlan, ...]:
    """Every key with its limits, if it has any."""
    return plan.gateway.key_limits or tuple(KeyPlan(name=name, sha256=sha256) for name, sha256 in plan.gateway.keys)


def _files(plan: FleetPlan) -> dict[str, str]:
    """Path in the program's folder to text."""
    gateway, timings = plan.gateway, plan.timings
    errors: dict[str, dict[str, str]] = json.loads((NODECONFIG / "gateway/errors.json").read_text(encoding="utf-8"))
    backends = [_backend(plan, model) for model in plan.models]
    audio = [backend for backend in backends if backend.model in gateway.audio]
    weights = dict(gateway.server_weights)
    waiting = sum(model.queued * len(plan.engines_of(model.name)) for model in plan.models)
    values: dict[str, Any] = {
        "gateway": gateway,
        "timings": timings,
        "backends": backends,
        "audio": audio,
        "only_model": backends[0].model if len(backends) == 1 else "",
        "paths": [*GENERATE, *(AUDIO if audio else ()), "models"],
        "connections": CONNECTIONS_A_REQUEST * (gateway.maxconn + waiting + OPERATOR_CONNECTIONS),
        "header_buffers": HEADER_BUFFERS,
        "header_buffer_bytes": HEADER_BUFFER_BYTES,
        "keeper_connections": KEEPER_CONNECTIONS,
        "limit_zone_bytes": LIMIT_ZONE_BYTES,
        "tls_zone_bytes": TLS_ZONE_BYTES,
        "engine_idle_s": ENGINE_IDLE_S,
        "weight": {engine.name: weights.get(engine.name, 100) for engine in plan.engines} if weights else None,
        # nginx counts in seconds. Until then the keeper has had its answer, too.
        "fail_s": _seconds(timings.check_ms + timings.check_fast_ms * (timings.check_fall - 1)),
        "retry_after_s": _seconds(timings.check_ms * timings.check_rise),
        "limits": _limits(_keys(plan)),
        "spoofed": SPOOFED,
        "milliseconds": MILLISECONDS,
        "errors": [_Error(status, (status, *ALSO.get(status, ()))) for status in map(int, sorted(errors))],
        "body": {int(status): _body(error) for status, error in errors.items()},
        "unknown_model": _body(UNKNOWN_MODEL),
        "no_model": _body(NO_MODEL),
    }

    def render(name: str) -> str:
        return templates().get_template(f"gateway/nginx/{name}.j2").render(values)

    files = {name: render(name) for name in ("nginx.conf", "engines.conf")}
    files["launch.py"] = _text("launch.py")
    files["models/all.json"] = models_answer(plan.models)
    for key in _keys(plan):
        if key.models is not None:
            files[f"models/of/{key.name}.json"] = models_answer(m for m in plan.models if m.name in key.models)
    return files


def _backend(plan: FleetPlan, model: ModelPlan) -> _Backend:
    engines = plan.engines_of(model.name)
    running = dict(plan.gateway.server_maxconn)[model.name]
    return _Backend(
        name=f"model-{model.name}",
        model=model.name,
        engines=engines,
        max_conns=running + model.queued,
        idle=min(len(engines) * running, IDLE_CONNECTIONS),
        zone_bytes=ZONE_BYTES + ZONE_ENGINE_BYTES * len(engines),
    )


def _limits(keys: Iterable[KeyPlan]) -> list[_Limit]:
    """The limits on open requests, each with its keys: nginx takes no such limit from a variable."""
    named: dict[int, list[str]] = {}
    for key in keys:
        if key.concurrency is not None:
            named.setdefault(key.concurrency, []).append(key.name)
    return [_Limit(concurrency, tuple(sorted(names))) for concurrency, names in sorted(named.items())]


def models_answer(models: Iterable[ModelPlan]) -> str:
    """The answer to `GET /v1/models`; `root` and `max_model_len` are vLLM's own additions, which its clients read."""
    rows = [
        {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "vllm-fleet",
            "root": model.weights,
            "parent": None,
            "max_model_len": model.context,
        }
        for model in models
    ]
    return json.dumps({"object": "list", "data": rows})


def _body(error: dict[str, str]) -> str:
    """An error in OpenAI's shape, as it stands between single quotes in nginx's configuration."""
    text = json.dumps({"error": {k: error.get(k) for k in ("message", "type", "param", "code")}})
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _seconds(milliseconds: float) -> int:
    return math.ceil(milliseconds / 1000)


def _text(name: str) -> str:
    return (NODECONFIG / "gateway/nginx" / name).read_text(encoding="utf-8")
