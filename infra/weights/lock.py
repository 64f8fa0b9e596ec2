"""`stacks/models.lock.yaml`: every model that can be served, with the size and SHA-256 of every file.

An entry comes either from a source (`hf://`, `s3://`, `file://`, `pypi://`), and then the lock has the digests of the
files that are served, or it is made on this machine from another entry by a recipe. What a calibration computes differs
in the last bits between CPUs, and so does what it rounds to: for such an entry the lock pins the recipe, its settings
and its input, and the cache records the digests when it is made.

An entry with `digests: unknown` has the facts that planning needs and nothing to compare files with: it can be planned
with, and must be filled in before it is deployed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import StringConstraints, ValidationError
from yaml import YAMLError

from infra.findings import ConfigError, Finding, did_you_mean, nearest
from infra.paths import ROOT
from infra.weights import text
from infra.weights.entry import Calibration, FileFact, Format, LockEntry
from infra.weights.facts import Experts, Mla, ModelFacts, Recurrent, Sliding, Strict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["LOCK", "Calibration", "FileFact", "Format", "LockEntry", "ModelFacts", "WeightsLock", "load"]

LOCK = ROOT / "stacks" / "models.lock.yaml"
CALIBRATION = "FLEET_CALIBRATION"
"""Environment variable that replaces every entry's calibration, `<prompts>x<tokens>`: tests need a model that is made
fast, not a good one. It is part of the entry's digest, so such a model never stands in for the real one."""
CONVERTER = "vllm-0.32.0"
"""The virtual environment that GGUF files are dequantised in: another version of transformers may write other bytes."""
QUANTIZER = "llmcompressor-0.14.0.1"
"""The virtual environment that recipes run in."""

SHAPE = ("layers", "hidden_size", "attention_heads", "kv_heads", "head_dim")
"""Facts that quantisation leaves as they are."""


class WeightsLock(Strict):
    """The whole file."""

    models: dict[Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")], LockEntry]

    def digest(self, name: str) -> str:
        """SHA-256 of an entry's content: of its files, or of recipe, settings and input where it is made here.

        While the digests of the files are unknown it stands for the source, and changes when they are filled in.
        """
        entry = self.models[name]
        if entry.digests:
            content: dict[str, Any] = {"source": entry.source}
        elif entry.made_from is None:
            content = {path: file.sha256 for path, file in entry.files.items()}
        else:
            content = {
                "input": self.digest(entry.made_from),
                "tool": QUANTIZER,
                "format": entry.format,
                "calibration": entry.calibration.model_dump() if entry.calibration else None,
                "recipe": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in recipe_files(entry)},
            }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def folder(self, name: str) -> str:
        """Name of an entry's folder in the cache."""
        return f"{name}-{self.digest(name)[:12]}"

    def variants(self, name: str) -> dict[str, LockEntry]:
        """The entries that are the same model in another format."""
        return {other: entry for other, entry in self.models.items() if name in {entry.made_from, entry.variant_of}}

    def unknown(self, name: str) -> str | None:
        """The entry that must be filled in before this one can be had: itself, what it is made from, or none."""
        entry = self.models[name]
        if entry.made_from is not None:
            return self.unknown(entry.made_from)
        return name if entry.digests else None

    def no_digests(self, name: str, where: str) -> Finding | None:
        """What is wrong with serving an entry, if that is that nothing could tell what is fetched."""
        if (unknown := self.unknown(name)) is None:
            return None
        problem = f"the lock has no digests of `{unknown}` yet, so nothing could tell what is fetched"
        return Finding(where, problem, f"`fleet lock fill {unknown}` asks its source, {self.models[unknown].source}")


MODELS = (WeightsLock, LockEntry, FileFact, Calibration, ModelFacts, Mla, Sliding, Recurrent, Experts)


def recipe_files(entry: LockEntry) -> tuple[Path, ...]:
    """What decides how an entry is made: its recipe and the prompts beside it."""
    recipe = ROOT / str(entry.recipe)
    return recipe, recipe.with_name("calibration.txt")


def load(path: Path = LOCK, environ: Mapping[str, str] = os.environ) -> WeightsLock:
    """Read and check a lock.

    Raises:
        ConfigError: With everything that is wrong in it.
    """
    lock = parse(read(path), path.name)
    return _recalibrated(lock, environ[CALIBRATION]) if environ.get(CALIBRATION) else lock


def read(path: Path) -> str:
    """A lock's text.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        problem, fix = f"cannot be read: {error.strerror}", "restore it from version control"
    except UnicodeDecodeError as error:
        problem, fix = f"is not YAML: {error}", "mend it by hand or restore it"
    raise ConfigError([Finding(path.name, problem, fix)])


def parse(content: str, file: str) -> WeightsLock:
    """Check a lock.

    Args:
        content: Its text.
        file: What to call it.

    Raises:
        ConfigError: With everything that is wrong in it.
    """
    try:
        lock = WeightsLock.model_validate(text.parse(content))
    except YAMLError as error:
        raise ConfigError([Finding(file, f"is not YAML: {error}", "mend it by hand or restore it")]) from None
    except ValidationError as error:
        raise ConfigError([_finding(file, problem) for problem in error.errors()]) from None
    if findings := list(_cross_checks(file, lock)):
        raise ConfigError(findings)
    return lock


def _finding(file: str, problem: Any) -> Finding:
    """One of pydantic's errors, in the words of this file."""
    *parents, key = [str(part) for part in problem["loc"]] or [""]
    where = f"{file}: " + ".".join([*parents, key]).removesuffix(".[key]")
    match problem["type"]:
        case "extra_forbidden":
            near = nearest(key, {name for model in MODELS for name in model.model_fields})
            return Finding(where, "is not a key of the lock", f"did you mean `{near}`?" if near else "remove it")
        case "missing":
            return Finding(where, "is missing", "`fleet lock add` writes complete entries")
        case "value_error":
            return Finding(where, str(problem["ctx"]["error"]))
        case "string_pattern_mismatch" if key == "sha256":
            return Finding(where, f"{problem['input']!r} is no SHA-256", "64 lower-case hex digits")
        case _:
            return Finding(where, problem["msg"])


def _cross_checks(file: str, lock: WeightsLock) -> Iterator[Finding]:
    """What one entry alone cannot know."""
    for name, entry in lock.models.items():
        where = f"{file}: models.{name}"
        if base := entry.made_from or entry.variant_of:
            key = f"{where}.{'made_from' if entry.made_from else 'variant_of'}"
            yield from _base_checks(key, entry, base, lock)
        for path in recipe_files(entry) if entry.made_from else ():
            if not path.is_file():
                problem = f"needs {path.relative_to(ROOT)}, which does not exist"
                yield Finding(f"{where}.recipe", problem, "name a recipe of nodeconfig/cache")


def _base_checks(where: str, entry: LockEntry, name: str, lock: WeightsLock) -> Iterator[Finding]:
    """What is wrong with the entry that another one was quantised from."""
    base = lock.models.get(name)
    if base is None:
        yield Finding(where, f"there is no entry `{name}`", did_you_mean(name, lock.models))
    elif base.made_from is not None:
        yield Finding(where, f"`{name}` is itself made here", "name an entry with a `source`")
    elif base.variant_of is not None:
        yield Finding(where, f"`{name}` is itself a variant", "name the entry that is not quantised")
    else:
        for key in SHAPE:
            here, there = getattr(entry.facts, key), getattr(base.facts, key)
            if here != there:
                yield Finding(where, f"`{name}` is another model: {key} is {there} there and {here} here")


def _recalibrated(lock: WeightsLock, text: str) -> WeightsLock:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ConfigError(
            [Finding(CALIBRATION, f"{text!r} is no calibration", "write <prompts>x<tokens>, such as 4x48, or unset it")]
        )
    calibration = Calibration(prompts=int(match[1]), tokens=int(match[2]))
    models = {
        name: entry.model_copy(update={"calibration": calibration}) if entry.made_from else entry
        for name, entry in lock.models.items()
    }
    return WeightsLock(models=models)
