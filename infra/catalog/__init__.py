"""The catalog: what was measured or looked up, not decided. Every fact has its source and its date."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints
from ruamel.yaml import YAML

FOLDER = Path(__file__).parent


class Strict(BaseModel):
    """Base of the catalog's parts: immutable, no unknown keys, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Fact(Strict):
    """A number, and where it is from. Its unit is in its key."""

    value: PositiveInt
    source: str
    date: Annotated[str, StringConstraints(pattern=r"^20\d\d-\d\d$")]


class Memory(Strict):
    """What an engine takes beside its weights and its KV cache, and what everything else takes."""

    process_overhead_bytes: Fact
    services_bytes: Fact
    kv_block_tokens: Fact


class Speed(Strict):
    """How fast a model of `parameters` was on a slow machine."""

    parameters: Fact
    prefill_tokens_s: Fact
    decode_tokens_s: Fact
    stream_tokens_s: Fact
    start_s: Fact
    stop_s: Fact
    margin: Fact


class Format(Strict):
    """What weights can be stored as."""

    bits: PositiveInt
    needs: str = ""
    """CPU flag without which engines cannot serve it."""
    why: str = ""
    broken: str = ""
    """Why it must not be served at all."""


class EngineCatalog(Strict):
    """One engine version on one kind of machine."""

    version: str
    memory: Memory
    speed: Speed
    formats: dict[str, Format] = Field(min_length=1)
    tool_parsers: tuple[str, ...]


@cache
def vllm_cpu() -> EngineCatalog:
    """VLLM on CPUs."""
    return EngineCatalog.model_validate(YAML(typ="safe", pure=True).load(FOLDER / "vllm-cpu.yaml"), strict=False)
