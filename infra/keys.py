"""API keys: made here, shown once, known by their SHA-256 ever after."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from infra.api_key import digest, new_key
from infra.config import StackConfig
from infra.findings import ConfigError, Finding
from infra.stack_file import add_key, remove_key, stack_file
from infra.targets.local.host import default_key_file

DEFAULT = "default"
"""Name of the key that a local stack makes for itself while its config names none."""
NOT_MADE = "(made by `pulumi up`)"
"""Stands in a plan for the hash of that key until there is one."""


def add(stack: str, name: str) -> str:
    """Make a key and write its hash into the stack file.

    Returns:
        The key. It is nowhere else.

    Raises:
        ConfigError: The name is taken or cannot be one, or the stack file is wrong.
    """
    if name == DEFAULT:
        raise ConfigError([Finding(f"api-keys.{name}", "is the name of the stack's own key", "choose another name")])
    key, path = new_key(), stack_file(stack)
    with _alone(path):
        add_key(path, name, digest(key))
    return key


def revoke(stack: str, name: str) -> None:
    """Take a key out of the stack file.

    Raises:
        ConfigError: There is no such key.
    """
    path = stack_file(stack)
    with _alone(path):
        remove_key(path, name)


def for_plan(stack: str, config: StackConfig) -> Mapping[str, str]:
    """The keys that `pulumi up` would configure, by name; reads only, so the stack's own key may not be there yet."""
    if config.api_keys:
        return config.api_keys
    try:
        return {DEFAULT: digest(default_key_file(stack).read_text(encoding="ascii").strip())}
    except (OSError, ValueError):
        return {DEFAULT: NOT_MADE}


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Edit stack files one after the other: of two edits at once, one would be lost."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError([Finding(str(path.parent), f"cannot be read: {error.strerror}")]) from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
