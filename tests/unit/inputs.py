"""What plans are made from, small and fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.config import StackConfig, parse
from infra.plan import make_plan
from infra.plan.model import FleetPlan, HostFacts
from infra.weights import lock as locks
from infra.weights.lock import Calibration, FileFact, LockEntry, ModelFacts, WeightsLock

GIB = 1 << 30
KEYS = {"default": "0" * 64}
AVX2 = frozenset({"avx2"})
AVX512 = frozenset({"avx2", "avx512f"})
GPU_LOCK = locks.load(Path(__file__).with_name("models.lock.yaml"), {})
"""Models that need GPUs."""


def facts(**changes: Any) -> ModelFacts:
    """Of SmolLM2-135M."""
    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "layers": 30,
        "hidden_size": 576,
        "attention_heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_positions": 8192,
        "dtype": "bfloat16",
        "tied_embeddings": True,
        "parameters": 134_515_008,
        "weights_bytes": 269_030_016,
    }
    return ModelFacts(**values | changes)


def entry(format_: str = "bf16", made_from: str | None = None, **changes: Any) -> LockEntry:
    how: dict[str, Any] = (
        {"made_from": made_from, "recipe": "recipe.py", "calibration": Calibration(prompts=1, tokens=1)}
        if made_from
        else {"source": "file:///models/it", "files": {"config.json": FileFact(size=1, sha256="0" * 64)}}
    )
    return LockEntry(licence="Apache-2.0", format=format_, facts=facts(**changes), **how)  # type: ignore[arg-type]


def a_lock(**more: LockEntry) -> WeightsLock:
    return WeightsLock(
        models={
            "small": entry(),
            "small-w8a8": entry("w8a8-int8", "small", weights_bytes=163_000_000),
            "small-w4a16": entry("w4a16", "small", weights_bytes=116_000_000),
            "small-fp8": entry("fp8"),
            "lonely": entry(),
            **more,
        }
    )


def a_host(gib: float = 16, cores: int = 4, flags: frozenset[str] = AVX2) -> HostFacts:
    return HostFacts(ram_bytes=int(gib * GIB), cores=cores, cpu_flags=flags, platform="linux-x86_64")


def plan_of(config: StackConfig, stack: str = "local") -> FleetPlan:
    """The plan of a config: with the machine and the models of these tests."""
    if config.target == "local":
        return make_plan(stack, config, a_lock(), a_host(), KEYS)
    return make_plan(stack, config, GPU_LOCK, None, config.api_keys)


def plan(
    models: dict[str, Any] | None = None,
    *,
    stack: str = "local",
    host: HostFacts | None = None,
    lock: WeightsLock | None = None,
    **config: Any,
) -> FleetPlan:
    """The plan of a stack with these models; keys of the config with _ for -."""
    raw = {"target": "local", "models": models or {"chat": {"weights": "small"}}}
    raw |= {key.replace("_", "-"): value for key, value in config.items()}
    return make_plan(stack, parse(raw), lock or a_lock(), host or a_host(), KEYS)
