"""API keys: made here, shown once, known by their SHA-256 ever after."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic_core import PydanticCustomError

from infra.api_key import digest, new_key
from infra.config import DEFAULT, ApiKeys, KeyConfig, StackConfig
from infra.config.api_keys import DATE_FIX, last_day
from infra.config.checks import no_model
from infra.findings import ConfigError, Finding, show
from infra.stack_file import add_key, load_stack_file, remove_key, stack_file
from infra.targets.local.host import default_key_file

NOT_MADE = "(made by `pulumi up`)"
"""Stands in a plan for the hash of that key until there is one."""


@dataclass(frozen=True)
class Limits:
    """What a key may do. None: no limit."""

    models: tuple[str, ...] | None = None
    rpm: int | None = None
    concurrency: int | None = None
    expires: str | None = None
    """The last day on which it is good, in UTC: YYYY-MM-DD."""


NO_LIMITS = Limits()


def today() -> dt.date:
    """In UTC, where keys expire."""
    return dt.datetime.now(dt.UTC).date()


def add(stack: str, name: str, limits: Limits = NO_LIMITS) -> str:
    """Make a key and write its hash and its limits into the stack file.

    Returns:
        The key. It is nowhere else.

    Raises:
        ConfigError: The name is taken or cannot be one, a limit cannot be, or the stack file is wrong.
    """
    if name == DEFAULT:
        raise ConfigError([Finding(f"api-keys.{name}", "is the name of the stack's own key", "choose another name")])
    key, path = new_key(), stack_file(stack)
    with _alone(path):
        if wrong := [*_wrong(limits, load_stack_file(path))]:
            raise ConfigError(wrong)
        add_key(path, name, digest(key), {what: value for what, value in asdict(limits).items() if value is not None})
    return key


def _wrong(limits: Limits, config: StackConfig) -> Iterator[Finding]:
    """Limits that cannot be."""
    if limits.models == ():
        yield Finding("--models", "is empty: the key would be good for nothing", "name models, or leave it out")
    for model in limits.models or ():
        if model not in config.models:
            yield Finding("--models", *no_model(model, config.models))
    if limits.expires is not None:
        try:
            day = dt.date.fromisoformat(last_day(limits.expires))
        except PydanticCustomError:
            yield Finding("--expires", f"{show(limits.expires)} is no day", DATE_FIX)
        else:
            if day < today():
                yield Finding("--expires", f"{day} is over", "a day that is still to come, in UTC")


def terms(key: KeyConfig) -> str:
    """The limits of a key in words."""
    said = [
        f"models {', '.join(key.models)}" if key.models else "",
        f"{key.rpm} requests a minute" if key.rpm else "",
        f"{key.concurrency} at once" if key.concurrency else "",
        f"{'expired after' if key.over(today()) else 'until'} {key.expires}" if key.expires else "",
    ]
    return "; ".join(filter(None, said))


def revoke(stack: str, name: str) -> None:
    """Take a key out of the stack file.

    Raises:
        ConfigError: There is no such key.
    """
    path = stack_file(stack)
    with _alone(path):
        remove_key(path, name)


def for_plan(stack: str, config: StackConfig) -> ApiKeys:
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
