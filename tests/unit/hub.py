"""A small Hugging Face hub on loopback: what its client asks for when it looks at a model and fetches files."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "acme/Tiny_Model"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


def safetensors(tensors: dict[str, tuple[str, int]], seed: int = 0) -> bytes:
    """A file of tensors, given as data type and elements (two bytes each), with noise in them."""
    header, at = {}, 0
    for name, (dtype, elements) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [elements], "data_offsets": [at, at + 2 * elements]}
        at += 2 * elements
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + random.Random(seed).randbytes(at)  # noqa: S311 - noise


FACTS = {
    "architecture": "LlamaForCausalLM",
    "layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "attention_heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
    "max_positions": 512,
    "dtype": "bfloat16",
    "tied_embeddings": True,
    "parameters": 20_000,
    "weights_bytes": 40_000,
}
"""Of `tiny_model`, as the lock has them."""


def tiny_model(seed: int = 0, elements: int = 20_000) -> dict[str, bytes]:
    """The files of a model."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": safetensors({"model.embed_tokens.weight": ("BF16", elements)}, seed),
        "tokenizer.json": b'{"version": "1.0"}',
        "README.md": b"# Tiny\n",
    }


def fact(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class Asked:
    """One request for a file's content."""

    path: str
    start: int
    length: int
    token: str | None


@dataclass
class Hub:
    """Serves one repository. `localhost` in place of 127.0.0.1 is another host to a client: large files are there."""

    files: dict[str, bytes] = field(default_factory=tiny_model)
    token: str | None = None
    """What a client must show, if anything."""
    gated: bool = False
    """Nobody who shows a token has accepted the terms."""
    commit: str = COMMIT
    """What the branch `main` is at."""
    card: dict[str, str] = field(default_factory=lambda: {"license": "mit"})
    cut: dict[str, int] = field(default_factory=dict)
    """Path to how many bytes go out before the connection breaks, once."""
    stall: dict[str, int] = field(default_factory=dict)
    """Path to how many bytes go out before the answer stops until `proceed` is set."""
    asked: list[Asked] = field(default_factory=list)
    tokens_elsewhere: list[str] = field(default_factory=list)
    """Tokens that reached the other host."""
    stalled: threading.Event = field(default_factory=threading.Event)
    proceed: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"served": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.proceed.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def starts(self, path: str) -> list[int]:
        """Where each request for a file's content began."""
        return [asked.start for asked in self.asked if asked.path == path]


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        if match := re.fullmatch(r"/large/(.+)", path):
            self.served.tokens_elsewhere += [authorization] if authorization else []
            self._file(match[1], body=body)
        elif self.served.token and authorization != f"Bearer {self.served.token}":
            self._error(401, "GatedRepo", "Access to this model is restricted")
        elif self.served.gated:
            self._error(403, "GatedRepo", "Your account is not in the authorized list")
        elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/revision/([^/]+)", path):
            self._info(match[1])
        elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], body=body)
        else:
            self._error(404, "RepoNotFound", "Repository not found")

    def _info(self, revision: str) -> None:
        if revision not in {self.served.commit, "main"}:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": "0" * 40}
            | ({"lfs": {**fact(content), "pointerSize": 134}} if path.endswith(".safetensors") else {})
            for path, content in self.served.files.items()
        ]
        info = {
            "id": REPOSITORY,
            "sha": self.served.commit,
            "siblings": siblings,
            "cardData": self.served.card,
            "tags": [],
        }
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _resolve(self, revision: str, path: str, *, body: bool) -> None:
        if revision not in {self.served.commit, "main"}:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif path not in self.served.files:
            self._error(404, "EntryNotFound", f"Entry not found: {path}")
        elif path.endswith(".safetensors"):
            digest = fact(self.served.files[path])
            headers = {
                "Location": f"http://localhost:{self.served.port}/large/{path}",
                "X-Repo-Commit": self.served.commit,
                "X-Linked-Etag": f'"{digest["sha256"]}"',
                "X-Linked-Size": str(digest["size"]),
            }
            self._send(302, b"", headers)
        else:
            self._file(path, body=body)

    def _file(self, path: str, *, body: bool) -> None:
        hub = self.served
        content = hub.files[path]
        headers = {"ETag": f'"{fact(content)["sha256"]}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2]) + 1, len(content)) if wanted and wanted[2] else len(content)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        part = content[start:end]
        if body:
            hub.asked.append(Asked(path, start, len(part), self.headers.get("Authorization")))
        self._head(206 if wanted else 200, len(part), headers)
        if not body:
            return
        if (cut := hub.cut.pop(path, None)) is not None:
            self.wfile.write(part[:cut])
            self.close_connection = True
        elif (stall := hub.stall.pop(path, None)) is not None:
            self.wfile.write(part[:stall])
            hub.stalled.set()
            hub.proceed.wait()
            self.wfile.write(part[stall:])
        else:
            self.wfile.write(part)

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(content), headers)
        self.wfile.write(content)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
