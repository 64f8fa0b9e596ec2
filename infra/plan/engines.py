"""The command line and the environment of each engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from infra.plan.model import EnginePlan, HostFacts, ModelPlan, Timings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infra.config import ModelConfig
    from infra.plan.fit import Engine

LOOPBACK = "127.0.0.1"
STEP_TOKENS = 512
"""Tokens that one step of an engine computes at most. With vLLM's default, 2048, running streams stood still for 11 s
while long prompts were read; with 512 for 7 s, and the prompts took no longer (2 busy cores, 2026-11)."""
UNLOGGED = "/health,/metrics"
"""The agent and Prometheus ask these several times a second."""


def step_tokens(concurrency: int) -> int:
    """`--max-num-batched-tokens`: not less than one token for each running request."""
    return max(STEP_TOKENS, concurrency)


def names(model: str, engines: int) -> tuple[str, ...]:
    """Names of a model's engines."""
    return tuple(f"{model}-{number}" for number in range(1, engines + 1))


def plan_engines(
    models: Mapping[str, ModelPlan],
    ports: Mapping[str, int],
    engines: Mapping[str, Sequence[str]],
    timings: Timings,
    host: HostFacts,
) -> tuple[EnginePlan, ...]:
    """Every engine.

    Args:
        models: By name.
        ports: By name of the engine.
        engines: Names of each model's engines.
        timings: The plan's.
        host: The machine, whose cores are divided among all engines.
    """
    threads = max(1, host.cores // sum(len(names) for names in engines.values()))
    return tuple(
        EnginePlan(
            name=engine,
            model=name,
            port=ports[engine],
            flags=_flags(model, ports[engine], timings),
            environment=_environment(threads),
        )
        for name, model in models.items()
        for engine in engines[name]
    )


def _flags(model: ModelPlan, port: int, timings: Timings) -> tuple[str, ...]:
    """Arguments of `vllm serve` on a machine without a GPU, checked against vLLM 0.32."""
    values = {"--host": LOOPBACK, "--port": port} | _common(model, timings, step_tokens(model.concurrency))
    # Without it vLLM wants 92 % of the machine's memory for itself.
    values["--kv-cache-memory-bytes"] = model.kv_cache_bytes
    # Compiling takes a minute on two cores and gains little there.
    return _arguments(values, ["--enforce-eager", *_switches(model)])


def gpu_flags(
    model: ModelPlan, engine: Engine, wanted: ModelConfig, timings: Timings, *, online: bool
) -> tuple[str, ...]:
    """The same on GPUs, without host and port: they depend on an engine's place on its node."""
    values = _common(model, timings, engine.batched_tokens)
    values["--tensor-parallel-size"] = engine.tensor_parallel_size
    values["--gpu-memory-utilization"] = engine.utilization
    values["--kv-cache-dtype"] = engine.kv_dtype
    if online:
        values["--quantization"] = model.format
    switches = ["--enforce-eager"] if wanted.enforce_eager else []
    if wanted.sleep:
        switches.append("--enable-sleep-mode")
    return _arguments(values, [*switches, *_switches(model)])


def _common(model: ModelPlan, timings: Timings, batched_tokens: int) -> dict[str, object]:
    values: dict[str, object] = {
        "--served-model-name": model.name,
        "--dtype": model.dtype,
        "--max-model-len": model.context,
        "--max-num-seqs": model.concurrency,
        "--max-num-batched-tokens": batched_tokens,
        # Counts what runs as well as what waits.
        "--max-num-queued-reqs": model.concurrency + model.queued,
        # The default, 0, cuts off what is running at SIGTERM.
        "--shutdown-timeout": timings.shutdown_s,
        "--disable-access-log-for-endpoints": UNLOGGED,
    }
    if model.max_answer is not None and model.max_answer < model.context:
        values["--override-generation-config"] = json.dumps({"max_new_tokens": model.max_answer})
    if model.tool_calls is not None:
        values["--tool-call-parser"] = model.tool_calls
    return values


def _switches(model: ModelPlan) -> list[str]:
    switches = ["--enable-request-id-headers"]
    if model.tool_calls is not None:
        switches.append("--enable-auto-tool-choice")
    return switches


def _arguments(values: Mapping[str, object], switches: Sequence[str]) -> tuple[str, ...]:
    return (*(text for flag, value in values.items() for text in (flag, str(value))), *switches)


OFFLINE = (
    # Weights are on disk and verified: the hub is never asked.
    ("HF_HUB_OFFLINE", "1"),
    ("TRANSFORMERS_OFFLINE", "1"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("DO_NOT_TRACK", "1"),
)
"""Environment of every engine."""


def _environment(threads: int) -> tuple[tuple[str, str], ...]:
    return (
        *OFFLINE,
        # Else the engine's processes talk to each other through an outside address.
        ("VLLM_HOST_IP", LOOPBACK),
        # Engines share the cores; vLLM would bind each engine to the same ones.
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("OMP_NUM_THREADS", str(threads)),
        # Empty, in case the user's environment forbids it: without compiled files every start takes half a minute more.
        ("PYTHONDONTWRITEBYTECODE", ""),
    )
