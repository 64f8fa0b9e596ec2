"""Weights: what `stacks/models.lock.yaml` promises, where it comes from, and this machine's cache of it."""

from infra.findings import ConfigError
from infra.weights.add import add
from infra.weights.cache import Place, check, ensure, expected_files, place, verify
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
    "load",
    "place",
    "verify",
]
