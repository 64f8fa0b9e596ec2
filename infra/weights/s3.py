"""S3, or what speaks like it, as a source: what a bucket has below a prefix, its bytes, and what it says no to.

AWS_ENDPOINT_URL, AWS_PROFILE and the rest of the environment mean what they mean to every AWS tool. Where there are no
credentials the bucket is asked without any: a public one answers.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import tempfile
import threading
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.findings import Finding
from infra.weights.entry import FileFact
from infra.weights.files import CHUNK, WeightsError
from infra.weights.origins import Bucket
from infra.weights.progress import Progress, Say
from infra.weights.sources import WORKERS, Found, Stopped, each, read_config, read_metadata, wanted

if TYPE_CHECKING:
    from collections.abc import Callable

    from infra.weights.sources import Fetch, Sink

ATTEMPTS = 3
"""How often a transfer may break at the same place before the run gives up; the next one goes on there."""
LENGTH = 8
"""Bytes at the beginning of a safetensors file that tell how long its header is."""
LONGEST_HEADER = 100_000_000
"""Bytes; the format allows no longer one."""


def find(origin: Bucket, say: Say) -> Found:
    """What a bucket has below a prefix. Digests are S3's own where it has them of whole objects; else all is read.

    Raises:
        WeightsError: it cannot be had, or is no model in safetensors.
    """
    source = f"s3://{origin.name}/{origin.prefix}".rstrip("/")
    client = _Client(origin, source)
    say(f"asking S3 for {source}")
    paths = client.listing()
    if not paths:
        raise WeightsError([Finding(source, "there is nothing below it", "check bucket and prefix: `aws s3 ls`")])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for path in paths:
            if path in {"config.json", "model.safetensors.index.json"}:
                (folder / path).write_bytes(client.part(path))
            elif path.endswith(".safetensors") and "/" not in path:
                (folder / path).write_bytes(_header(client, path))
        config, metadata = read_config(folder, source), read_metadata(folder, source)
    return Found(source, _locked(client, [path for path in paths if wanted(path, metadata)], say), config, metadata)


def fetch(origin: Bucket, where: str) -> Fetch:
    """Files below a prefix; of the locked version where the bucket keeps versions."""
    client = _Client(origin, where)

    def get(path: str, fact: FileFact, sink: Sink, offset: int) -> None:
        client.read(path, sink.write, offset, pin={"VersionId": fact.version} if fact.version else {})

    return get


def _header(client: _Client, path: str) -> bytes:
    """The beginning of a safetensors file: all that is known of its tensors but their content."""
    start = client.part(path, 0, LENGTH)
    length = int.from_bytes(start, "little")
    return start if length > LONGEST_HEADER else start + client.part(path, LENGTH, LENGTH + length)


def _locked(client: _Client, paths: list[str], say: Say) -> dict[str, FileFact]:
    heads = {path: client.head(path) for path in paths}
    known = {path: _sha256(head) for path, head in heads.items()}
    unread = [path for path, digest in known.items() if digest is None]
    progress = Progress(say, "reading", sum(heads[path]["ContentLength"] for path in unread))
    stop = threading.Event()

    def read(path: str) -> str:
        digest = hashlib.sha256()

        def take(chunk: bytes) -> None:
            if stop.is_set():
                raise Stopped
            digest.update(chunk)
            progress.add(len(chunk))

        version = _version(heads[path])
        client.read(path, take, pin={"VersionId": version} if version else {"IfMatch": heads[path]["ETag"]})
        return digest.hexdigest()

    known |= dict(zip(unread, each(unread, read, progress, stop), strict=True))
    return {
        path: FileFact(size=head["ContentLength"], sha256=str(known[path]), version=_version(head))
        for path, head in heads.items()
    }


def _sha256(head: dict[str, Any]) -> str | None:
    """S3's own SHA-256, where it is of the whole object: that of one uploaded in parts is a digest of digests."""
    checksum = head.get("ChecksumSHA256", "-")
    if "-" in checksum or head.get("ChecksumType") == "COMPOSITE":
        return None
    return base64.b64decode(checksum).hex()


def _version(head: dict[str, Any]) -> str | None:
    """The object's version; S3 calls the one from before a bucket kept versions `null`, and writes over it."""
    version = head.get("VersionId")
    return None if version == "null" else version


class _Client:
    """One bucket. What goes wrong is raised as WeightsError."""

    def __init__(self, origin: Bucket, where: str) -> None:
        try:
            from boto3.session import Session  # noqa: PLC0415 - an extra, slow to import, and most runs do not need it
            from botocore import UNSIGNED, exceptions  # noqa: PLC0415
            from botocore.config import Config  # noqa: PLC0415
        except ImportError:
            fix = "`uv pip install --python .venv boto3`"
            raise WeightsError([Finding(where, "reading S3 needs boto3, which is not installed", fix)]) from None
        self._origin = origin
        self._where = where
        self._anonymous = False
        self._broken = (exceptions.HTTPClientError, exceptions.IncompleteReadError)
        self._said_no = exceptions.ClientError
        self._failures = (exceptions.BotoCoreError, exceptions.ClientError)
        with self._translated():
            session = Session()
            self._anonymous = session.get_credentials() is None
            config = Config(
                signature_version=UNSIGNED if self._anonymous else None,
                max_pool_connections=WORKERS,
                connect_timeout=10,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                response_checksum_validation="when_required",  # the lock's SHA-256 is compared anyhow
            )
            self._s3: Any = session.client("s3", config=config)

    def listing(self) -> list[str]:
        """Every object below the prefix, by relative path."""
        prefix = self._origin.key("")
        with self._translated():
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._origin.name, Prefix=prefix)
            keys = [content["Key"] for page in pages for content in page.get("Contents", ())]
        return [key.removeprefix(prefix) for key in keys if not key.endswith("/")]

    def head(self, path: str) -> dict[str, Any]:
        """Size, version and checksum of an object."""
        with self._translated(path):
            return dict(self._s3.head_object(**self._object(path), ChecksumMode="ENABLED"))

    def part(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """An object's bytes from one offset up to another."""
        content = bytearray()
        self.read(path, content.extend, start, end)
        return bytes(content)

    def read(
        self,
        path: str,
        write: Callable[[bytes], object],
        start: int = 0,
        end: int | None = None,
        pin: dict[str, str] | None = None,
    ) -> None:
        """The same in pieces; `pin` is the version or the content that it must be. Goes on where a connection broke.

        Past the end of the object there is nothing to read: whoever expected something compares what he has.
        """
        failed = 0
        with self._translated(path):
            while end is None or start < end:
                try:
                    wanted = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end else {}
                    answer = self._s3.get_object(**self._object(path), **wanted, **(pin or {}))
                    end = start + answer["ContentLength"]
                    with contextlib.closing(answer["Body"]) as body:
                        for chunk in body.iter_chunks(CHUNK):
                            write(chunk)
                            start += len(chunk)
                            failed = 0
                except self._broken:
                    failed += 1
                    if failed == ATTEMPTS:
                        raise
                except self._said_no as error:
                    if error.response["Error"]["Code"] == "InvalidRange":
                        return
                    raise

    def _object(self, path: str) -> dict[str, str]:
        return {"Bucket": self._origin.name, "Key": self._origin.key(path)}

    @contextlib.contextmanager
    def _translated(self, path: str = "") -> Any:
        try:
            yield
        except self._failures as error:
            raise WeightsError([self._refusal(error, path)]) from None

    def _refusal(self, error: Exception, path: str) -> Finding:
        """What botocore ran into, in words that say what to do."""
        answer = getattr(error, "response", {})
        code = str(answer.get("Error", {}).get("Code", ""))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        bucket = self._origin.name
        what = f"s3://{bucket}/{self._origin.key(path)}"
        if code == "NoSuchBucket":
            problem, fix = f"there is no bucket `{bucket}`", "check the name, and AWS_ENDPOINT_URL if it is set"
        elif status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN} or code == "ExpiredToken":
            problem = f"{what} is refused: " + (f"HTTP {status}" if code.isdigit() else code)
            fix = (
                "there are no AWS credentials here: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                if self._anonymous
                else f"renew the credentials, or allow them s3:ListBucket and s3:GetObject on {bucket}"
            )
        elif status == HTTPStatus.NOT_FOUND:
            problem, fix = f"{what} is not there", "put it there, or lock what is: `fleet lock add`"
        elif status == HTTPStatus.PRECONDITION_FAILED:
            problem, fix = f"{what} changed while it was read", "try again when nobody writes there"
        elif status is not None:
            problem, fix = f"S3 answered {code} (HTTP {status}) for {what}", "try again later"
        else:
            problem = f"{what} cannot be read: {str(error).splitlines()[0]}"
            fix = "check network, AWS credentials and AWS_ENDPOINT_URL; the next run goes on where this one ended"
        return Finding(self._where, problem, fix)
