"""Which weights a model is served from, what the engine computes in, and how large its requests may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from infra.plan.entries import base_entry
from infra.plan.ledger import gib
from infra.plan.memory import Sizing
from infra.plan.model import HostFacts, ModelPlan, Quantization

if TYPE_CHECKING:
    from infra.catalog import EngineCatalog
    from infra.config import ModelConfig
    from infra.plan.ledger import Ledger
    from infra.weights.lock import WeightsLock

DEFAULT_CONTEXT = 2048
DEFAULT_CONCURRENCY = 8
DEFAULT_ENGINES = 2
QUANTIZATION: dict[int, Quantization] = {8: "8bit", 4: "4bit"}
"""By bits; anything wider is not quantised."""


@dataclass(frozen=True)
class ModelPlanner:
    """Decides everything about one model but where its engines are. What it refuses is in the ledger."""

    name: str
    wanted: ModelConfig
    lock: WeightsLock
    host: HostFacts
    catalog: EngineCatalog
    ledger: Ledger

    def plan(self) -> tuple[ModelPlan, Sizing] | None:
        """The model's plan and the size of its engines; None if there are no weights to serve."""
        base = base_entry(self.name, self.wanted, self.lock, self.ledger)
        served = self._served(base) if base else None
        if base is None or served is None:
            return None
        self.ledger.because(self._at("served"), served, f"stored as {self.lock.models[served].format}")
        sizing = self._sizing(served)
        self._check(sizing)
        entry = self.lock.models[served]
        plan = ModelPlan(
            name=self.name,
            weights=served,
            base_weights=base,
            quantization=QUANTIZATION.get(self.catalog.formats[entry.format].bits, "none"),
            format=entry.format,
            dtype=self._dtype(),
            context=sizing.context,
            concurrency=sizing.concurrency,
            # A reload may bring as many again from the gateway's old process, and a request with n > 1 counts n times.
            queued=2 * sizing.concurrency,
            kv_cache_bytes=sizing.kv_cache(self.catalog),
            engine_memory_bytes=sizing.engine(self.catalog),
            max_answer=self.wanted.max_answer,
            tool_calls=self.wanted.tool_calls,
        )
        why = f"{sizing.kv_tokens} tokens: concurrency x typical-tokens, or one full context"
        self.ledger.because(self._at("kv-cache"), gib(plan.kv_cache_bytes), why)
        why = "of each engine: its processes (measured), weights and KV cache; an estimate"
        self.ledger.because(self._at("memory"), gib(plan.engine_memory_bytes), why)
        return plan, sizing

    def _at(self, key: str) -> str:
        return f"models.{self.name}.{key}"

    # Weights.

    def _served(self, base: str) -> str | None:
        """The entry that is served: the base, or what was made from it with as many bits as were asked for."""
        if self.wanted.quantization in {"8bit", "4bit"}:
            return self._quantized(base, self.wanted.quantization)
        format_ = self.lock.models[base].format
        if obstacle := self._obstacle(format_):
            self.ledger.refuse(self._at("weights"), f"`{base}` is {format_}: {obstacle}", "take another entry")
            return None
        return base

    def _quantized(self, base: str, quantization: Literal["8bit", "4bit"]) -> str | None:
        at = self._at("quantization")
        formats = [
            name for name, format_ in self.catalog.formats.items() if QUANTIZATION.get(format_.bits) == quantization
        ]
        runnable = [format_ for format_ in formats if not self._obstacle(format_)]
        if not runnable:
            self.ledger.refuse(at, f"{quantization}: {self._obstacle(formats[0])}", "`quantization: 8bit`, or none")
            return None
        made = {self.lock.models[base].format: base}
        made |= {entry.format: name for name, entry in self.lock.variants(base).items()}
        for format_ in runnable:
            if format_ in made:
                self.ledger.because(at, quantization, f"written in the stack file; here that is {format_}")
                return made[format_]
        problem = f"models.lock.yaml has no {quantization} entry ({' or '.join(runnable)}) made from `{base}`"
        self.ledger.refuse(at, problem, f"add one with `made_from: {base}` and a recipe, or take `quantization: none`")
        return None

    def _obstacle(self, format_: str) -> str:
        """Why this machine cannot serve a format, or ""."""
        known = self.catalog.formats[format_]
        if known.needs and known.needs not in self.host.cpu_flags:
            return f"this machine's CPU has no {known.needs}; {known.why}"
        return known.broken

    def _dtype(self) -> Literal["float32", "bfloat16"]:
        """Bfloat16 where the CPU has instructions for it."""
        if "avx512f" in self.host.cpu_flags:
            self.ledger.because(self._at("dtype"), "bfloat16", "the CPU has avx512f")
            return "bfloat16"
        reason = "the CPU has no avx512f: there float32 takes twice the memory and is 3 to 6 times as fast"
        self.ledger.because(self._at("dtype"), "float32", reason)
        return "float32"

    # Sizes.

    def _sizing(self, served: str) -> Sizing:
        return Sizing(
            entry=self.lock.models[served],
            dtype="bfloat16" if "avx512f" in self.host.cpu_flags else "float32",
            context=self._context(self.lock.models[served].facts.max_positions),
            concurrency=self._or_default("concurrency", self.wanted.concurrency, DEFAULT_CONCURRENCY),
            typical_tokens=self.wanted.typical_tokens,
            engines=self._or_default("engines", self.wanted.engines, DEFAULT_ENGINES),
        )

    def _context(self, maximum: int) -> int:
        given = self.wanted.context
        if given is not None and given > maximum:
            self.ledger.refuse(
                self._at("context"), f"{given} tokens: more than the model can take", f"at most {maximum}"
            )
        reason = "default of the target local" if maximum > DEFAULT_CONTEXT else "the model's maximum"
        return min(self._or_default("context", given, min(DEFAULT_CONTEXT, maximum), reason), maximum)

    def _or_default(
        self, key: str, given: int | None, default: int, reason: str = "default of the target local"
    ) -> int:
        if given is None:
            self.ledger.because(self._at(key), default, reason)
            return default
        self.ledger.given(self._at(key), given)
        return given

    def _check(self, sizing: Sizing) -> None:
        self._or_default("typical-tokens", self.wanted.typical_tokens, sizing.typical, "half the context")
        self._or_default("max-answer", self.wanted.max_answer, sizing.context, "the context")
        for key, given in (("typical-tokens", self.wanted.typical_tokens), ("max-answer", self.wanted.max_answer)):
            if given is not None and given > sizing.context:
                problem = f"{given} tokens: more than the context"
                self.ledger.refuse(self._at(key), problem, f"at most {sizing.context}")
        if sizing.engines == 1:
            seconds = self.catalog.speed.stop_s.value + self.catalog.speed.start_s.value
            message = f"one engine: an update means that `{self.name}` is down for about {seconds} s"
            self.ledger.note(self._at("engines"), message)
