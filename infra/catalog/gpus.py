"""GPUs: what an engine can hold, and how fast it can be at most."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from infra.catalog.strict import FOLDER, Month, Source, Strict, rows

GPUS = FOLDER / "gpus.yaml"
Kernel = Literal["native", "weight-only"]
"""How a format runs: `native` multiplies in the format itself; `weight-only` saves memory and bandwidth but not
arithmetic, as the weights are made wide again before they are multiplied (Marlin)."""


class Gpu(Strict):
    """One kind of GPU."""

    product: str
    """As `nvidia-smi` calls it."""
    memory_bytes: PositiveInt
    """As CUDA reports it: less than what it is sold as."""
    bandwidth_bytes_s: PositiveInt
    compute_capability: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]]
    flops: dict[Literal["bf16", "fp8", "int8"], PositiveInt]
    """Dense multiply-adds, counted as two, per second; a type that is missing has no tensor cores for it."""
    nvlink_bytes_s: PositiveInt | None
    """Of one GPU, both directions together; None: PCIe only."""
    formats: dict[str, Kernel]
    """Formats of the lock that run here; a format that is missing cannot."""
    source: Source
    date: Month


@cache
def gpus() -> dict[str, Gpu]:
    """Every GPU by name."""
    return rows(Gpu, GPUS, "gpus")
