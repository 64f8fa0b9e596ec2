"""How strict every part of the config is, and what can be a name in it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

MAX_NAME = 40
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
NAME_FIX = f"small letters, digits and . _ -, first a letter or digit, at most {MAX_NAME}; in quotes if all digits"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$", max_length=MAX_NAME)]
"""Names of models, pools and keys end up in file names, in HAProxy's configuration and in metric labels."""


def likely_name(text: str) -> str | None:
    """The name that is most like a text that cannot be one, if there is any."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")
    return name if NAME.fullmatch(name) and len(name) <= MAX_NAME else None


class Strict(BaseModel):
    """Base of the config's parts: immutable, no unknown keys, no conversions; keys-are-written-with-hyphens."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        use_attribute_docstrings=True,
    )
