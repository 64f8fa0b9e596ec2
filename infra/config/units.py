"""Numbers that are written with a unit, names of hosts and headers: from text, and back to it where a limit is told."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from infra.findings import show

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?) ?(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d{1,9}) ?(B|kB|KiB|MB|MiB|GB|GiB|TB|TiB)")
_BYTES = {
    "B": 1,
    "kB": 1000,
    "KiB": 1 << 10,
    "MB": 10**6,
    "MiB": 1 << 20,
    "GB": 10**9,
    "GiB": 1 << 30,
    "TB": 10**12,
    "TiB": 1 << 40,
}
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOSTNAME = re.compile(rf"(?:{_LABEL}\.)*(?=[a-z0-9-]*[a-z]){_LABEL}")
"""RFC 1123; the last part is no number, or it would be an address."""
MAX_HOSTNAME = 253
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}")
_PATH = re.compile(r"/[A-Za-z0-9._/@+-]{1,255}")


def refusal(problem: str, fix: str) -> PydanticCustomError:
    """What a validator raises: a finding but for its path, which pydantic knows."""
    return PydanticCustomError("finding", "{problem}", {"problem": problem, "fix": fix})


def duration(value: Any) -> float:
    """Seconds in a text like `30s`, `500ms`, `2m`, `1h`."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise refusal(f"{show(value)} is not a duration", f"a number and one of {', '.join(_SECONDS)}: 500ms, 30s, 2m")
    return float(match[1]) * _SECONDS[match[2]]


def size(value: Any) -> int:
    """Bytes in a text like `128MiB`, `4GB`."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise refusal(f"{show(value)} is not a size", f"a whole number and one of {', '.join(_BYTES)}: 512KiB, 4MB")
    return int(match[1]) * _BYTES[match[2]]


def hostname(value: Any) -> str:
    """A name of the DNS in small letters, without what else a URL has."""
    if not isinstance(value, str):
        raise refusal(f"must be text, not {show(value)}", "a name such as `llm.example.com`")
    if _is_hostname(value):
        return value
    meant = value.strip().lower().partition("://")[2] or value.strip().lower()
    meant = re.split(r"[/:?#]", meant, maxsplit=1)[0].removeprefix("*.").removesuffix(".").replace("_", "-")
    fix = f"write `{meant}`" if _is_hostname(meant) else "a name such as `llm.example.com`"
    raise refusal(f"{show(value)} is not the name of a host", f"{fix}: small letters, digits, hyphens and dots alone")


def _is_hostname(text: str) -> bool:
    return len(text) <= MAX_HOSTNAME and _HOSTNAME.fullmatch(text) is not None


def header_name(value: Any) -> str:
    """Name of an HTTP header."""
    if not isinstance(value, str) or not _HEADER.fullmatch(value):
        raise refusal(
            f"{show(value)} is not the name of a header", "letters, digits and hyphens, such as `X-Session-Id`"
        )
    return value


def path_on_host(value: Any) -> str:
    """Absolute path of a file, without anything that the configuration of a proxy would have to quote."""
    if not isinstance(value, str) or not _PATH.fullmatch(value):
        fix = "from / on, letters, digits and . _ - + @ alone: `/etc/vllm-fleet/gateway.pem`"
        raise refusal(f"{show(value)} is not the path of a file on the gateway's machine", fix)
    return value


def as_duration(seconds: float) -> str:
    """Seconds in the unit in which they are shortest to say."""
    return f"{seconds * 1000:g}ms" if seconds < 1 else f"{seconds:g}s"


def as_size(count: float) -> str:
    """Bytes in the largest unit of which they are a whole number."""
    return next(
        f"{int(count) // factor}{unit}" for unit, factor in reversed(_BYTES.items()) if int(count) % factor == 0
    )


Duration = Annotated[
    float, BeforeValidator(duration), WithJsonSchema({"type": "string", "pattern": f"^{_DURATION.pattern}$"})
]
Size = Annotated[int, BeforeValidator(size), WithJsonSchema({"type": "string", "pattern": f"^{_SIZE.pattern}$"})]
Hostname = Annotated[
    str, BeforeValidator(hostname), WithJsonSchema({"type": "string", "pattern": f"^{_HOSTNAME.pattern}$"})
]
HeaderName = Annotated[
    str, BeforeValidator(header_name), WithJsonSchema({"type": "string", "pattern": f"^{_HEADER.pattern}$"})
]
HostPath = Annotated[
    str, BeforeValidator(path_on_host), WithJsonSchema({"type": "string", "pattern": f"^{_PATH.pattern}$"})
]
