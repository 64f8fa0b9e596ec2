"""API keys in the stack config: the hash of each, and what its owner may do."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from infra.config.strict import Strict
from infra.config.units import refusal
from infra.findings import show

DEFAULT = "default"
"""Name of the key that a local stack makes for itself while its config names none."""
ENCRYPTED = "(encrypted)"
"""Stands for the hash of a key that only Pulumi can decrypt: `{secure: …}` in the stack file."""
DATE_FIX = "write the last day on which it is good, in UTC, as YYYY-MM-DD"
_KEY_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_DATE = re.compile(r"(\d{4}-\d{2}-\d{2})(?: 00:00:00 \+0000 UTC)?")
"""So Pulumi rewrites a date that stands in YAML without quotes."""
HASH_SCHEMA: JsonSchemaValue = {
    "anyOf": [
        {"type": "string", "pattern": f"^{_KEY_HASH.pattern}$"},
        {"type": "object", "properties": {"secure": {}}, "required": ["secure"], "additionalProperties": False},
    ]
}


def key_hash(value: Any) -> str:
    """SHA-256 in hex of an API key, from `sha256:<64 hex digits>`. What was given may be a key: it is not repeated."""
    if isinstance(value, Mapping) and set(value) == {"secure"}:
        return ENCRYPTED
    match = _KEY_HASH.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise refusal(
            "is not the hash of an API key; it may be a key in plain text, so it is not shown",
            "`fleet keys add NAME` makes a key and writes its hash; a key that was in a file is not secret any more",
        )
    return match[1]


def last_day(value: Any) -> str:
    """A day as YYYY-MM-DD, from that text or from YAML's own date."""
    text = value.isoformat() if isinstance(value, dt.date) else value
    match = _DATE.fullmatch(text) if isinstance(text, str) else None
    try:
        return dt.date.fromisoformat(match[1]).isoformat() if match else _no_day(value)
    except ValueError:
        return _no_day(value)


def _no_day(value: Any) -> str:
    raise refusal(f"{show(value)} is no day", DATE_FIX)


def some_models(value: Any) -> Any:
    """Names of models, not none: a key for nothing is a mistake."""
    if value == []:
        raise refusal("is empty: the key would be good for nothing", "name models, or remove it: then it may use all")
    return value


class KeyConfig(Strict):
    """An API key with limits; one without is its hash alone."""

    hash: Annotated[str, BeforeValidator(key_hash), WithJsonSchema(HASH_SCHEMA)]
    """SHA-256 of the key: `sha256:…`. `fleet keys add NAME` makes the key and writes it."""
    models: Annotated[list[str], BeforeValidator(some_models)] | None = None
    """Models that it may use. Default: all."""
    rpm: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests that it may begin in a minute. Default: no limit."""
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Requests that it may have open at once. Default: no limit."""
    expires: Annotated[str, BeforeValidator(last_day), WithJsonSchema({"type": "string", "format": "date"})] | None = (
        None
    )
    """The last day on which it is good, in UTC: YYYY-MM-DD. Default: it is good until it is revoked."""

    def over(self, today: dt.date) -> bool:
        """Whether it has expired by that day (of UTC)."""
        return self.expires is not None and dt.date.fromisoformat(self.expires) < today


def api_key(value: Any) -> Any:
    """A key, from its hash alone or from a mapping with limits."""
    if isinstance(value, KeyConfig) or (isinstance(value, Mapping) and set(value) != {"secure"}):
        return value
    return unlimited(key_hash(value))


class _OrHash:
    """To editors: the hash alone will do."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [*HASH_SCHEMA["anyOf"], handler(core)]}


ApiKey = Annotated[KeyConfig, BeforeValidator(api_key), _OrHash()]
ApiKeys = Mapping[str, KeyConfig | str]
"""By their owners' names; a text is the SHA-256 in hex of a key without limits."""


def unlimited(sha256: str) -> KeyConfig:
    """A key without limits, by its SHA-256 in hex."""
    return KeyConfig.model_construct(hash=sha256)


def with_limits(keys: ApiKeys) -> dict[str, KeyConfig]:
    """Every key with its limits, if it has any."""
    return {name: unlimited(key) if isinstance(key, str) else key for name, key in keys.items()}
