"""How fast a slow machine does the work of one model: what the timings are derived from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.catalog import EngineCatalog
    from infra.catalog.gpu_start import GpuStart
    from infra.plan.memory import Sizing
    from infra.plan.model import SpeedPlan

WARMUP_TOKENS = 16
"""Longest answer of a warm-up request, rounded up."""
READ_BYTES_S = 50_000_000
"""Slowest disk that weights are read from on a machine of the target local."""


@dataclass(frozen=True)
class Largest:
    """The largest honest requests of one model. All in tokens."""

    context: int
    batch: int
    """Of the prompts that one engine has in flight at most."""
    answer: int
    step: int
    """That one step of the engine computes at most, `--max-num-batched-tokens`."""


@dataclass(frozen=True)
class Work:
    """These requests on a slow machine: rates have their margin taken off."""

    largest: Largest
    prefill_rate: float
    """Tokens of prompts that one engine reads in a second."""
    stream_rate: float
    """Tokens that one stream gets in a second while all others run: they share what the engine makes."""
    start: float
    """Seconds until processes run and weights are read."""

    @property
    def silence(self) -> float:
        """No token moves for so long: a prompt of a full context is read, and the step that was under way before it."""
        return (self.largest.context + self.largest.step) / self.prefill_rate

    @property
    def generation(self) -> float:
        """All prompts of a full batch are read, and then the longest answer is written."""
        return self.largest.batch / self.prefill_rate + self.largest.answer / self.stream_rate

    @property
    def warmup(self) -> float:
        """One warm-up request, as many at once as the engine takes."""
        return self.silence + WARMUP_TOKENS / self.stream_rate

    def answer_within(self, seconds: float) -> int:
        """Tokens of the longest answer that is whole in so many seconds, however full the batch was; 0: none is."""
        return max(0, int((seconds - self.largest.batch / self.prefill_rate) * self.stream_rate))


def on_cpu(sizing: Sizing, max_answer: int, step: int, catalog: EngineCatalog) -> Work:
    """An engine on a CPU.

    Rates are as measured, less for a larger model, and less by the margin; processes start twice as slowly as the
    slowest that was measured.
    """
    speed, facts = catalog.speed, sizing.entry.facts

    def at_worst(measured: float) -> float:
        return measured * speed.parameters.value / facts.parameters / speed.margin.value

    shared = speed.decode_tokens_s.value / sizing.concurrency
    return Work(
        largest=Largest(sizing.context, sizing.concurrency * sizing.context, max_answer, step),
        prefill_rate=at_worst(speed.prefill_tokens_s.value),
        stream_rate=at_worst(min(shared, speed.stream_tokens_s.value)),
        start=2 * speed.start_s.value + facts.weights_bytes / READ_BYTES_S,
    )


def on_gpu(largest: Largest, speed: SpeedPlan, weights_bytes: int, facts: GpuStart, *, eager: bool = False) -> Work:
    """An engine on GPUs.

    Rates are as estimated or measured, less by the error of the estimate, and less by the margin; it starts twice as
    slowly as the slowest that was seen.

    Args:
        largest: Its requests. No more prompts are in flight than the KV cache holds: concurrency x typical tokens, or
            one context if that is more.
        speed: Of one engine with its batch full.
        weights_bytes: Of the whole model: every rank of a tensor-parallel group reads all files.
        facts: The catalog's.
        eager: No compilation and no CUDA graphs.
    """
    slower = facts.margin_percent.value / 100 * (1 + speed.error_percent / 100)
    phases = facts.processes_s.value + (0 if eager else facts.compile_s.value + facts.graphs_s.value)
    return Work(
        largest=largest,
        prefill_rate=speed.prefill_tokens_s / slower,
        stream_rate=1 / (speed.tpot_p95_s * slower),
        start=2 * phases + weights_bytes / facts.read_bytes_s.value,
    )
