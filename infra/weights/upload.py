"""A stack's weights cache: put entries of the lock into its bucket.

    weights/<entry>/<digest>/<path>        with its SHA-256 as metadata
    weights/<entry>/<digest>/.complete     written last: `{path: {"size": bytes, "sha256": hex}}` of what is there

Nothing is written over that is right, and of two fills at once the first to put a file wins: the other finds it there.
So a run that was killed is gone on with by the next, and nodes never see an entry change that they were told is there.
A quantised entry comes out a little different each time; then the files that are there count, whoever made them.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from infra.findings import Finding
from infra.paths import ROOT
from infra.weights.cache import ensure, expected_files
from infra.weights.entry import FileFact
from infra.weights.files import WeightsError
from infra.weights.lock import CONVERTER, LOCK, WeightsLock
from infra.weights.progress import ProgramError, Progress, Say, run

COMPLETE = ".complete"
PART_BYTES = 64 << 20
"""S3 takes 10,000 parts: files up to 640 GB."""
PARTS_AT_ONCE = 16
DIGEST = "sha256"
"""Key of an object's metadata."""
UNKNOWN = "0" * 64
"""For an object that has no such metadata: somebody else put it there."""


@dataclass(frozen=True)
class Target:
    """The stack's bucket."""

    bucket: str
    s3: Any
    first: Any
    """The same, but of all who put an object under one key only the first succeeds."""

    @classmethod
    def of(cls, bucket: str, region: str) -> Target:
        """With the credentials of the environment."""
        from boto3.session import Session  # noqa: PLC0415 - an extra, and slow to import
        from botocore.config import Config  # noqa: PLC0415

        # Pauses between tries grow to 20 s: a cache that takes half an hour to fill outlives a few minutes of trouble.
        config = Config(retries={"mode": "adaptive", "total_max_attempts": 12}, max_pool_connections=2 * PARTS_AT_ONCE)
        s3, first = (Session(region_name=region).client("s3", config=config) for _ in range(2))
        for call in ("PutObject", "CompleteMultipartUpload"):
            first.meta.events.register(f"provide-client-params.s3.{call}", _unless_there)
        return cls(bucket, s3, first)


def _unless_there(params: dict[str, Any], **_more: Any) -> dict[str, Any]:
    return {**params, "IfNoneMatch": "*"}


def fill(target: Target, request: str, lock: WeightsLock, say: Say, *, discard: bool = False) -> None:
    """Have every entry of a request in the bucket, complete.

    Args:
        target: The bucket.
        request: Key of the request, `{"entries": {entry: digest}}`.
        lock: Of the project that wrote the request.
        say: Told how far it is.
        discard: Remove an entry from this machine's disk once it is in the bucket: for a machine that is thrown away.

    Raises:
        ConfigError: an entry cannot be had, or is another one in this lock; what was filled before stays.
    """
    entries = _requested(target, request)
    _check(entries, request, lock)
    for name, digest in entries.items():
        _fill(target, name, f"weights/{name}/{digest}", lock, say, discard=discard)


def _requested(target: Target, request: str) -> dict[str, str]:
    from botocore.exceptions import ClientError  # noqa: PLC0415 - an extra, and slow to import

    where = f"s3://{target.bucket}/{request}"
    try:
        body = target.s3.get_object(Bucket=target.bucket, Key=request)["Body"].read()
    except ClientError as error:
        code = error.response["Error"]["Code"]
        fix = "check bucket, key and the job's role" if code != "NoSuchKey" else "`pulumi up` puts it there"
        raise WeightsError([Finding(where, f"cannot be read: {code}", fix)]) from None
    try:
        return {str(name): str(digest) for name, digest in json.loads(body)["entries"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = 'is no request: it must be {"entries": {entry: digest}}'
        raise WeightsError([Finding(where, problem, "`pulumi up` writes it anew")]) from None


def _check(entries: dict[str, str], request: str, lock: WeightsLock) -> None:
    findings = []
    for name, digest in entries.items():
        if name not in lock.models:
            problem = f"{LOCK.name} has no entry `{name}`"
        elif lock.digest(name) != digest:
            problem = f"`{name}` is {lock.digest(name)} in {LOCK.name}, and {digest} is wanted"
        else:
            continue
        fix = "the job runs another version of the project than the one that wrote the request: `pulumi up` again"
        findings.append(Finding(request, problem, fix))
    if findings:
        raise WeightsError(findings)


def _fill(target: Target, name: str, prefix: str, lock: WeightsLock, say: Say, *, discard: bool) -> None:  # noqa: PLR0913
    if _complete(target, prefix):
        say(f"{name}: is in s3://{target.bucket}/{prefix} already")
        return
    _install_converter(name, lock, say)
    folder = ensure(name, lock, say)
    entry = lock.models[name]
    files = expected_files(entry, folder)
    progress = Progress(say, f"{name}: uploading", sum(fact.size for fact in files.values()))
    there = {}
    for path, fact in sorted(files.items()):
        there[path] = _put(target, f"{prefix}/{path}", folder / path, fact, progress, exact=entry.made_from is None)
    content = json.dumps({path: fact.model_dump(include={"size", "sha256"}) for path, fact in there.items()}, indent=1)
    target.s3.put_object(
        Bucket=target.bucket, Key=f"{prefix}/{COMPLETE}", Body=content.encode(), ChecksumAlgorithm="SHA256"
    )
    say(f"{name}: complete in s3://{target.bucket}/{prefix}")
    if discard:
        shutil.rmtree(folder)


def _complete(target: Target, prefix: str) -> bool:
    """`.complete` is there, and so is every file that it names, with its size."""
    from botocore.exceptions import ClientError  # noqa: PLC0415 - an extra, and slow to import

    try:
        body = target.s3.get_object(Bucket=target.bucket, Key=f"{prefix}/{COMPLETE}")["Body"].read()
        wanted = {path: fact["size"] for path, fact in json.loads(body).items()}
    except ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchKey":
            return False
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    pages = target.s3.get_paginator("list_objects_v2").paginate(Bucket=target.bucket, Prefix=f"{prefix}/")
    found = {
        item["Key"].removeprefix(f"{prefix}/"): item["Size"] for page in pages for item in page.get("Contents", ())
    }
    return all(found.get(path) == size for path, size in wanted.items())


def _put(  # noqa: PLR0913 - what a file is
    target: Target, key: str, file: Path, fact: FileFact, progress: Progress, *, exact: bool
) -> FileFact:
    """Have a file in the bucket.

    Returns:
        What is there: with `exact` what was given, else also what another run had made of the same size.
    """
    from boto3.exceptions import S3UploadFailedError  # noqa: PLC0415 - an extra, and slow to import
    from boto3.s3.transfer import TransferConfig  # noqa: PLC0415
    from botocore.exceptions import ClientError  # noqa: PLC0415

    config = TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE
    )
    extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {DIGEST: fact.sha256}}
    client = target.first
    while True:
        found = _head(target, key)
        right = {fact.sha256} if exact or found is None else {fact.sha256, found.sha256} - {UNKNOWN}
        if found and found.size == fact.size and found.sha256 in right:
            progress.advance(fact.size)
            return found
        if found:  # nothing that this program put there, or of a file that is made anew: it is replaced
            client = target.s3
        try:
            client.upload_file(str(file), target.bucket, key, ExtraArgs=extra, Config=config, Callback=progress.advance)
        except (ClientError, S3UploadFailedError) as error:
            cause = error if isinstance(error, ClientError) else error.__context__
            if not isinstance(cause, ClientError) or client is target.s3 or not _was_first(cause):
                raise
            progress.add(-fact.size)
            continue
        return FileFact(size=fact.size, sha256=fact.sha256)


def _was_first(error: Any) -> bool:
    """Another run put the object there meanwhile."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in {HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT}


def _head(target: Target, key: str) -> FileFact | None:
    from botocore.exceptions import ClientError  # noqa: PLC0415 - an extra, and slow to import

    try:
        head = target.s3.head_object(Bucket=target.bucket, Key=key)
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == HTTPStatus.NOT_FOUND:
            return None
        raise
    return FileFact(size=head["ContentLength"], sha256=head["Metadata"].get(DIGEST, UNKNOWN))


def _install_converter(name: str, lock: WeightsLock, say: Say) -> None:
    """The engine dequantises GGUF files: a build machine has none."""
    entry = lock.models[name]
    if entry.made_from is not None:
        _install_converter(entry.made_from, lock, say)
    elif entry.convert is not None:
        command = [sys.executable, "-m", "toolchain", "install", "--only", "vllm"]
        try:
            run(command, say, f"installing {CONVERTER}", cwd=ROOT, chatty=True)
        except ProgramError as error:
            problem = f"{CONVERTER}, which reads this entry's source, could not be installed:\n{error}"
            raise WeightsError([Finding(f"{LOCK.name}: models.{name}", problem)]) from None
