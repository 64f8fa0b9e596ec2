"""Where an entry's files come from, as the lock writes it: one URL."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict


class Origin(BaseModel):
    """Base of the sources: immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hub(Origin):
    """`hf://org/name@revision`."""

    repository: str
    revision: str
    """A commit; a branch or tag only as long as the lock has no digests."""

    @property
    def pinned(self) -> bool:
        """The revision is a commit: what it names never changes."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None


class Bucket(Origin):
    """`s3://bucket/prefix`."""

    name: str
    prefix: str
    """Without a slash at either end; empty: the whole bucket."""

    def key(self, path: str) -> str:
        """The key of a file."""
        return f"{self.prefix}/{path}" if self.prefix else path


class Package(Origin):
    """`pypi://name@version#path/in/the/wheel`."""

    name: str
    version: str
    member: str


class Folder(Origin):
    """`file:///absolute/folder`."""

    path: Path


HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
BUCKET = re.compile(r"s3://(?P<name>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[^?#]*))?")
PACKAGE = re.compile(r"pypi://(?P<name>[A-Za-z0-9][\w.-]*)@(?P<version>[\w.!+-]+)#(?P<member>[^#]+)")
FOLDER = re.compile(r"file://(?P<path>/[^#?]*)")


def parse_source(text: str) -> Hub | Bucket | Package | Folder:
    """What a source names; a hub's revision is `main` where none is written.

    Raises:
        ValueError: The text is no source; the message says what one looks like.
    """
    if match := HUB.fullmatch(text):
        return Hub(repository=match["repository"], revision=match["revision"] or "main")
    if match := BUCKET.fullmatch(text):
        return Bucket(name=match["name"], prefix=(match["prefix"] or "").strip("/"))
    if (match := PACKAGE.fullmatch(text)) and inside(match["member"]):
        return Package(**match.groupdict())
    if match := FOLDER.fullmatch(text):
        return Folder(path=Path(match["path"]))
    raise ValueError(
        f"{text!r} is no source: write hf://org/name@<40 hex digits of the commit>, s3://bucket/prefix, "
        "pypi://package@version#path/in/the/wheel or file:///absolute/folder"
    )


def inside(path: str) -> bool:
    """A plain relative path that stays in its folder."""
    pure = PurePosixPath(path)
    return bool(path) and path == str(pure) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in path
