"""How much of what a GPU could do vLLM gets out of it: constants of plan/roofline.py, from efficiency.yaml."""

from __future__ import annotations

from functools import cache

from pydantic import PositiveFloat, PositiveInt

from infra.catalog.strict import FOLDER, Month, Source, Strict, read

EFFICIENCY = FOLDER / "efficiency.yaml"


class Constant(Strict):
    """A number, and where it is from. Its unit is in its key; without one it is a share of what the data sheet says."""

    value: PositiveFloat
    source: Source
    date: Month


class Percent(Strict):
    """How wrong an estimate is, and how that was found out."""

    value: PositiveInt
    source: Source
    date: Month


class Efficiency(Strict):
    """Everything that was calibrated and not computed."""

    weights_bandwidth: Constant
    """Share of the memory bandwidth at which a step reads the weights."""
    kv_bandwidth: Constant
    """Share of the memory bandwidth at which attention reads the KV cache: FlashAttention 3, which needs Hopper."""
    kv_bandwidth_fa2: Constant
    """The same where FlashAttention 2 does it."""
    matrix_flops: Constant
    """Share of the peak at which large 16-bit matrices are multiplied."""
    attention_flops: Constant
    """Share of the 16-bit peak that attention over a prompt reaches."""
    eight_bit_flops: Constant
    """What 8-bit matrices reach of their peak, as a part of what 16-bit ones reach: activations are quantised first."""
    weight_only_flops: Constant
    """The same of 16-bit matrices whose weights are made wide again before they are multiplied (Marlin)."""
    expert_flops: Constant
    """The same of the matrices of experts, which are many and small."""
    expert_layer_s: Constant
    """Routing, sorting and gathering of tokens in one layer with experts."""
    step_s: Constant
    """Scheduling, sampling and passing on of one step."""
    layer_s: Constant
    """Launches and small kernels of one layer."""
    sequence_s: Constant
    """What each running sequence adds to a step."""
    request_s: Constant
    """HTTP, tokenisation, first pass through the scheduler of one request."""
    nvlink_latency_s: Constant
    """One all-reduce of next to nothing."""
    nvlink_bandwidth: Constant
    """Share of the NVLink bandwidth (both directions together) that an all-reduce reaches."""
    pcie_latency_s: Constant
    """The same without NVLink."""
    pcie_bytes_s: Constant
    """What an all-reduce without NVLink moves."""
    error_percent: Percent
    """Nine estimates of ten are closer than that."""


@cache
def efficiency() -> Efficiency:
    """The constants of this version of the project."""
    return Efficiency.model_validate(read(EFFICIENCY), strict=False)
