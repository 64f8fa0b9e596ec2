"""The model cache: one folder an entry of the lock, addressed by content, complete and verified or not there at all.

<name>-<digest>/                the files; every one was compared with the lock when the folder got its name
<name>-<digest>.digests.json    size and SHA-256 of each: copied from the lock, or recorded when the entry was made
<name>-<digest>.part/           what an interrupted run has so far; the next one goes on from there
<name>-<digest>.lock            held by the run that is at work
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.findings import Finding
from infra.paths import ROOT, engine_dir, weights_dir
from infra.weights import hub, programs, s3, sources
from infra.weights.entry import FileFact, LockEntry
from infra.weights.files import (
    FULL,
    Mismatch,
    WeightsError,
    compare,
    facts,
    full,
    held,
    listing,
    read_record,
    require_space,
    sync,
    write_record,
)
from infra.weights.lock import CONVERTER, LOCK, QUANTIZER, WeightsLock
from infra.weights.origins import Bucket, Folder, Hub, Package
from infra.weights.progress import ProgramError, Progress, Say, run, silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Place:
    """Where an entry is, or will be, and what every file of it must be."""

    folder: Path
    files: Mapping[str, Mapping[str, int | str]] | None
    """Path to size and SHA-256; None where they are known only once the entry was made on this machine."""
    record: Path | None
    """The file that then holds them."""


def place(name: str, lock: WeightsLock) -> Place:
    """Where an entry is or will be; looks at nothing."""
    folder = weights_dir() / lock.folder(name)
    entry = lock.models[name]
    if entry.made_from is not None:
        return Place(folder, None, record_of(folder))
    return Place(
        folder, {path: fact.model_dump(include={"size", "sha256"}) for path, fact in entry.files.items()}, None
    )


def record_of(folder: Path) -> Path:
    """The file beside a model's folder that has the digests of its files."""
    return folder.with_name(f"{folder.name}.digests.json")


def expected_files(entry: LockEntry, folder: Path) -> dict[str, FileFact]:
    """What every file of an entry must be: from the lock, or as recorded when it was made here.

    Raises:
        WeightsError: it is made on this machine and was not yet.
    """
    if entry.made_from is None:
        return dict(entry.files)
    recorded = read_record(record_of(folder))
    if recorded is None:
        raise WeightsError(
            [Finding(str(record_of(folder)), "there is no record of what was made here", "`pulumi up` makes it again")]
        )
    return recorded


def verify(folder: Path, entry: LockEntry, say: Say = silent) -> list[Mismatch]:
    """Compare every file with its digest; files that should not be there count as well.

    Raises:
        WeightsError: the entry is made on this machine and was not yet.
    """
    expected = expected_files(entry, folder)
    progress = Progress(say, "verifying", sum(fact.size for fact in expected.values()))
    return compare(folder, expected, progress.advance)


def ensure(name: str, lock: WeightsLock, say: Say = silent) -> Path:
    """Have an entry in the cache: fetched, converted or made, and every file compared with its digest.

    Returns at once where it is there and no file was touched since. A folder with a wrong file is mended. Two runs at
    once do not disturb each other: the second waits.

    Args:
        name: The entry.
        lock: What it must be.
        say: Called, in this thread, with how far it is, at least every other second.

    Returns:
        The folder of the model's files.

    Raises:
        WeightsError: it cannot be had; nothing wrong is left under the folder's name.
    """
    if finding := lock.no_digests(name, f"{LOCK.name}: models.{name}"):
        raise WeightsError([finding])
    root = weights_dir()
    build = _Build(name, lock, say)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if build.untouched():
            return build.folder
        with held(build.beside("lock"), say, name):
            if not build.untouched() and not build.intact():
                build.make()
    except OSError as error:
        if error.errno in FULL:
            raise full(root, f"the disk became full while {name} was written") from None
        raise WeightsError(
            [Finding(str(error.filename or root), f"{error.strerror or error}", "see that the cache can be written to")]
        ) from None
    return build.folder


class _Build:
    """One entry on its way into the cache."""

    def __init__(self, name: str, lock: WeightsLock, say: Say) -> None:
        self.name = name
        self.lock = lock
        self.say = say
        self.entry = lock.models[name]
        self.folder = weights_dir() / lock.folder(name)
        self.part = self.beside("part")
        self.record = record_of(self.folder)
        self.where = f"{LOCK.name}: models.{name}"

    def beside(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{suffix}")

    def expected(self) -> dict[str, FileFact] | None:
        return read_record(self.record) if self.entry.made_from is not None else dict(self.entry.files)

    def untouched(self) -> bool:
        """Every file is there with its size and older than the record: nobody wrote to it since it was verified."""
        expected = self.expected()
        if expected is None or not self.folder.is_dir() or not self.record.is_file():
            return False
        verified = self.record.stat().st_mtime_ns
        return {path: stat.st_size for path, stat in listing(self.folder).items() if stat.st_mtime_ns <= verified} == {
            path: fact.size for path, fact in expected.items()
        }

    def intact(self) -> bool:
        """Compare every file; what is wrong is said, and the folder loses its name."""
        if not self.folder.is_dir():
            return False
        expected = self.expected()
        if expected is not None:
            mismatches = self._compare(self.folder, expected)
            if not mismatches:
                write_record(self.record, expected)
                return True
            for mismatch in mismatches:
                self.say(f"{self.folder.name}/{mismatch}: making it again")
        shutil.rmtree(self.part, ignore_errors=True)
        self.folder.rename(self.part)
        return False

    def make(self) -> None:
        for leftover in self.folder.parent.glob(f"{self.folder.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.part.mkdir(exist_ok=True)
        if self.entry.made_from is not None:
            expected = self._made()
        else:
            expected = dict(self.entry.files)
            self._fetched(expected)
        for path in listing(self.part):
            sync(self.part / path)
        write_record(self.record, expected)
        self.part.rename(self.folder)
        sync(self.folder.parent)

    def _fetched(self, expected: dict[str, FileFact]) -> None:
        for mismatch in self._compare(self.part, expected):
            path = self.part / mismatch.path
            fact = expected.get(mismatch.path)
            # A shorter file is the beginning of a transfer that was cut off.
            if path.exists() and (fact is None or path.stat().st_size >= fact.size):
                path.unlink()
        missing = {path: fact for path, fact in expected.items() if not _complete(self.part / path, fact)}
        if not missing:
            return
        there = sum((self.part / path).stat().st_size for path in missing if (self.part / path).exists())
        needed = sum(fact.size for fact in missing.values()) - there
        # A package is in uv's cache and unpacked, both on this disk as a rule.
        needed += 2 * self.entry.download.size if self.entry.download else 0
        require_space(self.folder.parent, needed, self.name)
        origin = self.entry.origin
        if isinstance(origin, Package):
            mismatches = self._unpacked(missing)
        else:
            fetch = _fetch(origin, f"{self.where}.source")
            mismatches = sources.transfer(missing, self.part, fetch, self.say, "downloading")
        self._refuse(mismatches)

    def _unpacked(self, missing: dict[str, FileFact]) -> list[Mismatch]:
        with self._scratch() as scratch:
            model = programs.take_package(self.entry, scratch, self.say, f"{self.where}.source")
            mismatches = [
                mismatch for mismatch in self._compare(model, self.entry.files) if mismatch.path in self.entry.files
            ]
            wrong = {mismatch.path for mismatch in mismatches}
            for path in missing:
                if path not in wrong:
                    (self.part / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(model / path, self.part / path)
                    (self.part / path).chmod(0o644)
        return mismatches

    def _made(self) -> dict[str, FileFact]:
        """Run the recipe, unless an earlier run got as far as to record what it made."""
        entry = self.entry
        recorded = read_record(self.record)
        if recorded is not None and not self._compare(self.part, recorded):
            return recorded
        shutil.rmtree(self.part)
        self.part.mkdir()
        base = ensure(str(entry.made_from), self.lock, self.say)
        require_space(self.folder.parent, 2 * entry.size, self.name)
        assert entry.calibration is not None  # noqa: S101 - the lock was checked
        settings = (f"--prompts={entry.calibration.prompts}", f"--tokens={entry.calibration.tokens}")
        programs.install_quantizer(self.say, self.where)
        with self._scratch() as scratch:
            out = scratch / "model"
            recipe = [engine_dir(QUANTIZER) / "bin" / "python", ROOT / str(entry.recipe)]
            try:
                run(
                    [*recipe, f"--model={base}", f"--out={out}", *settings],
                    self.say,
                    "quantising",
                    cwd=scratch,
                    environment=programs.offline(scratch),
                )
            except ProgramError as error:
                raise WeightsError([Finding(f"{self.where}.recipe", f"{entry.recipe} failed:\n{error}")]) from None
            for path in listing(out):
                (out / path).chmod(0o644)
            self.part.rmdir()
            out.rename(self.part)
        progress = Progress(self.say, "recording digests")
        return facts(self.part, progress.advance)

    def _compare(self, folder: Path, expected: Mapping[str, FileFact]) -> list[Mismatch]:
        progress = Progress(self.say, "verifying", sum(fact.size for fact in expected.values()))
        return compare(folder, expected, progress.advance)

    def _refuse(self, mismatches: list[Mismatch]) -> None:
        if mismatches:
            fix = (
                f"is {CONVERTER} another one than the lock was made with? Reinstall it (`make setup`)"
                if self.entry.convert
                else "the source holds something else than was locked: find out why before `fleet lock add` locks that"
            )
            raise WeightsError(
                Finding(f"{self.where}.files.{mismatch.path}", mismatch.problem, fix) for mismatch in mismatches
            )

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder on the same disk for a program to work in; one that outlives a killed run then harms nothing."""
        with tempfile.TemporaryDirectory(prefix=f"{self.folder.name}.tmp-", dir=self.folder.parent) as scratch:
            yield Path(scratch)


def _fetch(origin: Hub | Bucket | Folder, where: str) -> sources.Fetch:
    match origin:
        case Hub():
            return hub.fetch(origin, where)
        case Bucket():
            return s3.fetch(origin, where)
        case Folder():
            return sources.fetch_from_folder(origin, where)


def _complete(path: Path, fact: FileFact) -> bool:
    return path.exists() and path.stat().st_size == fact.size
