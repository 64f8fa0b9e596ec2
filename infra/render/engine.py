"""The engine node's bundle: its vLLM servers and the agent that watches them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.paths import NODECONFIG
from infra.plan.engines import LOOPBACK
from infra.plan.model import EnginePlan, FleetPlan, ModelPlan
from infra.render.bundle import Bundle, Layout, Program, templates

AGENT = NODECONFIG / "agent" / "fleet_agent"
STARTUP_FAILS_WITHIN_S = 5
"""An engine that is gone sooner could not even start: wrong flags, weights that do not match."""


def engine_node(plan: FleetPlan, layout: Layout) -> Bundle:
    """Everything that the one engine node of a local plan runs."""
    return Bundle("engine", programs(plan, layout, plan.engines, LOOPBACK))


def programs(plan: FleetPlan, layout: Layout, engines: Sequence[EnginePlan], host: str) -> tuple[Program, ...]:
    """The programs of a node with these engines; `host` is the address on which its agent listens."""
    return (_agent(plan, layout, host), *(_engine(plan, engine, layout) for engine in engines))


def agent_code() -> dict[str, str]:
    """The agent's package, by its paths."""
    return {f"fleet_agent/{file.name}": file.read_text(encoding="utf-8") for file in sorted(AGENT.glob("*.py"))}


def helper(name: str, layout: Layout, settings: Mapping[str, Any]) -> Program:
    """A part of the agent's package as a program of its own, on machines of AWS."""
    return Program(
        name=name,
        command=_python(layout, name, f"slots/{name}/{name}.json"),
        environment={"PYTHONPATH": f"slots/{name}", "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "5"},
        files={f"{name}.json": _json(settings), **agent_code()},
    )


def _agent(plan: FleetPlan, layout: Layout, host: str) -> Program:
    timings = plan.timings
    settings = {
        "port": plan.agent.port,
        "poll_ms": timings.poll_ms,
        "probe_timeout_ms": timings.probe_timeout_ms,
        "warmup_request_s": timings.warmup_request_s,
        "wedged_s": timings.wedged_s,
        "start_s": timings.start_s,
        "drain_s": timings.drain_s,
        "crash_loop_restarts": timings.crash_loop_restarts,
        "crash_loop_window_s": timings.crash_loop_window_s,
    }
    return Program(
        name="agent",
        command=_python(layout, "serve", "slots/agent/agent.json"),
        environment={"PYTHONPATH": "slots/agent"},
        files={"agent.json": _json(settings), **agent_code()},
        listen=f"{host}:{plan.agent.port}",
        standby=True,
        reload="SIGHUP",
    )


def _engine(plan: FleetPlan, engine: EnginePlan, layout: Layout) -> Program:
    model = plan.model(engine.model)
    weights = layout.weights[model.weights]
    settings: dict[str, Any] = {
        "name": engine.name,
        "model": model.name,
        "port": engine.port,
        "command": [str(layout.vllm), "serve", str(weights.folder), *engine.flags],
        "weights": {
            "name": model.weights,
            "format": model.format,
            "folder": str(weights.folder),
            "files": weights.files,
            "record": str(weights.record) if weights.record else None,
        },
        "warmup": json.loads(warmup(model)),
    }
    return Program(
        name=engine.name,
        command=_python(layout, "start", f"slots/{engine.name}/engine.json"),
        environment={**dict(engine.environment), **_caches(), "PYTHONPATH": "slots/agent"},
        files={"engine.json": _json(settings)},
        engine=True,
        stop_s=plan.timings.stop_s,
        settle_s=STARTUP_FAILS_WITHIN_S,
    )


def warmup(model: ModelPlan) -> str:
    """The requests that an engine must answer before a gateway may see it, as JSON."""
    return templates().get_template("engine/warmup.json.j2").render(model=model)


def _caches() -> dict[str, str]:
    """Keep what vLLM and its libraries write inside the machine's folder: relative paths, as that is where they run."""
    return {
        "HF_HOME": "data/cache/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": "data/cache/inductor",
        "VLLM_CACHE_ROOT": "data/cache/vllm",
        "VLLM_CONFIG_ROOT": "data/cache/vllm-config",
        "XDG_CACHE_HOME": "data/cache",
        "XDG_CONFIG_HOME": "data/cache/config",
    }


def _python(layout: Layout, *arguments: str) -> tuple[str, ...]:
    return (str(layout.python), "-m", "fleet_agent", *arguments)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """Mappings that are no dict, and paths."""
    return str(value) if isinstance(value, Path) else dict(value)
