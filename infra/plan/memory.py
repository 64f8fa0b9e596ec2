"""Does it fit into this machine's memory? Each formula stands here once. All sizes are bytes."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra.plan.kv_cache import row_bytes
from infra.plan.ledger import Ledger, gib
from infra.plan.model import HostFacts, MemoryPlan
from infra.weights.facts import WIDTH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from infra.catalog import EngineCatalog
    from infra.weights.lock import LockEntry, ModelFacts

SMALLEST_RESERVE = 1 << 30
RESERVE_PERCENT = 10


def kv_bytes_per_token(facts: ModelFacts, dtype: str) -> int:
    """What one token leaves in all layers that attend; windows are not counted on: at most so much.

    The KV cache has the type that the engine computes in (`--kv-cache-dtype auto`).
    """
    return facts.attention_layers * row_bytes(facts, WIDTH[dtype], 1)


def kv_cache_bytes(facts: ModelFacts, dtype: str, tokens: int, catalog: EngineCatalog) -> int:
    """Memory of a KV cache that holds so many tokens.

    vLLM cuts it into blocks, and keeps one block empty.
    """
    block = catalog.memory.kv_block_tokens.value
    return (math.ceil(tokens / block) + 1) * block * kv_bytes_per_token(facts, dtype)


def weights_bytes(entry: LockEntry, dtype: str) -> int:
    """What the weights take once they are loaded.

    Weights that are not quantised are converted to the type that the engine computes in. Of a quantised model the
    embedding and the output layer (one table where they are tied) are not quantised, and grow likewise.
    """
    facts = entry.facts
    if entry.format in {"bf16", "fp16", "fp32"}:
        return facts.parameters * WIDTH[dtype]
    tables = facts.vocab_size * facts.hidden_size * (1 if facts.tied_embeddings else 2)
    return facts.weights_bytes + tables * max(0, WIDTH[dtype] - WIDTH[facts.dtype])


def engine_bytes(entry: LockEntry, dtype: str, kv_cache: int, catalog: EngineCatalog) -> int:
    """One engine in all: processes and activations (measured), weights, KV cache (vLLM takes it whole at its start)."""
    return catalog.memory.process_overhead_bytes.value + weights_bytes(entry, dtype) + kv_cache


@dataclass(frozen=True)
class Sizing:
    """The engines of one model, before it is known whether they fit."""

    entry: LockEntry
    dtype: str
    context: int
    concurrency: int
    typical_tokens: int | None
    engines: int

    @property
    def typical(self) -> int:
        """Tokens of a usual request: half the context if nothing better is known."""
        return self.typical_tokens or self.context // 2

    @property
    def kv_tokens(self) -> int:
        """As many usual requests as may run at once; one of full length at least, else vLLM does not start.

        When there are more tokens than that, vLLM puts a request back and computes it again later: slower, not wrong.
        """
        return max(self.context, self.concurrency * self.typical)

    def kv_cache(self, catalog: EngineCatalog) -> int:
        """KV cache of one engine."""
        return kv_cache_bytes(self.entry.facts, self.dtype, self.kv_tokens, catalog)

    def engine(self, catalog: EngineCatalog) -> int:
        """One engine in all."""
        return engine_bytes(self.entry, self.dtype, self.kv_cache(catalog), catalog)

    def all_engines(self, catalog: EngineCatalog) -> int:
        """All engines of the model."""
        return self.engines * self.engine(catalog)


def available_bytes(host: HostFacts) -> int:
    """What a fleet may take: the machine's memory less a tenth, at least 1 GiB, for the system and its file cache."""
    return host.ram_bytes - max(SMALLEST_RESERVE, host.ram_bytes * RESERVE_PERCENT // 100)


def plan_memory(models: Mapping[str, Sizing], host: HostFacts, catalog: EngineCatalog, ledger: Ledger) -> MemoryPlan:
    """Add everything up; refuse what the machine cannot hold, and say what it could."""
    services = catalog.memory.services_bytes.value
    available = available_bytes(host)
    engines = sum(sizing.all_engines(catalog) for sizing in models.values())
    plan = MemoryPlan(available=available, services=services, engines=engines, total=services + engines)
    ledger.because("memory.available", gib(available), f"memory of this machine, {gib(host.ram_bytes)}, less a tenth")
    ledger.because(
        "memory.total", gib(plan.total), f"engines, and {gib(services)} for gateway and monitoring: an estimate"
    )
    if plan.total > available:
        for name, sizing in models.items():
            left = available - plan.total + sizing.all_engines(catalog)
            what = "1 engine" if sizing.engines == 1 else f"{sizing.engines} engines"
            ledger.refuse(
                f"models.{name}.engines",
                f"{what} of {gib(sizing.engine(catalog))} do not fit: the fleet needs {gib(plan.total)},"
                f" this machine has {gib(available)} to give (of {gib(host.ram_bytes)})",
                _what_fits(sizing, left, catalog),
            )
    return plan


def _what_fits(sizing: Sizing, left: int, catalog: EngineCatalog) -> str:
    """The largest values, one changed at a time, with which the engines of a model fit into what is left."""

    def largest(key: str, values: range, changed: Callable[[int], Sizing]) -> str | None:
        fitting = bisect.bisect_right(values, left, key=lambda value: changed(value).all_engines(catalog))
        return f"`{key}: {values[fitting - 1]}`" if fitting else None

    found = (
        largest("engines", range(1, sizing.engines), lambda value: replace(sizing, engines=value)),
        largest("context", range(128, sizing.context, 128), lambda value: replace(sizing, context=value)),
        largest("concurrency", range(1, sizing.concurrency), lambda value: replace(sizing, concurrency=value)),
    )
    fits = [text for text in found if text]
    return f"would fit: {', or '.join(fits)}" if fits else "a smaller model, fewer models, or more memory"
