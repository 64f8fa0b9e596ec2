"""The tools: what tools.toml says of each, and whether this machine has it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

HERE = Path(__file__).resolve().parent
VERSION_TIMEOUT_S = 20

Version = tuple[int, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Release(_Strict):
    """A vendor's archive, checked against its list of SHA-256 sums; `{version}`, `{os}`, `{arch}` are filled in."""

    kind: Literal["release"]
    url: str
    checksums: str
    arch: dict[str, str]


class Wheel(_Strict):
    """A program that ships in a Python wheel, locked by hash in requirements/."""

    kind: Literal["wheel"]
    requirements: str
    folder: str


class Deb(_Strict):
    """A Debian or Ubuntu package, unpacked and not installed: no root, no service that starts by itself."""

    kind: Literal["deb"]
    package: str
    folder: str
    arguments: dict[str, list[str]] = {}


class GoBuild(_Strict):
    """A build from the Go module proxy. `version` where a module's numbers differ from the tool's."""

    kind: Literal["go"]
    module: str
    packages: list[str]
    tags: list[str] = []
    ldflags: str = ""
    version: str = ""
    language_host: str = ""


Source = Annotated[Release | Wheel | Deb | GoBuild, Field(discriminator="kind")]


class Tool(_Strict):
    """One tool; the fields are explained in tools.toml."""

    name: str
    commands: list[str]
    alternatives: list[str] = []
    beside: list[str] = []
    version_args: list[str]
    minimum: str
    pinned: str = ""
    wanted_for: list[Literal["up", "test"]] = Field(alias="for")
    optional: bool = False
    by_hand: str
    sources: list[Source] = []

    @property
    def folder(self) -> str:
        """The name of the folder of the toolchain that the pinned version is in."""
        return f"{self.name}-{self.pinned}"


@cache
def catalogue() -> dict[str, Tool]:
    """Every tool by name, in the order of tools.toml."""
    data = tomllib.loads((HERE / "tools.toml").read_text(encoding="utf-8"))
    return {name: Tool.model_validate({"name": name, **table}) for name, table in data.items()}


def parse_version(text: str) -> Version | None:
    """The first dotted number of three parts in a tool's answer; None if there is none."""
    match = re.search(r"(\d+)\.(\d+)\.(\d+)", text) or re.search(r"(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else None


def format_version(version: Version) -> str:
    """The usual notation: 2.8.25."""
    return ".".join(map(str, version))


class Found(_Strict):
    """A usable tool."""

    path: Path
    version: Version


def look(tool: Tool, path: str) -> tuple[Found | None, str]:
    """Look for a tool on a PATH.

    Returns:
        The tool if all its commands are there and the first is new enough; and a sentence: what was found, or why it
        will not do.
    """
    for first in (tool.commands[0], *tool.alternatives):
        if command := shutil.which(first, path=path):
            break
    else:
        return None, "not on PATH"
    for other in (*tool.commands[1:], *tool.beside):
        if not shutil.which(other, path=path) and not (Path(command).resolve().parent / other).exists():
            return None, f"{command} is there, but {other} is not"
    version, why = ask_version(command, tool.version_args)
    if version is None:
        return None, f"{command} does not tell its version: {why}"
    if version < (parse_version(tool.minimum) or ()):
        return None, f"{command} is {format_version(version)}, older than {tool.minimum}"
    return Found(path=Path(command), version=version), f"{format_version(version)} at {command}"


def ask_version(command: str | Path, arguments: list[str]) -> tuple[Version | None, str]:
    """Run a command for its version; the second value is what it said."""
    try:
        answer = subprocess.run(
            [command, *arguments],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=VERSION_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    said = answer.stdout + answer.stderr
    last = said.strip().splitlines()[-1:] or ["nothing"]
    return (parse_version(said), last[0]) if answer.returncode == 0 else (None, last[0])
