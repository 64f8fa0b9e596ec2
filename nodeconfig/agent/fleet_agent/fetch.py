"""Bring a node's weights from the stack's bucket to its disk, and compare every byte with its digest on the way.

    <folder>/<path>.partial     the beginning of a file; a later run goes on where it ends
    <folder>/<path>             a whole file, compared with its digest
    <folder>/.verified.json     written last: all files are there (verified.py); what is so is not fetched again

A file is one request (bucket.py). Its bytes come in order, so they are written and hashed in one pass, and what a
killed run left of it is a beginning that can be gone on with. Several files at once keep the cores busy that hash.

Why the Common Runtime and not threads of our own, on 2 cores with the server beside it on loopback, 2.4 GB to memory,
digests included: over TLS 380 to 450 MB/s and 3.0 s of CPU time a GB, where sixteen threads with boto3 had 330 to 430
MB/s and 3.8 s; without TLS the threads were faster (570 to 650 against 440 to 490 MB/s). Threads hold Python's lock
around every 16 KB record, the runtime once for 8 MiB: what that is worth on more cores was not measured. It also
splits, repeats and orders the ranges itself. s5cmd compares nothing and is one more program to install.
`bench/s3_fetch.py` compares with it and with `aws s3 sync` (2026-11).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fleet_agent import verified
from fleet_agent.bucket import Cache, Denied, Late, Passing, Refused, refill
from fleet_agent.machine import AgentError

Files = dict[str, dict[str, Any]]
"""Path to `size` and `sha256`."""
Say = Callable[[str], None]
T = TypeVar("T")

AT_ONCE = 16
"""Files on their way at a time."""
CHUNK = 4 << 20
SAY_S = 5.0
PARTIAL = ".partial"
OURS = re.compile(r"[a-z0-9][a-z0-9.-]*-[0-9a-f]{12}")
"""Names of folders that this program makes, and may remove."""
FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Patience:
    """How long to wait for what."""

    limit_s: float | None = None
    """With nothing moving at all; None: whoever started this program ends it."""
    poll_s: float = 5.0
    """Between two looks at a cache that is being filled."""
    first_s: float = 1.0
    """Before the second try after a failure; doubled each time, up to half a minute."""
    denied_s: float = 60.0
    """For permissions: a role that was made a moment ago is not known everywhere at once."""


@dataclass(frozen=True)
class Entry:
    """One of weights.json."""

    name: str
    prefix: str
    folder: Path
    files: Files | None
    """None: they were made by a recipe, and `.complete` in the bucket has them."""


def fetch(  # noqa: PLR0913 - what a fetch is made of
    file: Path,
    bucket: str,
    region: str,
    *,
    root: Path | None = None,
    patience: Patience = Patience(),
    say: Say | None = None,
) -> None:
    """Have every entry of a weights.json on this disk.

    Args:
        file: The weights.json.
        bucket: Of the stack.
        region: Where the bucket is.
        root: The machine's folder; entries that a bundle in it names are not removed to make room.
        patience: How long to wait.
        say: Told how far it is; standard output by default.

    Raises:
        Refused: They cannot be had; the text says why and what to do.
        Late: They could not be had within `patience.limit_s`.
    """
    say = say or _print
    entries = read_entries(file)
    pending = [entry for entry in entries if not there(entry)]
    for entry in entries:
        if entry not in pending:
            say(f"{entry.name} weights: there and verified in {entry.folder}")
    if not pending:
        return
    where = pending[0].folder.parent
    try:
        where.mkdir(parents=True, exist_ok=True)
        with _held(where / ".lock", say):
            keep = {entry.folder for entry in entries} | (named(root) if root else set())
            _Run(Cache(bucket, region), patience, say, keep).bring([entry for entry in pending if not there(entry)])
    except OSError as error:
        if error.errno in FULL:
            raise Refused(f"the disk of {where} became full: free space there, or give the node a larger one") from None
        raise Refused(f"{error.filename or where}: {error.strerror or error}: see that it can be written to") from None


def read_entries(file: Path) -> list[Entry]:
    """What a weights.json names.

    Raises:
        Refused: it is not one.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["entries"]
        return [Entry(one["name"], one["prefix"].rstrip("/"), Path(one["folder"]), one["files"]) for one in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{file} is no weights.json: {error!r}: apply the bundle again") from None


def named(root: Path) -> set[Path]:
    """The folders that any bundle on this machine names: one of them may be running."""
    found: set[Path] = set()
    for file in (root / "bundles").rglob("weights.json"):
        try:
            found |= {entry.folder for entry in read_entries(file)}
        except AgentError:
            continue
    return found


def there(entry: Entry) -> bool:
    """All of it was verified, and nobody wrote to it since. Asks nobody."""
    known = verified.read(entry.folder)
    if entry.files is None:  # the folder's name has the digest of the entry: what it was verified to be still holds
        try:
            record = json.loads((entry.folder / verified.RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(known) and known.keys() == record.keys()
    return known == {path: fact["sha256"] for path, fact in entry.files.items()}


class _Progress:
    """Counts bytes, in any thread; one line every few seconds."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._said = -SAY_S
        self.what = ""
        self.total = self.done = self.fetched = 0
        self.trouble = ""
        self.moved = self.start = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque(maxlen=4)

    def begin(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.fetched = what, total, 0, 0
        self.start = time.monotonic()
        self._seen.clear()
        self._seen.append((self.start, 0))

    def add(self, count: int, *, fetched: bool = True) -> None:
        with self._lock:
            self.done += count
            if fetched:
                self.fetched += count
                self.trouble = ""
            self.moved = time.monotonic()

    def take_back(self, count: int) -> None:
        with self._lock:
            self.done -= count

    def tick(self, text: str = "") -> None:
        """Say how far it is, or `text`, unless something was said a moment ago."""
        now = time.monotonic()
        if now - self._said < SAY_S:
            return
        self._said = now
        self._say(text or self._line(now))

    def _line(self, now: float) -> str:
        since, before = self._seen[0]
        self._seen.append((now, self.fetched))
        rate = (self.fetched - before) / max(now - since, 1e-6)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate > 0 else self.trouble or "waiting for S3"
        return f"{self.what}: {of(self.done, self.total)}, {size(rate)}/s, {left}"


class _Run:
    """One run: what is there, what is missing, how long was waited."""

    def __init__(self, cache: Cache, patience: Patience, say: Say, keep: set[Path]) -> None:
        self._cache = cache
        self._patience = patience
        self._say = say
        self._keep = keep
        self._progress = _Progress(say)
        self._stop = threading.Event()
        self._start = time.monotonic()

    def bring(self, pending: Sequence[Entry]) -> None:
        """Every entry, as soon as the cache has it."""
        left = list(pending)
        while left:
            ready = [(entry, found) for entry in left if (found := self._persist(_complete(self._cache, entry)))]
            for entry, complete in ready:
                self._entry(entry, entry.files or complete)
                left.remove(entry)
            if left and not ready:
                waited = time.monotonic() - self._start
                names = ", ".join(entry.name for entry in left)
                missing = f"s3://{self._cache.bucket}/{left[0].prefix}/.complete"
                text = f"the cache is being filled, {missing} is not there yet"
                self._progress.tick(f"{names} weights: {text}, {waited:.0f} s")
                self._wait(self._patience.poll_s, text)

    def _entry(self, entry: Entry, files: Files) -> None:
        self._check_paths(entry, files)
        entry.folder.mkdir(parents=True, exist_ok=True)
        (entry.folder / verified.RECORD).unlink(missing_ok=True)
        for path in listing(entry.folder):
            if path.removesuffix(PARTIAL) not in files:
                (entry.folder / path).unlink()
        self._check_sizes(entry, files)
        self._make_room(entry, files)
        progress = self._progress
        total = sum(fact["size"] for fact in files.values())
        progress.begin(f"{entry.name} weights", total)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            largest_first = sorted(files, key=lambda path: -files[path]["size"])
            futures = [pool.submit(self._file, entry, path, files[path]) for path in largest_first]
            try:
                self._await(futures)
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise
        verified.write(entry.folder, files)
        took = time.monotonic() - progress.start
        rate = size(progress.fetched / max(took, 1e-6))
        self._say(
            f"{entry.name} weights: {size(total)} verified, {size(progress.fetched)} fetched, {took:.0f} s, {rate}/s"
        )

    def _await(self, futures: Sequence[Future[None]]) -> None:
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if pending:
                self._progress.tick()

    def _check_paths(self, entry: Entry, files: Files) -> None:
        """A list that somebody else could write to must not name a file outside the folder."""
        for path in files:
            pure = PurePosixPath(path)
            if not path or str(pure) != path or pure.is_absolute() or ".." in pure.parts or path == verified.RECORD:
                raise Refused(f"{entry.name} weights: `{path}` is no path of a file in the entry's folder")

    def _check_sizes(self, entry: Entry, files: Files) -> None:
        """Before anything is read: one request tells of all."""
        found = self._persist(lambda: self._cache.sizes(entry.prefix))
        wrong = [
            f"{path}: " + (f"has {found[path]} bytes, wanted {fact['size']}" if path in found else "is not there")
            for path, fact in files.items()
            if found.get(path) != fact["size"]
        ]
        if wrong:
            prefix = f"s3://{self._cache.bucket}/{entry.prefix}"
            raise Refused(f"{entry.name} weights: {prefix} is not what was locked\n" + self._lines(wrong, entry))

    def _make_room(self, entry: Entry, files: Files) -> None:
        where = entry.folder.parent
        here = {path: stat.st_size for path, stat in listing(entry.folder).items()}
        needed = sum(fact["size"] for fact in files.values()) - sum(here.values())
        old = [folder for folder in where.iterdir() if OURS.fullmatch(folder.name) and folder not in self._keep]
        for folder in sorted((one for one in old if one.is_dir()), key=lambda one: one.stat().st_mtime):
            if shutil.disk_usage(where).free >= needed:
                break
            self._say(f"{entry.name} weights: removing {folder}, which no bundle names, to make room")
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(where).free
        if free < needed:
            raise Refused(
                f"{entry.name} weights need {size(needed)} ({needed} bytes) more in {where}, and {size(free)} ({free} "
                "bytes) are free: nothing was fetched. Choose an instance type with more local disk, or a larger volume"
            )

    def _file(self, entry: Entry, path: str, fact: Mapping[str, Any]) -> None:
        """One file, whole and right; in a thread of its own."""
        target = entry.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + PARTIAL)
        if target.exists():  # of a run that was killed before it wrote its record
            target.replace(partial)
        for attempt in (1, 2):
            found = self._once(f"{entry.prefix}/{path}", partial, fact)
            if found == fact["sha256"]:
                partial.replace(target)
                return
            partial.unlink()
            self._progress.take_back(fact["size"])
            if attempt == 1:
                self._say(
                    f"{entry.name} weights: {path} has SHA-256 {found}, wanted {fact['sha256']}: fetching it again"
                )
        wrong = f"{path}: has SHA-256 {found}, wanted {fact['sha256']}"
        raise Refused(
            f"{entry.name} weights: the cache has another file than was locked\n" + self._lines([wrong], entry)
        )

    def _once(self, key: str, partial: Path, fact: Mapping[str, Any]) -> str:
        """What is missing of a file; the SHA-256 of all of it."""
        digest = hashlib.sha256()
        wanted = int(fact["size"])
        with partial.open("a+b", buffering=0) as stream:
            here = stream.seek(0, os.SEEK_END)
            if here > wanted:
                here = stream.truncate(0)
            stream.seek(0)
            while chunk := stream.read(min(CHUNK, here - stream.tell())):
                digest.update(chunk)
                self._progress.add(len(chunk), fetched=False)
                self._go_on()

            def take(chunk: bytes) -> None:
                self._go_on()
                view = memoryview(chunk)
                while view:
                    view = view[stream.write(view) :]
                digest.update(chunk)
                self._progress.add(len(chunk))

            def rest() -> None:
                if (start := stream.tell()) < wanted:
                    self._cache.read(key, start, wanted, take)
                    if stream.tell() < wanted:
                        raise Passing("the answer ended early")

            self._persist(rest)
            os.fsync(stream.fileno())
        return digest.hexdigest()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise OSError(errno.ECANCELED, "another file failed")

    def _persist(self, call: Callable[[], T]) -> T:
        """Try until it heals.

        Raises:
            Refused: it is no passing trouble.
            Late: nothing moved for too long.
        """
        patience = self._patience
        pause = patience.first_s
        moved = self._progress.fetched
        while True:
            try:
                return call()
            except Denied as error:
                trouble = str(error)
                if time.monotonic() - self._start >= patience.denied_s:
                    raise Refused(trouble) from None
            except Passing as error:
                trouble = str(error)
            if self._progress.fetched > moved:
                moved, pause = self._progress.fetched, patience.first_s
            self._progress.trouble = f"{trouble}: trying again"
            if threading.current_thread() is threading.main_thread():
                self._progress.tick(f"weights: {trouble}: trying again")
            self._wait(pause, trouble)
            pause = min(2 * pause, 30.0)

    def _wait(self, seconds: float, why: str) -> None:
        """Sleep, unless nothing moved for too long."""
        limit = self._patience.limit_s
        if limit is not None:
            left = self._progress.moved + limit - time.monotonic()
            if left <= 0:
                raise Late(f"weights: nothing came for {limit:.0f} s: {why}. What is there is kept for the next run")
            seconds = min(seconds, left)
        if self._stop.wait(seconds):
            self._go_on()

    def _lines(self, wrong: Sequence[str], entry: Entry) -> str:
        fix = refill(self._cache.bucket, entry.prefix)
        return "".join(f"  {line}\n" for line in wrong) + f"Find out who wrote there; then {fix}"


def _complete(cache: Cache, entry: Entry) -> Callable[[], Files | None]:
    return lambda: cache.complete(entry.prefix)


def listing(folder: Path) -> dict[str, os.stat_result]:
    """Every file below a folder, by relative path."""
    return {
        file.relative_to(folder).as_posix(): file.stat(follow_symlinks=False)
        for file in sorted(folder.rglob("*"))
        if not file.is_dir() or file.is_symlink()
    }


def size(count: float) -> str:
    """Bytes for people: `412 bytes`, `93.1 MB`, `1.2 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def of(done: int, total: int) -> str:
    """`34.1 of 70.6 GB`."""
    number, unit = size(total).split()
    factor = {"GB": 1e9, "MB": 1e6, "kB": 1e3}.get(unit)
    return f"{done / factor:.1f} of {number} {unit}" if factor else f"{done} of {total} bytes"


@contextmanager
def _held(path: Path, say: Say) -> Iterator[None]:
    """One run at a time; the lock ends with its process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("weights: waiting for another run that fetches to this disk")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
