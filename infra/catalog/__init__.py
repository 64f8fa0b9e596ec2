"""The catalog: what was measured or looked up, not decided. Every fact has its source and its date."""

from infra.catalog.engine import EngineCatalog, Fact, Format, Memory, Speed, vllm_cpu
from infra.catalog.gpus import Gpu, Kernel, gpus
from infra.catalog.hosted import HostedPrice, hosted_prices
from infra.catalog.instances import Instance, Offer, instances
from infra.catalog.strict import FOLDER, Strict

__all__ = [
    "FOLDER",
    "EngineCatalog",
    "Fact",
    "Format",
    "Gpu",
    "HostedPrice",
    "Instance",
    "Kernel",
    "Memory",
    "Offer",
    "Speed",
    "Strict",
    "gpus",
    "hosted_prices",
    "instances",
    "vllm_cpu",
]
