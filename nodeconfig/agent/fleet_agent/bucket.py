"""The stack's bucket as a node reads weights from it.

Small things go through boto3. Files go through the AWS Common Runtime's S3 client, which splits one request into ranges
on as many connections as the link takes, repeats the parts that fail, and hands the bytes over in order, 8 MiB a call.
"""

from __future__ import annotations

import http
import json
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from awscrt.auth import AwsCredentials, AwsCredentialsProvider
from awscrt.exceptions import AwsCrtError
from awscrt.http import HttpHeaders, HttpRequest
from awscrt.io import ClientTlsContext, TlsContextOptions
from awscrt.s3 import (
    S3Client,
    S3RequestTlsMode,
    S3RequestType,
    S3ResponseError,
    create_default_s3_signing_config,
    get_recommended_throughput_target_gbps,
)
from boto3.session import Session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from fleet_agent.machine import AgentError

REFUSED = 78
"""Exit code, EX_CONFIG of sysexits.h: the next try would end alike."""
LATE = 75
"""Exit code, EX_TEMPFAIL: the next try may get further."""
PART_BYTES = 8 << 20
TARGET_GBPS = 20.0
"""Gbit/s; decides how many connections there are, one for 0.4 Gbit/s. S3 gives one 0.4 to 0.7: together up to 35. More
would only keep more parts waiting for their turn in memory. Instances whose link the runtime knows get more."""
MEMORY_BYTES = 2 << 30
"""Most that parts on their way may take: the smallest GPU instances have 16 GB."""


class Refused(AgentError):  # noqa: N818 - it did refuse
    """It cannot be had, and trying again would not help."""

    code = REFUSED


class Late(AgentError):  # noqa: N818 - it is late
    """It could not be had in the time that was given."""

    code = LATE


class Denied(Exception):  # noqa: N818 - not final: permissions that were made a moment ago take a while
    """The bucket is not open to this machine."""


class Passing(Exception):  # noqa: N818 - heals by itself
    """Something that another try may not meet."""


class Cache:
    """The weights in one bucket.

    Every method raises Denied (401, 403, no credentials), Refused (no such bucket or key, any other 4xx) or Passing
    (5xx, time-outs, cut connections: after the clients' own few retries).
    """

    def __init__(self, bucket: str, region: str) -> None:
        """Make the clients.

        Raises:
            Late: There are no credentials. Clients look for them once: another process may find some.
        """
        self.bucket = bucket
        session = Session(region_name=region)
        if session.get_credentials() is None:
            raise Late("this machine has no AWS credentials: its instance profile is missing or not there yet")
        retries = {"mode": "standard", "total_max_attempts": 3}
        self._s3 = session.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=30))
        self._unsigned = session.client("s3", config=Config(signature_version=UNSIGNED))
        self._reader = _reader(session, region, self._url("any"))

    def complete(self, prefix: str) -> dict[str, dict[str, Any]] | None:
        """Size and SHA-256 of every file of an entry; None while the cache is not filled."""
        key = f"{prefix}/.complete"
        try:
            with self._s3.get_object(Bucket=self.bucket, Key=key)["Body"] as body:
                return dict(json.loads(body.read()))
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise self._botocore(error, key) from None
        except BotoCoreError as error:
            raise self._botocore(error, key) from None
        except ValueError:
            raise Refused(f"s3://{self.bucket}/{key} is no JSON: delete it and run the fill job again") from None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Size of every object below a prefix, by the rest of its key."""
        try:
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{prefix}/")
            return {
                item["Key"].removeprefix(f"{prefix}/"): int(item["Size"])
                for page in pages
                for item in page.get("Contents", ())
            }
        except (ClientError, BotoCoreError) as error:
            raise self._botocore(error, f"{prefix}/") from None

    def read(self, key: str, start: int, end: int, take: Callable[[bytes], object]) -> None:
        """Read bytes `start` to `end` of an object; `take` gets them in order, and not in this thread.

        Raises:
            OSError: `take` raised it.
        """
        url = urlsplit(self._url(key))
        headers = HttpHeaders([("Host", url.netloc), ("Range", f"bytes={start}-{end - 1}")])
        failed: list[OSError] = []

        def on_body(chunk: bytes, **_more: Any) -> None:
            try:
                take(chunk)
            except OSError as error:
                failed.append(error)
                raise

        request = self._reader.make_request(
            type=S3RequestType.GET_OBJECT, request=HttpRequest("GET", url.path, headers), on_body=on_body
        )
        try:
            request.finished_future.result()
        except (AwsCrtError, OSError) as error:
            if failed:
                raise failed[0] from None
            raise self._crt(error, key) from None

    def _url(self, key: str) -> str:
        """Where an object is, as botocore has it: AWS_ENDPOINT_URL, partitions and dots in names are its business."""
        return str(self._unsigned.generate_presigned_url("get_object", Params={"Bucket": self.bucket, "Key": key}))

    def _botocore(self, error: Exception, key: str) -> Exception:
        if isinstance(error, NoCredentialsError):
            return Denied("this machine has no AWS credentials: its instance profile is missing or not there yet")
        if isinstance(error, ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return self._answer(status, error.response["Error"]["Code"], key)
        return Passing(str(error).split("\n", 1)[0])

    def _crt(self, error: Exception, key: str) -> Exception:
        if isinstance(error, S3ResponseError) and error.status_code:
            return self._answer(error.status_code, _code(error.body), key)
        return Passing(str(error))

    def _answer(self, status: int, code: str, key: str) -> Exception:
        what = f"s3://{self.bucket}/{key}"
        if code == "NoSuchBucket":
            return Refused(
                f"there is no bucket `{self.bucket}`: was the stack destroyed, or is the region another one?"
            )
        if status in {http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN}:
            return Denied(
                f"S3 refuses {what} ({status} {code}): the machine's role needs s3:GetObject on weights/*, "
                "s3:ListBucket with that prefix, and kms:Decrypt on the bucket's key"
            )
        if status == http.HTTPStatus.NOT_FOUND:
            return Refused(f"{what} is not there, though the entry is complete: {refill(self.bucket, key)}")
        passing = {
            http.HTTPStatus.REQUEST_TIMEOUT,
            http.HTTPStatus.CONFLICT,
            http.HTTPStatus.PRECONDITION_FAILED,
            http.HTTPStatus.TOO_MANY_REQUESTS,
        }
        if status in passing or status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return Passing(f"S3 answered {status} {code}")
        # 400 is also what S3 says of a token that ended a moment ago: botocore fetches a new one.
        if code in {"ExpiredToken", "RequestTimeTooSkewed", "RequestTimeout"}:
            return Passing(f"S3 answered {status} {code}")
        return Refused(f"S3 answered {status} {code} for {what}: check bucket and region")


def refill(bucket: str, key: str) -> str:
    """What to do when the cache holds something else than it says."""
    folder = "/".join(key.split("/")[:3])
    return f"delete s3://{bucket}/{folder}/ and start the stack's fill job again, which takes it from the source anew"


def _code(body: bytes | None) -> str:
    text = (body or b"").decode(errors="replace")
    return text.partition("<Code>")[2].partition("</Code>")[0]


def _reader(session: Session, region: str, url: str) -> S3Client:
    credentials = session.get_credentials()

    def current() -> AwsCredentials:
        if credentials is None:
            raise NoCredentialsError
        now = credentials.get_frozen_credentials()  # renewed by botocore when they end soon
        return AwsCredentials(now.access_key, now.secret_key, now.token)

    tls: dict[str, Any] = {}
    if urlsplit(url).scheme == "http":  # AWS_ENDPOINT_URL
        tls["tls_mode"] = S3RequestTlsMode.DISABLED
    elif trusted := os.environ.get("AWS_CA_BUNDLE"):
        options = TlsContextOptions()
        options.override_default_trust_store_from_path(ca_filepath=trusted)
        tls["tls_connection_options"] = ClientTlsContext(options).new_connection_options()
    provider = AwsCredentialsProvider.new_delegate(current)
    return S3Client(
        region=region,
        signing_config=create_default_s3_signing_config(region=region, credential_provider=provider),
        part_size=PART_BYTES,
        throughput_target_gbps=max(get_recommended_throughput_target_gbps() or 0.0, TARGET_GBPS),
        memory_limit=MEMORY_BYTES,
        **tls,
    )
