"""Downloads from vendors' sites: a short wait for those that do not answer, a check of every byte of those that do."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from pathlib import Path

    from toolchain.progress import Step

CONNECT_S = 5
ANSWER_S = 10  # resolving the name included, which no timeout of a socket covers
STALL_S = 60
CHUNK_BYTES = 1 << 18
MB = 1_000_000


class FetchError(RuntimeError):
    """A site does not answer, or what it sent is not what it should be."""


def read_small(url: str) -> str:
    """A small text, such as a list of checksums; within ANSWER_S, whatever hangs.

    Raises:
        FetchError: no answer, or not this.
    """
    result: list[str | Exception] = []

    def get() -> None:
        try:
            answer = httpx.get(url, timeout=CONNECT_S, follow_redirects=True)
            result.append(answer.raise_for_status().text)
        except (httpx.HTTPError, OSError) as error:
            result.append(error)

    # A thread that may be left behind: the resolver cannot be interrupted.
    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    host = httpx.URL(url).host
    if not result:
        raise FetchError(f"{host} does not answer within {ANSWER_S} s")
    if isinstance(result[0], Exception):
        raise FetchError(f"{host} does not answer: {result[0]}")
    return result[0]


def checksum_of(file_name: str, sums: str) -> str:
    """The SHA-256 of one file in the usual list, `HEX  [*]NAME` a line.

    Raises:
        FetchError: the file is not in the list.
    """
    for line in sums.splitlines():
        digest, _, name = line.strip().partition(" ")
        if name.strip().lstrip("*") == file_name:
            return digest.lower()
    raise FetchError(f"the vendor's list of checksums has no {file_name}")


def download(url: str, sha256: str, to: Path, step: Step) -> None:
    """Download a file and check its SHA-256; its size is shown on the way.

    Raises:
        FetchError: the download fails, or the digest differs.
    """
    digest = hashlib.sha256()
    timeout = httpx.Timeout(STALL_S, connect=CONNECT_S)
    try:
        with httpx.stream("GET", url, timeout=timeout, follow_redirects=True) as answer, to.open("wb") as file:
            answer.raise_for_status()
            total = int(answer.headers.get("content-length", 0))
            step.say(f"downloading {url} ({total / MB:.0f} MB)")
            done = 0
            for chunk in answer.iter_bytes(CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                step.status(f"{done / MB:.0f} of {total / MB:.0f} MB")
    except (httpx.HTTPError, OSError) as error:
        raise FetchError(f"the download of {url} broke off: {error}") from None
    if digest.hexdigest() != sha256:
        raise FetchError(f"{url} has SHA-256 {digest.hexdigest()}, and its vendor's list says {sha256}: refused")
