"""moto's S3 on a free port of loopback, from the environment that tests/aws/standin.py makes; and a bad road to it."""

from __future__ import annotations

import contextlib
import http.client
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.aws.standin import moto_python

SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
HOP = {"connection", "host", "transfer-encoding", "content-length"}


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """`host:port`; it ends with this process, however that ends."""
    command = [str(moto_python()), "-c", SERVE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout
            address = process.stdout.readline().strip()
            assert address, "moto does not start"
            yield address
        finally:
            process.kill()


@dataclass
class Road:
    """A proxy that does to reads of objects what it is told to, one fault for one request."""

    address: str
    faults: dict[str, list[Any]] = field(default_factory=dict)
    """End of the key to faults in order: a status with code such as `503 SlowDown`, a number of bytes after which the
    connection breaks, `wrong` (the first byte), an Event that is waited for before the answer."""
    asked: list[tuple[str, int]] = field(default_factory=list)
    """Key of every object that was read, and where the range began."""
    requests: int = 0

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"road": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for faults in self.faults.values():
            for fault in faults:
                if isinstance(fault, threading.Event):
                    fault.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fault(self, key: str) -> Any:
        faults = next((faults for end, faults in self.faults.items() if key.endswith(end)), [])
        return faults.pop(0) if faults else None

    def starts(self, name: str) -> list[int]:
        return [start for key, start in self.asked if key.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    road: Road
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._forward()

    def do_HEAD(self) -> None:
        self._forward()

    def do_PUT(self) -> None:
        self._forward()

    def do_POST(self) -> None:
        self._forward()

    def _forward(self) -> None:
        road = self.road
        road.requests += 1
        fault = None
        url = urlsplit(self.path)
        if self.command == "GET" and url.path.count("/") > 1 and "list-type" not in url.query:
            key = unquote(url.path).split("/", 2)[2]
            wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            road.asked.append((key, int(wanted[1]) if wanted else 0))
            fault = road.fault(key)
        if isinstance(fault, threading.Event):
            fault.wait(60)
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(fault, str) and fault[0].isdigit():
            status, code = fault.split()
            self._send(int(status), {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        connection = http.client.HTTPConnection(road.address, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        connection.request(self.command, self.path, sent, {**headers, "Content-Length": str(len(sent))})
        answer = connection.getresponse()
        body = answer.read()
        length = int(answer.headers.get("Content-Length", len(body))) if self.command == "HEAD" else len(body)
        connection.close()
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        if isinstance(fault, int):
            body = body[:fault]
            self.close_connection = True
        self._send(answer.status, dict(answer.headers.items()), body, length)

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
