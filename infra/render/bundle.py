"""The bundle: everything one machine role runs, as files, addressed by digest.

    manifest.json                    what the apply program reads
    node/...                         where machines are made by a cloud: what a machine needs beside its programs
    programs/<name>/program.ini      the unit of the machine's process manager (supervisord on local)
    programs/<name>/...              the program's own files

A machine keeps bundles under `bundles/<digest>/` and points `slots/<name>` at the program folder that runs. A program's
command and files therefore name their own files as `slots/<name>/...`, relative to the machine's folder, and moving one
program to another bundle is one atomic change of a link.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2

from infra.paths import NODECONFIG
from infra.weights.cache import Place

SCHEMA = 1


@dataclass(frozen=True)
class Layout:
    """Where things are on a machine: the only thing that differs between machines which run the same plan."""

    root: Path
    """The machine's folder; every process has it as working directory."""
    python: Path
    """The Python that has the agent's dependencies."""
    vllm: Path | None = None
    """The `vllm` command inside the engine's virtual environment."""
    weights: Mapping[str, Place] = field(default_factory=dict)
    """By entry of models.lock.yaml."""
    haproxy: Path | None = None
    nginx: Path | None = None
    prometheus: Path | None = None
    alertmanager: Path | None = None
    grafana: Path | None = None
    """None where Grafana is not installed: it is then left out."""


@dataclass(frozen=True)
class Program:
    """One process that a machine keeps running."""

    name: str
    command: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    """Path inside the program's folder to text."""
    environment: Mapping[str, str] = field(default_factory=dict)
    engine: bool = False
    """An engine is drained before it stops and must get ready after it started."""
    reload: Literal["", "haproxy", "nginx", "SIGHUP"] = ""
    """How changed files are taken up without a restart, where only files changed and not the command."""
    listen: str = ""
    """`host:port`, or `unix://` and a path, that the process manager listens on and passes as descriptor 0."""
    standby: bool = False
    """A second process waits to take over from the first; they settle between themselves which one works."""
    stop_signal: Literal["TERM", "USR1", "QUIT"] = "TERM"
    stop_s: int = 10
    """From the stop signal to SIGKILL of the whole process group."""
    settle_s: int = 1
    """An exit sooner than this counts as a failed start."""


@dataclass(frozen=True)
class Bundle:
    """What one machine role runs."""

    role: str
    programs: tuple[Program, ...]
    node: Mapping[str, str] = field(default_factory=dict)
    """Path to text of what is no program's: another one of these restarts none."""

    @property
    def files(self) -> dict[str, str]:
        """Every file of the bundle, by its path inside it."""
        files = {
            f"programs/{program.name}/{path}": text
            for program in self.programs
            for path, text in {**program.files, "program.ini": _unit(program)}.items()
        }
        files |= {f"node/{path}": text for path, text in self.node.items()}
        return {**files, "manifest.json": self._manifest(files)}

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest, which holds the SHA-256 of every other file."""
        return hashlib.sha256(self.files["manifest.json"].encode()).hexdigest()

    def _manifest(self, files: Mapping[str, str]) -> str:
        """What the apply program needs to know of each program, and the digest of each file."""
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "role": self.role,
            "programs": {
                program.name: {"engine": program.engine, "reload": program.reload} for program in self.programs
            },
            "files": {path: hashlib.sha256(text.encode()).hexdigest() for path, text in sorted(files.items())},
        }
        return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


@cache
def templates() -> jinja2.Environment:
    """Templates of nodeconfig/; a name that the template uses and nobody gave is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(NODECONFIG),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - configuration files, not HTML
    )


def _unit(program: Program) -> str:
    return (
        templates()
        .get_template("machine/program.ini.j2")
        .render(
            program=program,
            command=_escape(shlex.join(program.command)),
            environment={name: _escape(value) for name, value in sorted(program.environment.items())},
        )
    )


def _escape(text: str) -> str:
    """Supervisord expands `%(name)s` in values, so a per cent sign is written twice."""
    return text.replace("%", "%%")
