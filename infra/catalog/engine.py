"""One engine version on one kind of machine: what it takes, and how fast it was."""

from __future__ import annotations

from functools import cache

from pydantic import Field, PositiveInt

from infra.catalog.strict import FOLDER, Month, Source, Strict, parse, read

VLLM_CPU = FOLDER / "vllm-cpu.yaml"


class Fact(Strict):
    """A number, and where it is from. Its unit is in its key."""

    value: PositiveInt
    source: Source
    date: Month


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
    return parse(EngineCatalog, read(VLLM_CPU))
