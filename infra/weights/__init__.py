"""Weights: what `stacks/models.lock.yaml` promises, where it comes from, and this machine's cache of it."""

from infra.findings import ConfigError
from infra.weights.add import add, fill
from infra.weights.cache import Place, ensure, expected_files, place, verify
from infra.weights.check import check, require_digests
from infra.weights.files import Mismatch, WeightsError
from infra.weights.lock import WeightsLock, load

__all__ = [
    "ConfigError",
    "Mismatch",
    "Place",
    "WeightsError",
    "WeightsLock",
    "add",
    "check",
    "ensure",
    "expected_files",
    "fill",
    "load",
    "place",
    "require_digests",
    "verify",
]
