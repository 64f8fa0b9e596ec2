"""One model on GPUs: what is asked of it, which candidate serves it, and what that becomes in the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.plan.candidates import DEFAULT_CONCURRENCY, SAFE, Ask, Candidate, World, demand
from infra.plan.choice import Choice, choose, limits
from infra.plan.choice import refuse as refuse_choice
from infra.plan.entries import base_entry
from infra.plan.ledger import gib
from infra.plan.model import FitPlan, ModelPlan
from infra.plan.traffic import request_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from infra.config import ModelConfig, PoolConfig, SloConfig
    from infra.plan.fit import Engine, Fit
    from infra.plan.ledger import Ledger
    from infra.plan.model import SpeedPlan
    from infra.plan.packing import Demand

DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Chosen:
    """A model, the candidate that serves it, and everything that was looked at."""

    ask: Ask
    wanted: ModelConfig
    choice: Choice
    engine: Engine
    fit: Fit
    speed: SpeedPlan

    @property
    def best(self) -> Candidate:
        """The chosen candidate."""
        return self.choice.best

    @property
    def max_answer(self) -> int:
        """Tokens of the longest answer."""
        return self.wanted.max_answer or self.ask.context

    def demand(self, world: World) -> Demand:
        """What its engines take from their nodes."""
        return demand(self.best, self.ask, world)

    def fit_plan(self) -> FitPlan:
        """How one engine uses its GPUs' memory."""
        return FitPlan(
            budget_bytes=round(self.engine.utilization * self.engine.gpu_bytes),
            weights_bytes=self.fit.weights_bytes,
            activation_bytes=self.fit.activation_bytes,
            non_torch_bytes=self.fit.non_torch_bytes,
            graph_bytes=self.fit.graph_bytes,
            kv_bytes=self.fit.pool_bytes,
            kv_bytes_per_token=self.fit.kv_bytes_per_token,
            kv_tokens=self.fit.kv_tokens,
            holds_full=self.fit.max_concurrency,
            holds_typical=self.best.holds,
        )

    def model_plan(self) -> ModelPlan:
        """The model as the rest of the fleet sees it."""
        served, _ = self.best.chosen
        gpus = self.engine.tensor_parallel_size
        return ModelPlan(
            name=self.ask.model,
            weights=served.entry,
            base_weights=self.ask.base,
            quantization=self.best.level,
            format=served.format,
            dtype="auto",
            context=self.ask.context,
            concurrency=self.best.concurrency,
            # A reload may bring as many again from the gateway's old process, and a request with n > 1 counts n times.
            queued=2 * self.best.concurrency,
            kv_cache_bytes=gpus * self.fit.pool_bytes,
            engine_memory_bytes=gpus * round(self.engine.utilization * self.engine.gpu_bytes),
            max_answer=self.wanted.max_answer,
            tool_calls=self.wanted.tool_calls,
        )


def ask_of(name: str, wanted: ModelConfig, slo: SloConfig, world: World, ledger: Ledger) -> Ask | None:
    """What is asked of a model, defaults filled in; None if there are no weights for it."""
    base = base_entry(name, wanted, world.lock, ledger)
    if base is None:
        return None
    at, maximum = f"models.{name}", world.lock.models[base].facts.max_positions
    context = _context(at, wanted, maximum, ledger)
    typical = min(wanted.typical_tokens or max(1, context // 2), context)
    if wanted.typical_tokens is None:
        ledger.because(f"{at}.typical-tokens", typical, "half the context")
    else:
        ledger.given(f"{at}.typical-tokens", wanted.typical_tokens)
    for key, given in (("typical-tokens", wanted.typical_tokens), ("max-answer", wanted.max_answer)):
        if given is not None and given > context:
            ledger.refuse(f"{at}.{key}", f"{given} tokens: more than the context", f"at most {context}")
    prompt, answer = request_tokens(name, wanted.traffic, context, wanted.max_answer, ledger)
    utilization = wanted.gpu_memory_utilization or world.regime.utilization
    if wanted.gpu_memory_utilization is None:
        ledger.because(f"{at}.gpu-memory-utilization", utilization, "vLLM's own default")
    else:
        ledger.given(f"{at}.gpu-memory-utilization", utilization)
    return Ask(
        model=name,
        base=base,
        context=context,
        typical=typical,
        prompt=prompt,
        answer=answer,
        concurrency=wanted.concurrency,
        engines=wanted.engines,
        requests_per_month=wanted.traffic.requests_per_month if wanted.traffic else None,
        ttft_s=slo.ttft_p95,
        tpot_s=slo.tpot_p95,
        utilization=utilization,
        kv_dtype=wanted.kv_cache_dtype,
        batched_tokens=wanted.max_num_batched_tokens,
        eager=wanted.enforce_eager,
        sleep=wanted.sleep,
    )


def _context(at: str, wanted: ModelConfig, maximum: int, ledger: Ledger) -> int:
    if wanted.context is None:
        default = min(DEFAULT_CONTEXT, maximum)
        ledger.because(f"{at}.context", default, "default" if default < maximum else "the model's maximum")
        return default
    ledger.given(f"{at}.context", wanted.context)
    if wanted.context > maximum:
        ledger.refuse(f"{at}.context", f"{wanted.context} tokens: more than the model can take", f"at most {maximum}")
    return min(wanted.context, maximum)


def choose_model(  # noqa: PLR0913, PLR0917 - what a choice depends on
    ask: Ask, wanted: ModelConfig, gpus: Sequence[str], pool: PoolConfig, world: World, ledger: Ledger
) -> Chosen | None:
    """The candidate that serves a model; None if none can, as the ledger says."""
    choice = choose(ask, limits(wanted, gpus), pool, world)
    best = choice.best
    if best.obstacle or best.engine is None or best.fit is None or best.speed is None:
        refuse_choice(choice, pool, world, ledger)
        return None
    return Chosen(ask, wanted, choice, best.engine, best.fit, best.speed)


def explain_model(chosen: Chosen, world: World, ledger: Ledger) -> None:
    """Say where a model's values came from, and what the user should know."""
    best, ask, wanted = chosen.best, chosen.ask, chosen.wanted
    at = f"models.{ask.model}"
    served, _ = best.chosen
    made = "quantised by the engine while it loads" if served.online else f"stored as {served.format}"
    ledger.because(f"{at}.served", served.entry, made)
    why = "written in the stack file" if "quantization" in wanted.model_fields_set else "default: as they are"
    if wanted.quantization == "auto":
        why = "the cheapest"
    ledger.because(f"{at}.quantization", best.level, f"{why}; on {best.gpu} that is {served.format}")
    given_size = wanted.tensor_parallel_size is not None
    why = "written in the stack file" if given_size else f"the cheapest number of GPUs for one engine{_fewer(chosen)}"
    ledger.because(f"{at}.tensor-parallel-size", best.tensor_parallel_size, why)
    if wanted.concurrency is None:
        ledger.because(f"{at}.concurrency", best.concurrency, _limit(best))
    else:
        ledger.given(f"{at}.concurrency", best.concurrency)
    if wanted.engines is None:
        reason = "two, so that one serves while the other is updated"
        ledger.because(f"{at}.engines", best.engines, reason if best.engines <= 2 else "twice the mean traffic, stated")  # noqa: PLR2004
    else:
        ledger.given(f"{at}.engines", wanted.engines)
    per_token = f"{chosen.fit.kv_bytes_per_token / 1024:g} KiB a token"
    ledger.because(
        f"{at}.kv-cache", gib(chosen.fit.pool_bytes), f"of each GPU: what weights and activations leave; {per_token}"
    )
    speed = chosen.speed
    ledger.because(f"{at}.speed", f"{speed.output_tokens_s:,.0f} tokens/s an engine", speed.basis)
    _notes(chosen, world, ledger)


def _fewer(chosen: Chosen) -> str:
    """Why half as many GPUs would not do, if they would not."""
    best = chosen.best
    half = (best.gpu, best.level, best.tensor_parallel_size // 2)
    for other in chosen.choice.others:
        if (other.gpu, other.level, other.tensor_parallel_size) == half and (other.obstacle or other.slow):
            return f"; on half as many: {other.obstacle or other.slow}"
    return ""


def _limit(best: Candidate) -> str:
    if best.holds <= best.concurrency:
        return f"usual requests that the KV cache of one engine holds, {1 - SAFE:.0%} kept free"
    why = "what keeps the promised latency" if best.concurrency != DEFAULT_CONCURRENCY else "default"
    return f"{why}; the KV cache of one engine holds {best.holds} usual requests"


def _notes(chosen: Chosen, world: World, ledger: Ledger) -> None:
    best, ask = chosen.best, chosen.ask
    at, speed = f"models.{ask.model}", chosen.speed
    if best.slow:
        ledger.note(f"{at}.concurrency", f"an estimate says that it {best.slow} (+-{speed.error_percent} %)")
    if best.level == "none" or best.served is None:
        return
    plain = next(
        (
            other
            for other in chosen.choice.others
            if (other.level, other.gpu, other.tensor_parallel_size) == ("none", best.gpu, best.tensor_parallel_size)
        ),
        None,
    )
    native = world.gpus[best.gpu].formats.get(best.served.format) == "native"
    if plain and not plain.obstacle and plain.speed and plain.concurrency >= best.concurrency:
        faster = plain.speed.output_tokens_s > speed.output_tokens_s
        if faster or not native:
            words = "is also faster" if faster else "needs no conversion of weights at every step"
            ledger.note(f"{at}.quantization", f"bf16 fits here as well and {words}: `quantization: none`")
