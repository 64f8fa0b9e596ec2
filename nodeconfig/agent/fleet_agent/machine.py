"""A machine's folder: bundles, slots, locks. Everything else in this package goes through it.

bundles/<digest>/      what was rendered, never changed afterwards
slots/<program>        link to the folder in a bundle that the program runs from: the machine's state
current                link to the bundle that was applied last and whole: what a failed apply goes back to
run/ log/ data/        sockets and pids, logs, what programs keep
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

SOCKET_PATH_LIMIT = 100
"""sockaddr_un holds 108 bytes on Linux and 104 on macOS; supervisord adds a suffix of its own while it binds."""


class AgentError(Exception):
    """Something that the operator can mend; the text says how."""


@dataclass(frozen=True)
class Program:
    """One entry of a bundle's manifest."""

    name: str
    engine: bool
    reload: str
    digest: str
    """Over the program's files: what decides whether it must change at all."""
    unit: str
    """Digest of its program.ini alone: the same unit with other files can be reloaded."""


class Bundle:
    """A rendered bundle in its folder.

    Raises:
        AgentError: the folder holds no manifest that this program understands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        try:
            raw = (self.folder / "manifest.json").read_bytes()
            self.manifest: dict[str, Any] = json.loads(raw)
        except (OSError, ValueError) as error:
            raise AgentError(f"{self.folder} is no bundle: {error}") from error
        if self.manifest.get("schema") != 1:
            raise AgentError(f"{self.folder} has schema {self.manifest.get('schema')}; this agent reads schema 1")
        self.digest = hashlib.sha256(raw).hexdigest()

    @cached_property
    def programs(self) -> dict[str, Program]:
        """The bundle's programs by name."""
        files: dict[str, str] = self.manifest["files"]
        programs = {}
        for name, facts in self.manifest["programs"].items():
            prefix = f"programs/{name}/"
            own = {path: digest for path, digest in files.items() if path.startswith(prefix)}
            digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
            programs[name] = Program(name, facts["engine"], facts["reload"], digest, own[f"{prefix}program.ini"])
        return programs

    def damage(self) -> list[str]:
        """Files that are missing or not what the manifest says."""
        wrong = []
        for path, digest in self.manifest["files"].items():
            try:
                found = hashlib.sha256((self.folder / path).read_bytes()).hexdigest()
            except OSError:
                wrong.append(f"{path} is missing")
                continue
            if found != digest:
                wrong.append(f"{path} was edited")
        return wrong

    def program_folder(self, name: str) -> Path:
        """Where one program's files are."""
        return self.folder / "programs" / name


class Machine:
    """One machine's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.run = self.root / "run"
        self.log = self.root / "log"
        self.slots = self.root / "slots"
        self.bundles = self.root / "bundles"
        self.current = self.root / "current"

    def prepare(self) -> None:
        """Make the folders. Repeatable.

        Raises:
            AgentError: the folder's path is too long for the sockets in it.
        """
        if len(str(self.supervisor_socket)) > SOCKET_PATH_LIMIT:
            raise AgentError(
                f"{self.supervisor_socket} is longer than the {SOCKET_PATH_LIMIT} characters a socket may have: "
                "check the project out in a shorter path, or set FLEET_DIR to one"
            )
        for folder in (self.run, self.log, self.slots, self.bundles, self.root / "data"):
            folder.mkdir(parents=True, exist_ok=True)
        self.run.chmod(0o700)

    @property
    def supervisor_socket(self) -> Path:
        """Where the process manager listens."""
        return self.run / "supervisor.sock"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the machine for one change. The lock goes with the process that holds it, however that ends."""
        with (self.run / "machine.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def store(self, files: dict[str, str]) -> Path:
        """Write a bundle's files under its digest, atomically; a bundle that is there already is left alone if whole.

        Raises:
            AgentError: the disk is full, or the folder cannot be written.
        """
        digest = hashlib.sha256(files["manifest.json"].encode()).hexdigest()
        final = self.bundles / digest
        if final.is_dir() and not Bundle(final).damage():
            return final
        partial = self.bundles / f".{digest}.{os.getpid()}"
        try:
            self.prepare()
            for path, text in files.items():
                target = partial / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
            if final.exists():  # edited by hand: what runs reads it through its slot, so it is mended file by file
                for path in files:
                    (final / path).parent.mkdir(parents=True, exist_ok=True)
                    (partial / path).replace(final / path)
            else:
                partial.rename(final)
        except OSError as error:
            raise AgentError(
                f"cannot write the bundle to {final}: {error.strerror}: make room and run the command again"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final

    def slot(self, program: str) -> Path | None:
        """The program folder that a program runs from, or None where it has no slot."""
        link = self.slots / program
        return link.resolve() if link.is_symlink() else None

    def slot_bundle(self, program: str) -> Bundle | None:
        """The bundle that a program runs from; None where there is none or it is gone."""
        folder = self.slot(program)
        if folder is None or not folder.is_dir():
            return None
        return Bundle(folder.parent.parent)

    def occupied(self) -> list[str]:
        """Programs that have a slot, by name."""
        return sorted(link.name for link in self.slots.iterdir() if link.is_symlink()) if self.slots.is_dir() else []

    def point(self, program: str, folder: Path | None) -> None:
        """Move a program's slot to another folder, or take the slot away."""
        link = self.slots / program
        if folder is None:
            link.unlink(missing_ok=True)
        else:
            relink(link, folder)

    def running(self) -> Bundle | None:
        """The bundle that was applied last and whole."""
        return Bundle(self.current) if self.current.is_dir() else None

    def commit(self, bundle: Bundle) -> None:
        """Record that a bundle was applied whole, and drop bundles that nothing refers to any more."""
        before = self.running()
        relink(self.current, bundle.folder)
        used = {bundle.folder.name, *([before.folder.name] if before else [])}
        used |= {folder.parent.parent.name for name in self.occupied() if (folder := self.slot(name))}
        for folder in self.bundles.iterdir():
            if folder.name not in used:
                shutil.rmtree(folder, ignore_errors=True)


def relink(link: Path, target: Path) -> None:
    """Replace a link atomically, with a relative target, so that the folder can be moved."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)
