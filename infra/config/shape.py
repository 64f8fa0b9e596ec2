"""The shape of the config: which type is at a path, which keys it has, and which key was meant by a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from infra.config.stack import StackConfig
from infra.findings import nearest

CLOSE = 0.8
"""A word that is so like a key is that key, misspelt, even if it is a key elsewhere."""
OTHER_NAMES = {
    "max-model-len": "context",
    "max-num-seqs": "concurrency",
    "model": "weights",
    "tp": "tensor-parallel-size",
    "replicas": "engines",
    "tool-call-parser": "tool-calls",
    "instance-type": "instance",
    "count": "nodes",
}
"""What vLLM and others call our keys."""


def type_at(location: Sequence[int | str]) -> Any:
    """The type that the config has at a path; None where it has nothing."""
    here: Any = StackConfig
    for part in location:
        if _is_part(here):
            here = next((field.annotation for field in here.model_fields.values() if field.alias == part), None)
        else:
            here = get_args(here)[-1] if get_origin(here) in {dict, list} else None
        here = _not_none(here)
    return here


def keys(type_: Any) -> list[str]:
    """The keys that a part of the config can have; none if the user chooses them."""
    return [str(field.alias) for field in type_.model_fields.values()] if _is_part(type_) else []


def meant(word: str, type_: Any) -> str | None:
    """The key of a part that was meant by a word, if that is beyond doubt."""
    known, plain = {_plain(key): key for key in keys(type_)}, _plain(word)
    return known.get(plain) or known.get(OTHER_NAMES.get(plain, "")) or nearest(word, known.values(), least=CLOSE)


def places(word: str) -> list[str]:
    """Where in the config a word is a key, in words."""
    return [where for where, known in _parts(StackConfig, "") if _plain(word) in map(_plain, known)]


def _parts(part: Any, at: str) -> Iterator[tuple[str, list[str]]]:
    """Every part of the config with its keys."""
    yield f"`{at}`" if at else "the stack itself", keys(part)
    for field in part.model_fields.values():
        inner, here = _not_none(field.annotation), f"{at}.{field.alias}".removeprefix(".")
        if get_origin(inner) is dict:
            inner, here = get_args(inner)[1], f"{here}.NAME"
        if _is_part(inner):
            yield from _parts(inner, here)


def _plain(word: str) -> str:
    return word.lower().replace("_", "-")


def _is_part(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, BaseModel)


def _not_none(type_: Any) -> Any:
    """The type of a value that is there: without None, and without limits where nothing depends on them."""
    if get_origin(type_) in {Union, UnionType}:
        type_ = next(inner for inner in get_args(type_) if inner is not type(None))
    if get_origin(type_) is Annotated and _is_part(get_args(type_)[0]):
        return get_args(type_)[0]
    return type_
