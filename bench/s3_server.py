"""A small, fast S3 for reading on loopback, with one link of a known rate in front of it.

It serves a folder as bucket: objects with ranges (sendfile: the kernel copies), HEAD and lists. All connections share
one token bucket, the link; each may have a lower rate of its own, as S3's connections have. moto is too slow to measure
readers with: it copies every object in Python.

    python bench/s3_server.py '{"folder": "/data", "bytes_per_s": 400e6}'     prints its port
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PIECE = 256 * 1024
"""Bytes that one connection takes from the link at once: shared fairly, and few calls."""


@dataclass
class Link:
    """A token bucket that gives bytes out at a rate; None: as fast as may be."""

    bytes_per_s: float | None
    _free_at: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, count: int) -> float:
        """Seconds to wait until so many bytes may go out."""
        if not self.bytes_per_s:
            return 0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - PIECE / self.bytes_per_s) + count / self.bytes_per_s
            return max(self._free_at - now, 0)


class Server(ThreadingHTTPServer):
    """Serves one folder under any bucket's name."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(
        self, folder: Path, bytes_per_s: float | None = None, connection_bytes_per_s: float | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.link = Link(bytes_per_s)
        self.connection_bytes_per_s = connection_bytes_per_s


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.own = Link(self.server.connection_bytes_per_s)

    def log_message(self, *_: object) -> None:
        """Nothing: it would cost more than the answer."""

    def do_HEAD(self) -> None:
        """An object's size."""
        self._object(body=False)

    def do_GET(self) -> None:
        """An object, a range of it, or a list."""
        if "list-type" in self.path or "prefix=" in self.path or "location" in self.path:
            self._list()
        else:
            self._object(body=True)

    def _list(self) -> None:
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{file.stat().st_size}</Size>"
            "<ETag>&quot;e&quot;</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for file in sorted(self.server.folder.rglob("*"))
            if file.is_file() and (key := file.relative_to(self.server.folder).as_posix()).startswith(prefix)
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _object(self, *, body: bool) -> None:
        key = unquote(urlsplit(self.path).path).split("/", 2)[2]
        try:
            descriptor = os.open(self.server.folder / key, os.O_RDONLY)
        except OSError:
            text = b"<Error><Code>NoSuchKey</Code></Error>" if body else b""
            self.send_response(404)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        try:
            size = os.fstat(descriptor).st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            end = min(int(wanted[2]) + 1, size) if wanted and wanted[2] else size
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - start))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"e"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                while body and start < end:
                    count = min(PIECE, end - start)
                    time.sleep(max(self.server.link.take(count), self.own.take(count)))
                    start += os.sendfile(self.connection.fileno(), descriptor, start, count)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    server = Server(Path(settings.pop("folder")), **settings)
    print(server.server_address[1], flush=True)
    server.serve_forever()
