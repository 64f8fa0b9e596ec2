"""The gateway's bundle: HAProxy's configuration from the plan, and the files that it reads."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from infra.paths import NODECONFIG
from infra.plan.model import EnginePlan, FleetPlan, KeyPlan, ModelPlan
from infra.render.bundle import Bundle, Layout, Program, templates
from infra.render.engine import helper
from infra.render.nginx import nginx

OPERATOR_CONNECTIONS = 16
"""Scrapes and readers of the status page at once."""

LOG_LINE_BYTES = 4096
"""Longest line of the access log: what a pipe takes in one piece, and more than the fields of a line can fill."""

STOP_S = 3600
"""From the stop signal to SIGKILL. HAProxy ends by itself, `hard-stop-after` that signal: this is for one that hangs.
Not taken from the plan, because a changed unit means a restart, and a restart drops what a reload keeps."""

AFFINITY = frozenset({"prefix-affinity", "session"})
"""Ways of routing that hash a part of the request."""

HOT_BUFFERS = 8
"""That a thread keeps: a request has two or three at once. Only what was written to of them takes memory."""

WEIGHT = 100
"""Of an engine that the plan gives none."""

LOCAL_PEER = "gateway"
"""What HAProxy calls itself where it hands the counters of keys to the worker that follows it."""

MINUTE_S = 60

RETURNED = frozenset({"415"})
"""Statuses that HAProxy has no error file for: the configuration returns their body itself."""

STATIC = ("no-model.json", "model-out-of-reach.json")
"""Errors that are the same for every fleet."""


@dataclass(frozen=True)
class _Backend:
    """The engines of one model, as HAProxy sees them."""

    name: str
    model: str
    engines: tuple[EnginePlan, ...]
    server_maxconn: int
    slots: int
    """Servers that there is room for."""
    srv: str | None
    """Name of the SRV records that they are found by; None: they are listed."""


@dataclass(frozen=True)
class _Limits:
    """What keys may do, as HAProxy looks it up: by the name of the key, only those that have the limit."""

    expires: tuple[tuple[str, int], ...]
    """Unix time at which the key's last day is over."""
    rpm: tuple[tuple[str, int], ...]
    concurrency: tuple[tuple[str, int], ...]
    models: tuple[tuple[int, tuple[str, ...]], ...]
    """Each set of models that some key is for, with a number."""
    key_models: tuple[tuple[str, int], ...]
    """The number of that set."""

    @classmethod
    def of(cls, keys: Iterable[KeyPlan]) -> _Limits:
        """The limits of a plan."""
        keys = tuple(keys)
        sets = {models: n for n, models in enumerate(sorted({key.models for key in keys if key.models}), 1)}
        return cls(
            expires=tuple((key.name, _end_of(key.expires)) for key in keys if key.expires),
            rpm=tuple((key.name, key.rpm) for key in keys if key.rpm is not None),
            concurrency=tuple((key.name, key.concurrency) for key in keys if key.concurrency is not None),
            models=tuple((n, models) for models, n in sets.items()),
            key_models=tuple((key.name, sets[key.models]) for key in keys if key.models),
        )

    @property
    def counted(self) -> bool:
        """Whether something is counted for any key."""
        return bool(self.rpm or self.concurrency)

    @property
    def begun_kept_s(self) -> int:
        """A minute is looked at until the next one is over."""
        return 2 * MINUTE_S

    @property
    def begun_entries(self) -> int:
        """For each key as many minutes as are kept, and one that begins."""
        return 3 * len(self.rpm)

    @property
    def open_entries(self) -> int:
        """For each key one, and one for a key of the same number that went."""
        return 2 * len(self.concurrency)

    def maps(self) -> Iterator[tuple[str, str, tuple[tuple[str, int | str], ...]]]:
        """Name, heading and rows of each file that is looked up in."""
        yield "expires.map", "name of the key, Unix time at which its last day is over", self.expires
        yield "rpm.map", "name of the key, requests that it may begin in a minute", self.rpm
        yield "concurrency.map", "name of the key, requests that it may have open at once", self.concurrency
        yield "key-models.map", "name of the key, number of the set of models that it may use", self.key_models
        may = tuple((f"{number}/{model}", model) for number, models in self.models for model in models)
        yield "may-use.map", "number of a set of models / model in it, model", may


def _end_of(day: str) -> int:
    """Unix time at which a day, YYYY-MM-DD in UTC, is over."""
    begins = dt.datetime.combine(dt.date.fromisoformat(day), dt.time(), dt.UTC)
    return int((begins + dt.timedelta(days=1)).timestamp())


def gateway(plan: FleetPlan, layout: Layout) -> Bundle:
    """Render the gateway.

    Args:
        plan: the fleet; every number comes from `plan.gateway` and `plan.timings`.
        layout: where the machine's programs are; `haproxy` must be given.

    Returns:
        A bundle of role `gateway` with the program `haproxy`, and those that it needs on AWS.

    Raises:
        ValueError: the layout has no `haproxy`.
    """
    if plan.gateway.proxy == "nginx":
        return nginx(plan, layout)
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
                    "-S",
                    "unix@run/master.sock,mode,600",
                    *(("-f", "run/peers.cfg") if _together(plan) else ()),
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
            *_on_aws(plan, layout),
        ),
    )


def _on_aws(plan: FleetPlan, layout: Layout) -> Iterator[Program]:
    """What a gateway on AWS runs beside HAProxy: who the engines are, who the other gateways are; what pools climb."""
    if plan.region is None:
        return
    if plan.gateway.srv:
        services = {
            srv: (namespace, f"{service}._tcp")
            for _, srv, _ in plan.gateway.srv
            for service, _, namespace in [srv.partition("._tcp.")]
        }
        (listen,) = plan.gateway.dns.nameservers
        yield helper("names", layout, {"region": plan.region, "listen": listen, "services": services})
    if _together(plan):
        room, port = plan.gateway.gateways, plan.gateway.peers_port
        yield helper("peers", layout, {"region": plan.region, "stack": plan.stack, "room": room, "port": port})
    if plan.on_aws and plan.on_aws.ladders:
        yield helper("ladder", layout, {"region": plan.region, "ladders": plan.on_aws.ladders})


def _together(plan: FleetPlan) -> range:
    """The numbers of the gateways that count together; none where there is one alone, or nothing to count."""
    several = plan.gateway.gateways > 1 and _Limits.of(plan.gateway.key_limits).counted
    return range(1, plan.gateway.gateways + 1) if several else range(0)


def _files(plan: FleetPlan) -> dict[str, str]:
    """Path in the program's folder to text."""
    errors: dict[str, dict[str, str]] = json.loads((NODECONFIG / "gateway/errors.json").read_text())
    limits = _Limits.of(plan.gateway.key_limits)
    affinity = plan.gateway.routing in AFFINITY
    # Consistent hashing needs many points for each server: weight 100 gives 1600 of them.
    weighted = affinity or bool(plan.gateway.server_weights)
    weights = dict(plan.gateway.server_weights)
    numbers = _together(plan)
    own = '"keys/{}-${{FLEET_GATEWAY}}"' if numbers else "keys/{}"
    values: dict[str, Any] = {
        "gateway": plan.gateway,
        "timings": plan.timings,
        "agent": plan.agent,
        "keys": plan.gateway.keys,
        "limits": limits,
        "local_peer": LOCAL_PEER,
        "alone": not numbers,
        "numbers": numbers,
        "suffixes": [f"-{number}" for number in numbers] or [""],
        "own_begun": own.format("begun"),
        "own_open": own.format("open"),
        "backends": _backends(plan),
        "affinity": affinity,
        "weighted": weighted,
        "weight": {e.name: weights.get(e.name, WEIGHT) if weighted else 1 for e in plan.engines},
        "error_statuses": sorted(errors.keys() - RETURNED),
        "operator_connections": OPERATOR_CONNECTIONS,
        "hot_bytes": HOT_BUFFERS * plan.gateway.buffer_bytes,
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
    if numbers:
        files["peers.cfg"] = render("peers.cfg.j2")
    files["models.json"] = _models(plan.models)
    files |= _limit_files(plan, limits, render)
    files["errors/unknown-model.json"] = render("unknown-model.json.j2")
    for name in STATIC:
        files[f"errors/{name}"] = (NODECONFIG / "gateway" / name).read_text()
    for status, error in errors.items():
        body = json.dumps({"error": {k: error.get(k) for k in ("message", "type", "param", "code")}})
        if status in RETURNED:
            files[f"errors/{status}.json"] = body
        else:
            files[f"errors/{status}.http"] = render(
                "error.http.j2", status=int(status), reason=error["reason"], body=body
            )
    return files


def _limit_files(plan: FleetPlan, limits: _Limits, render: Callable[..., str]) -> dict[str, str]:
    """What keys with limits need."""
    files = {name: render("limit.map.j2", about=about, rows=rows) for name, about, rows in limits.maps() if rows}
    for number, names in limits.models:
        files[f"models-{number}.json"] = _models(plan.model(name) for name in names)
    if limits.rpm:
        files["errors/rate-limit.json"] = render("rate-limit.json.j2")
    if limits.concurrency:
        files["errors/concurrency-limit.json"] = render("concurrency-limit.json.j2")
    return files


def _backends(plan: FleetPlan) -> list[_Backend]:
    maxconn = dict(plan.gateway.server_maxconn)
    srv = {model: (name, slots) for model, name, slots in plan.gateway.srv}
    backends = []
    for model in plan.models:
        engines = plan.engines_of(model.name)
        name, slots = srv.get(model.name, (None, len(engines)))
        backends.append(_Backend(f"model-{model.name}", model.name, engines, maxconn[model.name], slots, name))
    return backends


def _models(models: Iterable[ModelPlan]) -> str:
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
                for model in models
            ],
        }
    )
