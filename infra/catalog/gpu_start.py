"""How long a GPU node takes to serve, at worst."""

from __future__ import annotations

from functools import cache

from infra.catalog.engine import Fact
from infra.catalog.strict import FOLDER, Strict, parse, read

GPU_START = FOLDER / "gpu-start.yaml"


class GpuStart(Strict):
    """Of nodes: boot, image, fetch. Of engines: the rest. The keys are explained in gpu-start.yaml."""

    boot_s: Fact
    image_pull_s: Fact
    fetch_bytes_s: Fact
    processes_s: Fact
    compile_s: Fact
    graphs_s: Fact
    read_bytes_s: Fact
    margin_percent: Fact


@cache
def gpu_start() -> GpuStart:
    """The facts of this version of the project."""
    return parse(GpuStart, read(GPU_START))
