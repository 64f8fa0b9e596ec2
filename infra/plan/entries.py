"""Which entry of the weights lock a model is served from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from infra.findings import did_you_mean, nearest, show
from infra.plan.model import Quantization
from infra.weights.lock import Format

if TYPE_CHECKING:
    from infra.catalog import Gpu
    from infra.config import ModelConfig
    from infra.plan.ledger import Ledger
    from infra.weights.lock import WeightsLock

LEVELS: tuple[Quantization, ...] = ("none", "8bit", "4bit")
EIGHT: tuple[Format, ...] = ("fp8", "w8a8-int8")
LISTED = 6
"""So many entries are listed; more are a command away."""
FOUR: tuple[Format, ...] = ("w4a16", "awq", "gptq")


def base_entry(model: str, wanted: ModelConfig, lock: WeightsLock, ledger: Ledger) -> str | None:
    """The entry that the config names, or the one with the model's own name; None if there is no such entry."""
    at, entries = f"models.{model}.weights", lock.models
    fix = _other_entry(wanted.weights or model, entries)
    if wanted.weights is None and model not in entries:
        ledger.refuse(at, f"is missing, and models.lock.yaml has no entry `{model}`", fix)
        return None
    if wanted.weights is None:
        ledger.because(at, model, "the entry of models.lock.yaml with the model's own name")
        return model
    if wanted.weights not in entries:
        ledger.refuse(at, f"models.lock.yaml has no entry {show(wanted.weights)}", fix)
        return None
    ledger.given(at, wanted.weights)
    return wanted.weights


def _other_entry(word: str, entries: Collection[str]) -> str:
    """The fix for an entry that is not there."""
    if nearest(word, entries) or 0 < len(entries) <= LISTED:
        return did_you_mean(word, entries)
    return "`fleet lock list` shows the entries that there are, `fleet lock add hf://ORG/NAME` adds one"


@dataclass(frozen=True)
class Served:
    """What an engine loads, and what it holds."""

    entry: str
    format: Format
    online: bool = False
    """The engine itself quantises what it loads (`--quantization`)."""


def level_of(format_: Format) -> Quantization:
    """How many bits a format has, in the words of the stack config."""
    return "8bit" if format_ in EIGHT else "4bit" if format_ in FOUR else "none"


def served(base: str, level: Quantization, gpu: Gpu, lock: WeightsLock) -> Served | str:
    """The entry that is served on a GPU with as many bits as are wanted; or why there is none.

    Of 8-bit formats the GPU's own comes first: FP8 from compute capability 8.9, INT8 before; weights alone in FP8 last
    (vLLM documentation, quantisation, supported hardware). FP8 needs no quantised checkpoint: vLLM makes it while it
    loads; a checkpoint is preferred, as it is calibrated and half as large on disk.
    """
    made = {lock.models[base].format: base}
    made |= {entry.format: name for name, entry in lock.variants(base).items()}
    if level == "none":
        format_ = lock.models[base].format
        if format_ not in gpu.formats:
            return f"`{base}` is {format_}, which {gpu.product} cannot run"
        return Served(base, format_)
    wanted = _preferred(level, gpu)
    if not wanted:
        return f"{gpu.product} runs no {level} format"
    for format_ in wanted:
        if format_ in made:
            return Served(made[format_], format_)
    if "fp8" in wanted and level_of(lock.models[base].format) == "none":
        return Served(base, "fp8", online=True)
    return f"models.lock.yaml has no {level} entry ({' or '.join(wanted)}) made from `{base}`"


def _preferred(level: Literal["8bit", "4bit"], gpu: Gpu) -> list[Format]:
    formats = [format_ for format_ in (EIGHT if level == "8bit" else FOUR) if format_ in gpu.formats]
    return sorted(formats, key=lambda format_: gpu.formats[format_] != "native")
