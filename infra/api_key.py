"""An API key: shown once, known by its SHA-256 ever after."""

from __future__ import annotations

import hashlib
import secrets

PREFIX = "sk-fleet-"
RANDOM_BYTES = 32


def new_key() -> str:
    """A fresh key: the prefix and 43 characters that URLs and headers take as they are."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def digest(key: str) -> str:
    """What is kept of a key: SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()
