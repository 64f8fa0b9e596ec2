"""A small S3 on loopback: one bucket, with what its client asks for when it lists, looks at and reads objects."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

NAME = "acme-models"
KEY_ID = "AKIDOFNOBODY"
SECRET = "not-a-real-secret"  # noqa: S105 - of a server on loopback


@dataclass(frozen=True)
class Asked:
    """One request for an object's content."""

    key: str
    start: int
    version: str | None


@dataclass
class S3:
    """Serves one bucket."""

    objects: dict[str, bytes] = field(default_factory=dict)
    old: dict[str, bytes] = field(default_factory=dict)
    """Version to content of objects that were written over."""
    versions: dict[str, str] = field(default_factory=dict)
    """Key to version, where the bucket keeps versions."""
    checksums: str | None = None
    """`FULL_OBJECT` or `COMPOSITE`: it has SHA-256s of that kind."""
    public: bool = False
    refuse: str | None = None
    """Code of the error that every request gets."""
    page: int = 1000
    """Keys in one answer to a listing."""
    cut: dict[str, list[int]] = field(default_factory=dict)
    """Key to how many bytes go out before the connection breaks, request by request."""
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"served": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, prefix: str, files: dict[str, bytes]) -> None:
        self.objects |= {f"{prefix}{path}": content for path, content in files.items()}

    def starts(self, name: str) -> list[int]:
        """Where each request for an object's content began, the headers of safetensors files left out."""
        return [asked.start for asked in self.asked if asked.key.endswith(name)]


STATUS = {
    "AccessDenied": 403,
    "ExpiredToken": 400,
    "InvalidRange": 416,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NoSuchVersion": 404,
    "PreconditionFailed": 412,
}


class _Handler(BaseHTTPRequestHandler):
    served: S3
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).removeprefix("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        s3 = self.served
        authorization = self.headers.get("Authorization", "")
        if s3.refuse:
            self._error(s3.refuse, body=body)
        elif f"Credential={KEY_ID}/" not in authorization and not (s3.public and not authorization):
            self._error("AccessDenied", body=body)
        elif bucket != NAME:
            self._error("NoSuchBucket", body=body)
        elif not key:
            self._list(query.get("prefix", ""), int(query.get("continuation-token", "0")))
        elif (version := query.get("versionId")) is not None and version not in {*s3.old, s3.versions.get(key)}:
            self._error("NoSuchVersion", body=body)
        elif key not in s3.objects:
            self._error("NoSuchKey", body=body)
        else:
            self._object(key, version, body=body)

    def _list(self, prefix: str, start: int) -> None:
        s3 = self.served
        keys = sorted(key for key in s3.objects if key.startswith(prefix))
        end = start + s3.page
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(s3.objects[key])}</Size></Contents>"
            for key in keys[start:end]
        )
        more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < len(keys) else ""
        truncated = str(bool(more)).lower()
        text = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{contents}</ListBucketResult>"
        self._send(200, text.encode(), {"Content-Type": "application/xml"})

    def _object(self, key: str, version: str | None, *, body: bool) -> None:
        s3 = self.served
        content = s3.old.get(version or "", s3.objects[key])
        etag = f'"{hashlib.md5(content).hexdigest()}"'  # noqa: S324 - as S3 does
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        if current := version or s3.versions.get(key):
            headers["x-amz-version-id"] = current
        if s3.checksums and self.headers.get("x-amz-checksum-mode") == "ENABLED":
            digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
            headers["x-amz-checksum-sha256"] = digest if s3.checksums == "FULL_OBJECT" else f"{digest}-2"
            headers["x-amz-checksum-type"] = s3.checksums
        if self.headers.get("If-Match", etag) != etag:
            self._error("PreconditionFailed", body=body)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2]) + 1, len(content)) if wanted and wanted[2] else len(content)
        if wanted and start >= len(content):
            self._error("InvalidRange", body=body)
            return
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        part = content[start:end]
        if not body:
            self._send(200, b"", headers, length=len(part))
            return
        s3.asked.append(Asked(key, start, version))
        if cuts := s3.cut.get(key):
            self._send(206 if wanted else 200, part[: cuts.pop(0)], headers, length=len(part))
            self.close_connection = True
        else:
            self._send(206 if wanted else 200, part, headers)

    def _error(self, code: str, *, body: bool) -> None:
        text = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()
        self._send(STATUS[code], text if body else b"", {"Content-Type": "application/xml"}, length=len(text))

    def _send(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
