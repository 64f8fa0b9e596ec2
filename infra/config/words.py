"""What is wrong with a config, in the words of the stack file: pydantic's errors as findings."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BeforeValidator

from infra.config.plaintext import hidden
from infra.config.pools import PoolConfig
from infra.config.shape import keys, meant, places, type_at
from infra.config.stack import NAMESPACE, ModelConfig, StackConfig
from infra.config.strict import MAX_NAME, NAME_FIX, likely_name
from infra.config.units import as_duration, as_size, duration, size
from infra.findings import Finding, did_you_mean, kind, show

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Location = tuple[int | str, ...]

KEY = "[key]"
"""Pydantic's mark, at the end of a path, of an error in the key itself."""
SHORT = {ModelConfig: "weights", PoolConfig: "gpu"}
"""The key that was probably meant where a text stands alone."""
HINTS = {
    PoolConfig: {
        "spot": "write `capacity: [{spot: 0.6}, on-demand]`: ways to get nodes, in this order",
        "on-demand": "write `capacity: [on-demand]`: ways to get nodes, in this order",
        "reservation": "write `capacity: [{reservation: cr-…}, on-demand]`: ways to get nodes, in this order",
    },
    StackConfig: dict.fromkeys(
        ("region", "aws-region", "aws:region"), f"write `aws:region: …`, without `{NAMESPACE}:`"
    ),
}
"""What to do about a key that is none, by the part of the config that it was written in."""
FORMATS = {
    **dict.fromkeys(("fp8", "int8", "w8a8", "w8a8-int8", "8", "8 bit"), "8bit"),
    **dict.fromkeys(("awq", "gptq", "int4", "w4a16", "4", "4 bit"), "4bit"),
    **dict.fromkeys(("bf16", "fp16", "bfloat16", "float16", "false", "no", "off"), "none"),
}
"""What is a level of quantisation by another name: the plan picks the format."""
TARGETS = {
    **dict.fromkeys(("k8s", "eks", "gke", "aks", "openshift", "cluster"), "kubernetes"),
    **dict.fromkeys(("amazon", "ec2"), "aws"),
    **dict.fromkeys(("localhost", "laptop", "docker", "cpu"), "local"),
}
"""What is a target by another name."""
TOKENS = {"context", "max-answer", "typical-tokens", "max-num-batched-tokens", "prompt-tokens", "answer-tokens"}
"""Where k is 1024, as in the names of models."""
LARGEST = 10**15
"""Of a number that is proposed: the same as `show` shows."""
LIMITS = {
    "greater_than_equal": ("is too small", "at least", "ge"),
    "greater_than": ("is too small", "more than", "gt"),
    "less_than_equal": ("is too large", "at most", "le"),
}
MISSING = {
    "target": f"add `{NAMESPACE}:target: local`, or aws or kubernetes",
    "models": f"add `{NAMESPACE}:models: {{chat: {{weights: ENTRY}}}}` with an ENTRY of stacks/models.lock.yaml",
}


def path(location: Location) -> str:
    """A path as it is shown. A name under `api-keys` could be a key that was written on the wrong side of the colon."""
    parts = [hidden(show(part).strip("`")) or '""' for part in location]
    if parts[0] == "api-keys" and len(parts) > 1 and (parts[1].startswith("sk-") or len(parts[1]) > MAX_NAME // 2):
        parts[1] = f"{parts[1][:4]}…"
    return ".".join(parts)


def finding(problem: ErrorDetails, written: Location) -> Finding:
    """One of pydantic's errors in the words of the stack file.

    Args:
        problem: The error.
        written: Its path as the user has written it.
    """
    if problem["loc"][-1] == KEY and problem["type"] == "finding":
        return Finding(path(written[:-1]), problem["ctx"]["problem"], problem["ctx"]["fix"])
    if problem["loc"][-1] == KEY:
        likely = likely_name(str(written[-2])) if written[0] != "api-keys" else None
        fix = f"write `{likely}`: {NAME_FIX}" if likely else NAME_FIX
        return Finding(path(written[:-1]), "cannot be a name", fix)
    if problem["type"] == "finding":
        return Finding(path(written), problem["ctx"]["problem"], problem["ctx"]["fix"])
    return Finding(path(written), *_words(problem))


def _words(problem: ErrorDetails) -> tuple[str, str]:
    """Problem and fix of an error that pydantic's own types find."""
    location, value, type_ = problem["loc"], problem["input"], type_at(problem["loc"])
    match problem["type"]:
        case "missing" | "too_short":
            words = "is missing", MISSING.get(str(location[-1]), f"add `{location[-1]}: …`")
        case "extra_forbidden":
            words = "unknown key", _other_key(str(location[-1]), type_at(location[:-1]))
        case "literal_error":
            words = f"cannot be {show(value)}", _other_value(value, get_args(type_))
        case "list_type":
            items = show(value).strip("`") if isinstance(value, str) else "…, …"
            words = f"must be a list, not {kind(value)}", f"in brackets: `[{items}]`"
        case "dict_type" | "model_type" | "model_attributes_type":
            words = f"must be a mapping, not {kind(value)}", _lines(str(location[-1]), type_, value)
        case limit if limit in LIMITS:
            said, most, key = LIMITS[limit]
            words = said, f"{_in_its_unit(type_, value)}{most} {_limit(type_, problem['ctx'][key])}"
        case other:
            words = _wrong_type(other, str(location[-1]), type_, value)
    return words


def _wrong_type(problem: str, key: str, type_: Any, value: Any) -> tuple[str, str]:
    """Problem and fix of a single value that is of another type."""
    match problem:
        case "int_type":
            return f"must be a whole number, not {show(value)}", _whole_number(key, value)
        case "float_type":
            return f"must be a number, not {show(value)}", _number(type_, value)
        case "finite_number":
            return "is not finite", "a number, or remove the line to have no limit"
        case "bool_type":
            return f"must be true or false, not {show(value)}", _truth(value)
        case _:
            single = isinstance(value, int | float)
            return f"must be text, not {show(value)}", "in quotes, if that is its name" if single else "one name alone"


def _other_key(word: str, type_: Any) -> str:
    """The fix for a key that is not there."""
    if (key := meant(word, type_)) is not None:
        return f"did you mean `{key}`?"
    if hint := HINTS.get(type_, {}).get(word.lower().replace("_", "-")):
        return hint
    if type_ is StackConfig and word.partition(".")[0] in keys(type_):
        return f"write one under the other, as `pulumi config set --path '{NAMESPACE}:{word}' VALUE` does"
    if elsewhere := places(word):
        return f"it is a key of {' and of '.join(elsewhere)}"
    return did_you_mean(word, keys(type_))


def _other_value(value: Any, choices: tuple[str, ...]) -> str:
    """The fix for a value that is none of the choices."""
    level = FORMATS.get(str(value).lower())
    if level in choices:
        return f"write `{level}`: the plan picks the format that the machine runs best"
    if (target := other_target(value)) in choices:
        return f"did you mean `{target}`?"
    return did_you_mean(value if isinstance(value, str) else "", choices)


def other_target(value: Any) -> str | None:
    """The target that was meant by another name."""
    return TARGETS.get(value.lower()) if isinstance(value, str) else None


def _lines(key: str, type_: Any, value: Any) -> str:
    """What a mapping could be in place of a value."""
    if type_ in SHORT and isinstance(value, str):
        return f"write `{key}: {{{SHORT[type_]}: {show(value).strip('`')}}}`"
    known = keys(type_)
    return f"keys: {', '.join(known)}" if known else "write `NAME: …` lines under it"


def _limit(type_: Any, value: float) -> str:
    """A limit as it would be written."""
    units = {it.func for it in getattr(type_, "__metadata__", ()) if isinstance(it, BeforeValidator)}
    if size in units:
        return as_size(value)
    return as_duration(value) if duration in units else f"{value:.10g}"


def _whole_number(key: str, value: Any) -> str:
    """The number that was probably meant by `16k`, `"8"`, `100,000` or `1e6`."""
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST:
        return f"write {int(value)}"
    match = re.fullmatch(r"(\d{1,9}|\d{1,3}(?:[,_ ']\d{3})+) ?([kKmM]?)", value) if isinstance(value, str) else None
    if match is None:
        return "digits alone, without quotes or unit"
    factor = {"": 1, "k": 1024 if key in TOKENS else 1000, "m": 1_000_000}[match[2].lower()]
    return f"write {int(re.sub(r'[^0-9]', '', match[1])) * factor}"


def _number(type_: Any, value: Any) -> str:
    """The number that was probably meant by `"0.9"`, `90%` or `$12`."""
    match = re.fullmatch(r"\$? ?(\d{1,9}(?:\.\d{1,6})?) ?(%|\$|usd|USD)?", value) if isinstance(value, str) else None
    if match is None:
        return "digits and a point alone, without quotes or unit"
    return f"write {float(match[1]) / (100 if match[2] == '%' and _is_part_of_one(type_) else 1):g}"


def _in_its_unit(type_: Any, value: Any) -> str:
    """What was probably meant where a part of one is written as percent, or the other way round."""
    if not isinstance(value, int | float):
        return ""
    scaled, (least, most) = value / 100 if _is_part_of_one(type_) else value * 100, _bounds(type_)
    percent = least >= 50 and most <= 100  # noqa: PLR2004 - such limits are percent
    meant_so = (percent or _is_part_of_one(type_)) and least <= scaled <= most
    return f"write {scaled:g}, {'in percent' if percent else 'a part of 1'}; " if meant_so else ""


def _is_part_of_one(type_: Any) -> bool:
    return _bounds(type_)[1] <= 1


def _bounds(type_: Any) -> tuple[float, float]:
    """The limits of a number; infinite where there are none."""
    limits = [limit for it in getattr(type_, "__metadata__", ()) for limit in getattr(it, "metadata", ())]
    least = next((limit.ge for limit in limits if hasattr(limit, "ge")), -math.inf)
    most = next((limit.le for limit in limits if hasattr(limit, "le")), math.inf)
    return least, most


def _truth(value: Any) -> str:
    """Of YAML's two words the one that was probably meant by `yes` or 1."""
    said = str(value).lower() if isinstance(value, str | int) else ""
    for word, others in (("true", {"true", "yes", "on", "y", "1"}), ("false", {"false", "no", "off", "n", "0"})):
        if said in others:
            return f"write {word}, without quotes"
    return "write true or false"
