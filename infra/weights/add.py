"""`fleet lock add`: find out everything that the lock has of a model, and write it there."""

from __future__ import annotations

import fnmatch
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from infra.findings import Finding
from infra.weights import files
from infra.weights.files import WeightsError
from infra.weights.lock import LOCK, FileFact, Format, LockEntry, ModelFacts, load
from infra.weights.progress import Progress, Say, silent
from infra.weights.sources import hub_endpoint, hub_error, hub_failures

if TYPE_CHECKING:
    from huggingface_hub import SafetensorsRepoMetadata

BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.tiktoken", "merges.txt", "vocab.txt", "tokenizer.model")
"""What an engine reads besides the safetensors files; all of it at the top of a repository."""
DTYPES: dict[str, Format] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HELPERS = ("scale", "scale_inv", "zero_point", "zeros", "g_idx", "shape")
"""How the names of tensors end that a quantised format adds; they are no parameters of the model."""
PACKED = ("weight_packed", "qweight")
PER_INT32 = 8
"""Parameters in one 32-bit integer of a 4-bit format."""
LINE_WIDTH = 4096  # longer than any line: none is broken when the file is written again


def add(source: str, name: str | None = None, path: Path = LOCK, say: Say = silent) -> tuple[str, LockEntry]:
    """Lock a model: its commit, the size and SHA-256 of every file, its licence and what its configuration says.

    Weights are not downloaded where the hub tells their digests. An entry of the same name is replaced; comments and
    the rest of the file stay as they are.

    Args:
        source: `hf://org/name`, `hf://org/name@branch, tag or commit`, or `file:///absolute/folder`.
        name: What to call it; by default the repository's or folder's own name in lower case.
        path: The lock.
        say: Told how far it is.

    Returns:
        The name and the entry.

    Raises:
        WeightsError: the model cannot be read, or is none that the lock can hold.
        ConfigError: the lock itself is wrong.
    """
    load(path)
    if source.startswith("hf://"):
        default, entry = _from_hub(source, say)
    elif source.startswith("file:///"):
        default, entry = _from_folder(source, say)
    else:
        raise WeightsError(
            [Finding(source, "cannot be locked", "write hf://org/name@revision or file:///absolute/folder")]
        )
    name = name or default
    _write(path, name, entry)
    return name, entry


def _from_hub(source: str, say: Say) -> tuple[str, LockEntry]:
    from huggingface_hub import HfApi, hf_hub_download  # noqa: PLC0415 - slow to import, and most runs do not need it

    repository, _, revision = source.removeprefix("hf://").partition("@")
    api = HfApi(endpoint=hub_endpoint())
    try:
        say(f"asking {api.endpoint} for {repository}")
        info = api.model_info(repository, revision=revision or "main", files_metadata=True)
        commit = str(info.sha)
        metadata = api.get_safetensors_metadata(repository, revision=commit)
        locked: dict[str, FileFact] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for sibling in info.siblings or []:
                path = sibling.rfilename
                if not _wanted(path, metadata):
                    continue
                if sibling.lfs and path != "config.json":
                    locked[path] = FileFact(size=sibling.lfs.size, sha256=sibling.lfs.sha256)
                else:
                    say(f"reading {path}")
                    file = hf_hub_download(repository, path, revision=commit, local_dir=scratch, endpoint=api.endpoint)
                    locked[path] = FileFact(size=Path(file).stat().st_size, sha256=files.sha256(Path(file), _ignore))
            config = _config(Path(scratch), source)
    except hub_failures() as error:
        raise _not_readable(error, source, repository) from None
    licence = getattr(info.card_data, "license", None) or "unknown"
    default = repository.rpartition("/")[2].lower().replace("_", "-")
    return default, _entry(f"hf://{repository}@{commit}", str(licence), locked, config, metadata)


def _from_folder(source: str, say: Say) -> tuple[str, LockEntry]:
    from huggingface_hub import get_local_safetensors_metadata  # noqa: PLC0415 - slow to import, rarely needed

    folder = Path(source.removeprefix("file://"))
    try:
        metadata = get_local_safetensors_metadata(folder)
    except hub_failures() as error:
        raise _not_readable(error, source, str(folder)) from None
    paths = [file for file in sorted(folder.iterdir()) if file.is_file() and _wanted(file.name, metadata)]
    progress = Progress(say, "reading", sum(file.stat().st_size for file in paths))
    locked = {
        file.name: FileFact(size=file.stat().st_size, sha256=files.sha256(file, progress.advance)) for file in paths
    }
    name = folder.name.lower().replace("_", "-")
    return name, _entry(source, "unknown", locked, _config(folder, source), metadata)


def _not_readable(error: Exception, source: str, repository: str) -> WeightsError:
    from huggingface_hub import errors  # noqa: PLC0415 - slow to import, and most runs do not need it

    if isinstance(error, errors.NotASafetensorsRepoError):
        return WeightsError([Finding(source, "has no safetensors files", "convert it, or lock a repository that has")])
    if isinstance(error, errors.SafetensorsParsingError | FileNotFoundError):
        return WeightsError([Finding(source, f"cannot be read: {error}")])
    return hub_error(error, repository, source)


def _wanted(path: str, metadata: SafetensorsRepoMetadata) -> bool:
    beside = "/" not in path and any(fnmatch.fnmatchcase(path, pattern) for pattern in BESIDE_WEIGHTS)
    return path in metadata.files_metadata or beside


def _config(folder: Path, source: str) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WeightsError([Finding(source, f"has no readable config.json: {error}")]) from None


def _entry(
    source: str,
    licence: str,
    locked: dict[str, FileFact],
    config: dict[str, Any],
    metadata: SafetensorsRepoMetadata,
) -> LockEntry:
    try:
        facts = _facts(config, metadata)
        kind = _format(config, facts)
    except (KeyError, ValueError) as error:
        problem = f"its config.json lacks {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(
            [Finding(source, problem, "only decoder language models of known shape can be locked")]
        ) from None
    return LockEntry(source=source, licence=licence, format=kind, facts=facts, files=dict(sorted(locked.items())))


def _facts(config: dict[str, Any], metadata: SafetensorsRepoMetadata) -> ModelFacts:
    """From config.json (names as in transformers; models with several parts have the decoder's in `text_config`)."""
    text = {**config, **config.get("text_config", {})}
    heads = text["num_attention_heads"]
    tensors = {name: tensor for file in metadata.files_metadata.values() for name, tensor in file.tensors.items()}
    return ModelFacts(
        architecture=config["architectures"][0],
        layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        attention_heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab_size=text["vocab_size"],
        max_positions=text["max_position_embeddings"],
        dtype=text.get("dtype") or text.get("torch_dtype") or "float32",
        tied_embeddings=not any(name.endswith("lm_head.weight") for name in tensors),
        parameters=sum(
            tensor.parameter_count * (PER_INT32 if name.endswith(PACKED) else 1)
            for name, tensor in tensors.items()
            if not name.endswith(HELPERS)
        ),
        weights_bytes=sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values()),
    )


def _format(config: dict[str, Any], facts: ModelFacts) -> Format:
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
        if len(weights) == 1 and len(inputs) == 1 and (found := known.get((*weights.pop(), inputs.pop()))):
            return found
    raise ValueError(f"it is quantised in a way that has no name in the lock ({method})")


def _write(path: Path, name: str, entry: LockEntry) -> None:
    yaml = YAML()
    yaml.width = LINE_WIDTH
    document = yaml.load(path)
    value = CommentedMap(entry.model_dump(exclude_none=True, exclude_defaults=True))
    value["files"] = CommentedMap({file: _flow(fact.model_dump()) for file, fact in entry.files.items()})
    if name not in document["models"]:
        document["models"].yaml_set_comment_before_after_key(name, before="\n")
    document["models"][name] = value
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            yaml.dump(document, stream)
        load(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _flow(value: dict[str, Any]) -> CommentedMap:
    line = CommentedMap(value)
    line.fa.set_flow_style()
    return line


def _ignore(_count: int) -> None:
    pass
