"""Where weights come from: what all sources share, and the plainest of them, a folder.

All of them fill a folder beside the final one. Files that are already right there stay, and a transfer that was cut off
goes on where it ended.
"""

from __future__ import annotations

import fnmatch
import json
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from infra.findings import Finding
from infra.weights.entry import FileFact
from infra.weights.files import CHUNK, Mismatch, WeightsError, difference, sha256, sync
from infra.weights.origins import Folder
from infra.weights.progress import POLL_S, Progress, Say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from huggingface_hub import SafetensorsRepoMetadata

    Fetch = Callable[[str, FileFact, "Sink", int], None]
    """Write a file's bytes from an offset on: path, what it must be, where to, offset."""

T = TypeVar("T")
WORKERS = 8
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.tiktoken", "merges.txt", "vocab.txt", "tokenizer.model")
"""What an engine reads besides the safetensors files; all of it at the top of a repository."""


@dataclass(frozen=True)
class Found:
    """What a source has of a model."""

    source: str
    """Itself, pinned as far as it can be."""
    files: dict[str, FileFact]
    config: dict[str, Any]
    """Its config.json."""
    metadata: SafetensorsRepoMetadata
    licence: str | None = None
    """Where the source tells."""


class Stopped(Exception):  # noqa: N818 - no error: another file failed first
    """The transfer was given up."""


class Sink:
    """A file that counts what is written, and can be told to stop."""

    def __init__(self, stream: IO[bytes], progress: Progress, stop: threading.Event) -> None:
        self._stream = stream
        self._progress = progress
        self._stop = stop

    def write(self, data: bytes) -> int:
        """Append."""
        if self._stop.is_set():
            raise Stopped
        self._progress.add(len(data))
        return self._stream.write(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self._stream.tell()

    def seek(self, offset: int) -> int:
        """Go back to an offset."""
        return self._stream.seek(offset)

    def truncate(self) -> int:
        """Drop what follows; the hub's client does that when a server cannot resume."""
        return self._stream.truncate()


def transfer(files: Mapping[str, FileFact], part: Path, fetch: Fetch, say: Say, what: str) -> list[Mismatch]:
    """Bring several files at once into a folder, each to the byte what it must be.

    Returns:
        The files that are something else at their source; they are not kept.
    """
    progress = Progress(say, what, sum(fact.size for fact in files.values()))
    stop = threading.Event()

    def one(path: str) -> Mismatch | None:
        fact, target = files[path], part / path
        target.parent.mkdir(parents=True, exist_ok=True)
        offset = target.stat().st_size if target.exists() else 0
        if offset > fact.size:
            offset = 0
        for start in dict.fromkeys((offset, 0)):
            progress.add(start)
            with target.open("r+b" if start else "wb") as stream:
                stream.seek(start)
                fetch(path, fact, Sink(stream, progress, stop), start)
            sync(target)
            problem = difference(target, fact)
            if problem is None:
                return None
            # What an interrupted run had left may have been damaged: once more from the start.
            target.unlink()
        return Mismatch(path, str(problem))

    return [mismatch for mismatch in each(list(files), one, progress, stop) if mismatch]


def each(paths: Sequence[str], one: Callable[[str], T], progress: Progress, stop: threading.Event) -> list[T]:
    """Do the same to several files at once, and say how far it is. The first failure stops the others."""
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(one, path) for path in paths]
        try:
            _await(futures, progress)
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return [future.result() for future in futures]


def _await(futures: Sequence[Future[T]], progress: Progress) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        progress.tick()


def wanted(path: str, metadata: SafetensorsRepoMetadata) -> bool:
    """An engine reads this file."""
    beside = "/" not in path and any(fnmatch.fnmatchcase(path, pattern) for pattern in BESIDE_WEIGHTS)
    return path in metadata.files_metadata or beside


def read_config(folder: Path, source: str) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        WeightsError: there is none, or it is no JSON.
    """
    try:
        return cast("dict[str, Any]", json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WeightsError([Finding(source, f"has no readable config.json: {error}")]) from None


def read_metadata(folder: Path, source: str) -> SafetensorsRepoMetadata:
    """Names, types and shapes of the tensors, from the headers of the safetensors files.

    Raises:
        WeightsError: there are none, or they cannot be read.
    """
    from huggingface_hub import errors, get_local_safetensors_metadata  # noqa: PLC0415 - slow to import, rarely needed

    try:
        return get_local_safetensors_metadata(folder)
    except (OSError, ValueError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
        raise no_weights(error, source) or WeightsError([Finding(source, f"cannot be read: {error}")]) from None


def no_weights(error: Exception, source: str) -> WeightsError | None:
    """What it means that the hub's client finds no safetensors files that it can read, or None if it is not that."""
    from huggingface_hub import errors  # noqa: PLC0415 - slow to import, rarely needed

    if isinstance(error, errors.NotASafetensorsRepoError):
        return WeightsError([Finding(source, "has no safetensors files", "convert it, or lock a repository that has")])
    if isinstance(error, errors.SafetensorsParsingError | FileNotFoundError):
        return WeightsError([Finding(source, f"cannot be read: {error}")])
    return None


def find_in_folder(origin: Folder, say: Say) -> Found:
    """What a folder has; every file is read.

    Raises:
        WeightsError: it cannot be read, or is no model in safetensors.
    """
    source = f"file://{origin.path}"
    metadata = read_metadata(origin.path, source)
    paths = [file for file in sorted(origin.path.iterdir()) if file.is_file() and wanted(file.name, metadata)]
    progress = Progress(say, "reading", sum(file.stat().st_size for file in paths))
    locked = {file.name: FileFact(size=file.stat().st_size, sha256=sha256(file, progress.advance)) for file in paths}
    return Found(source, locked, read_config(origin.path, source), metadata)


def fetch_from_folder(source: Folder, where: str) -> Fetch:
    """Files of a folder on this machine."""

    def fetch(path: str, _fact: FileFact, sink: Sink, offset: int) -> None:
        origin = source.path / path
        try:
            stream = origin.open("rb")
        except OSError as error:
            raise WeightsError(
                [Finding(where, f"{origin} cannot be read: {error.strerror}", "put it there, or change the source")]
            ) from None
        with stream:
            stream.seek(offset)
            while chunk := stream.read(CHUNK):
                sink.write(chunk)

    return fetch
