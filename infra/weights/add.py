"""`fleet lock add` and `fill`: find out everything that the lock has of a model, and write it there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from infra.findings import Finding, did_you_mean
from infra.weights import hub, s3, text
from infra.weights.config_json import facts_from_config
from infra.weights.entry import Format, LockEntry
from infra.weights.facts import ModelFacts
from infra.weights.files import WeightsError
from infra.weights.lock import LOCK, load, parse, read
from infra.weights.origins import Bucket, Folder, Hub, Package, parse_source
from infra.weights.progress import Say, silent
from infra.weights.sources import Found, find_in_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

DTYPES: dict[str, Format] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HELPERS = ("scale", "scales", "scale_inv", "zero_point", "zeros", "g_idx", "shape")
"""How the names of tensors end that a quantised format adds; they are no parameters of the model."""
PACKED = ("weight_packed", "qweight")
"""How the names of tensors end that hold several parameters in each 32-bit integer."""


def add(
    source: str, name: str | None = None, *, variant_of: str | None = None, path: Path = LOCK, say: Say = silent
) -> tuple[str, LockEntry]:
    """Lock a model: its commit, the size and SHA-256 of every file, its licence and what its configuration says.

    Weights are not downloaded where the source tells their digests. An entry of the same name is replaced; comments and
    the rest of the file stay as they are.

    Args:
        source: `hf://org/name`, `hf://org/name@branch, tag or commit`, `s3://bucket/prefix` or `file:///folder`.
        name: What to call it; by default the last part of the source in lower case.
        variant_of: The entry that it is a quantised edition of.
        path: The lock.
        say: Told how far it is.

    Returns:
        The name and the entry.

    Raises:
        WeightsError: the model cannot be read, or is none that the lock can hold.
        ConfigError: the lock itself is wrong.
    """
    load(path)
    found = _find(source, say)
    entry = _entry(found, found.licence or "unknown", variant_of)
    name = name or _title(source).lower().replace("_", "-")
    _write(path, name, entry)
    return name, entry


def fill(name: str, path: Path = LOCK, say: Say = silent) -> tuple[str, LockEntry]:
    """Ask the source of an entry with `digests: unknown` for them, and pin its revision.

    Facts are read anew and what differs is said; name, comments and what it is a variant of stay.

    Args:
        name: The entry, or one that is made from it.
        path: The lock.
        say: Told how far it is.

    Returns:
        The name and the entry.

    Raises:
        WeightsError: there is no such entry, or its source does not give what is needed.
        ConfigError: the lock itself is wrong.
    """
    lock = load(path)
    if name not in lock.models:
        raise WeightsError([Finding(f"{path.name}: models", f"has no `{name}`", did_you_mean(name, lock.models))])
    name = lock.unknown(name) or name
    before = lock.models[name]
    if not before.digests:
        say(f"{name}: its digests are known already")
        return name, before
    found = _find(before.source or "", say)
    entry = _entry(found, found.licence or before.licence, before.variant_of)
    old, new = _flat(before), _flat(entry)
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            say(f"{name}: {key} was {old.get(key)} and is {new.get(key)}")
    _write(path, name, entry)
    return name, entry


def _find(source: str, say: Say) -> Found:
    try:
        origin = parse_source(source)
    except ValueError:
        origin = None
    match origin:
        case Hub():
            return hub.find(origin, say)
        case Bucket():
            return s3.find(origin, say)
        case Folder():
            return find_in_folder(origin, say)
        case Package() | None:
            fix = "write hf://org/name@revision, s3://bucket/prefix or file:///absolute/folder"
            raise WeightsError([Finding(source, "cannot be locked", fix)])


def _title(source: str) -> str:
    origin = parse_source(source)
    named = origin.repository if isinstance(origin, Hub) else source
    return named.rstrip("/").rpartition("/")[2]


def _flat(entry: LockEntry) -> dict[str, Any]:
    facts = entry.facts.model_dump(exclude_none=True, exclude_defaults=True)
    return {"licence": entry.licence, "format": entry.format, **facts}


def _entry(found: Found, licence: str, variant_of: str | None) -> LockEntry:
    try:
        facts = _facts(found)
        kind = _format(found.config, facts)
    except (KeyError, ValueError) as error:
        problem = f"its config.json lacks {error}" if isinstance(error, KeyError) else str(error)
        fix = "only decoder language models of known shape can be locked"
        raise WeightsError([Finding(found.source, problem, fix)]) from None
    return LockEntry(
        source=found.source,
        variant_of=variant_of,
        licence=licence,
        format=kind,
        facts=facts,
        files=dict(sorted(found.files.items())),
    )


def _facts(found: Found) -> ModelFacts:
    """From config.json; what the headers of the safetensors files say is exact, and replaces what was computed."""
    tensors = {name: tensor for file in found.metadata.files_metadata.values() for name, tensor in file.tensors.items()}
    weights_bytes = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values())
    packed = 32 // _bits(found.config)
    parameters = sum(
        tensor.parameter_count * (packed if name.endswith(PACKED) else 1)
        for name, tensor in tensors.items()
        if not name.endswith(HELPERS)
    )
    exact = {
        "parameters": parameters,
        "weights_bytes": weights_bytes,
        "tied_embeddings": not any("lm_head." in name for name in tensors),
    }
    return facts_from_config(found.config, weights_bytes).model_copy(update=exact)


def _bits(config: Mapping[str, Any]) -> int:
    """Bits of a parameter that is packed with others."""
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups") or {}
    bits = [quantization.get("bits"), *(group["weights"]["num_bits"] for group in groups.values())]
    return next((int(count) for count in bits if count), 4)


def _format(config: Mapping[str, Any], facts: ModelFacts) -> Format:
    quantization = config.get("quantization_config")
    if not quantization:
        return DTYPES[facts.dtype]
    method = quantization.get("quant_method")
    if method in {"fp8", "awq", "gptq"}:
        return cast("Format", method)
    if method == "compressed-tensors":
        groups = list(quantization.get("config_groups", {}).values())
        weights = {(group["weights"]["num_bits"], group["weights"]["type"]) for group in groups}
        inputs = {bool(group.get("input_activations")) for group in groups}
        known: dict[tuple[Any, ...], Format] = {
            (8, "int", True): "w8a8-int8",
            (8, "float", True): "fp8",
            (4, "int", False): "w4a16",
        }
        if len(weights) == 1 and len(inputs) == 1 and (format_ := known.get((*weights.pop(), inputs.pop()))):
            return format_
    raise ValueError(f"it is quantised in a way that has no name in the lock ({method})")


def _write(path: Path, name: str, entry: LockEntry) -> None:
    """Put an entry into the lock, in one step, if the lock is still right with it."""
    try:
        content = text.with_entry(read(path), name, entry.model_dump(exclude_none=True, exclude_defaults=True))
    except ValueError as error:
        raise WeightsError([Finding(path.name, f"cannot be added to: {error}", "write it so")]) from None
    parse(content, path.name)
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
