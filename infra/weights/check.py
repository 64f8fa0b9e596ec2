"""What is wrong with what the lock promises: files that differ, and digests that nobody has asked for yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.findings import ConfigError, Finding
from infra.paths import weights_dir
from infra.weights import cache
from infra.weights.files import WeightsError, listing
from infra.weights.progress import Say, silent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from infra.weights.lock import WeightsLock


def check(lock: WeightsLock, say: Say = silent) -> list[Finding]:
    """Compare everything in the cache with the lock, every byte; entries that are not in the cache are left out.

    Returns:
        A finding for each file that differs.
    """
    findings: list[Finding] = []
    for name, entry in lock.models.items():
        if lock.unknown(name):
            continue
        folder = weights_dir() / lock.folder(name)
        if not folder.is_dir():
            say(f"{name}: not in the cache")
            continue
        try:
            mismatches = cache.verify(folder, entry, lambda text, name=name: say(f"{name}: {text}"))  # type: ignore[misc]
        except WeightsError as error:
            findings += error.findings
            continue
        findings += [
            Finding(str(folder / mismatch.path), mismatch.problem, "`pulumi up` mends it") for mismatch in mismatches
        ]
        if not mismatches:
            say(f"{name}: {len(listing(folder))} files as locked")
    if unknown := [name for name in lock.models if lock.unknown(name)]:
        say(f"digests unknown, to be planned with only until `fleet lock fill NAME`: {', '.join(unknown)}")
    return findings


def require_digests(lock: WeightsLock, served: Mapping[str, str]) -> None:
    """See that everything that is going to be served can be compared with the lock.

    Args:
        lock: The lock.
        served: Names of models in the stack's config, each with the entry that it is served from.

    Raises:
        ConfigError: with every model that cannot.
    """
    findings = (lock.no_digests(entry, f"models.{name}.weights") for name, entry in served.items())
    if found := [finding for finding in findings if finding]:
        raise ConfigError(found)
