"""What vLLM takes beside weights and KV cache on a GPU: constants by version, from vllm-memory.yaml."""

from __future__ import annotations

import re
from functools import cache

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from infra.catalog.strict import FOLDER, read

GIB = 1 << 30


class Regime(BaseModel):
    """How one range of vLLM versions uses a GPU's memory. The keys are explained in vllm-memory.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    utilization: PositiveFloat
    sampler_copies: PositiveFloat
    non_torch_gib: NonNegativeFloat
    non_torch_pair_gib: NonNegativeFloat
    non_torch_group_gib: NonNegativeFloat
    graphs_in_budget: bool
    graph_mib_per_layer: NonNegativeFloat
    graph_mib_per_layer_large: NonNegativeFloat
    group_tokens: bool
    state_blocks: PositiveInt
    chunked_prefill: bool
    large_defaults: bool


class MemoryCatalog(BaseModel):
    """All of vllm-memory.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    date: str
    regimes: dict[str, Regime]
    unknown_version: str
    unknown_version_of: dict[str, str]
    cards: dict[str, PositiveFloat]
    """GiB by a part of the card's name."""

    def regime(self, version: str, architecture: str = "") -> Regime:
        """How a version of vLLM behaves: `0.19.0`, `0.8.3 (V0)`; a likely one where the text names none."""
        if "V0" in version:
            return self.regimes["0.0"]
        match = re.search(r"\b(\d+)\.(\d+)", version)
        if match is None:
            likely = (since for start, since in self.unknown_version_of.items() if architecture.startswith(start))
            return self.regimes[next(likely, self.unknown_version)]
        wanted = (int(match[1]), int(match[2]))
        return [regime for since, regime in self.regimes.items() if _pair(since) <= wanted][-1]

    def card_bytes(self, name: str) -> int | None:
        """Total memory of a card by its name, as CUDA reports it."""
        known = " ".join(name.upper().replace("-", " ").split())
        for part, gib in sorted(self.cards.items(), key=lambda item: -len(item[0])):
            if re.search(rf"(^|\W){re.escape(part)}(\W|$)", known):
                return round(gib * GIB)
        return None


def _pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


@cache
def memory_catalog() -> MemoryCatalog:
    """The constants of this version of the project."""
    return MemoryCatalog.model_validate(read(FOLDER / "vllm-memory.yaml"))
