"""`fleet catalog check`: everything that is wrong with the catalog's files, at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from yaml.nodes import MappingNode, Node, SequenceNode

from infra.catalog import consistency
from infra.catalog.charges import Charge
from infra.catalog.efficiency import Efficiency
from infra.catalog.engine import EngineCatalog
from infra.catalog.gpu_start import GpuStart
from infra.catalog.gpus import Gpu
from infra.catalog.hosted import HostedPrice
from infra.catalog.images import PublicImage
from infra.catalog.instances import Instance
from infra.catalog.memory import MemoryCatalog
from infra.catalog.quotas import Quota
from infra.catalog.services import Service
from infra.catalog.strict import FOLDER, LOADER, Strict, parse
from infra.findings import Finding, did_you_mean, in_order, kind, show

ROWS: dict[str, tuple[str, type[Strict]]] = {
    "aws-charges.yaml": ("charges", Charge),
    "aws-instances.yaml": ("instances", Instance),
    "aws-images.yaml": ("images", PublicImage),
    "aws-quotas.yaml": ("quotas", Quota),
    "aws-services.yaml": ("services", Service),
    "gpus.yaml": ("gpus", Gpu),
    "hosted-prices.yaml": ("hosted", HostedPrice),
}
"""Files of rows that can be checked one by one: the key that they are under, and what a row is."""
WHOLE: dict[str, type[BaseModel]] = {
    "efficiency.yaml": Efficiency,
    "gpu-start.yaml": GpuStart,
    "vllm-cpu.yaml": EngineCatalog,
    "vllm-memory.yaml": MemoryCatalog,
}
"""Files that are one thing."""
PRICES = ("aws-charges.yaml", "aws-instances.yaml", "aws-services.yaml", "hosted-prices.yaml")
STALE_MONTHS = 12
"""Prices fall in steps: AWS cut that of the H100 by 44 % in 2025-06; hosted models do with each generation."""
REFRESH = dict.fromkeys(("aws-charges.yaml", "hosted-prices.yaml"), "look the price up again")
RESTORE = "restore it from version control"
SHOWN = "2026-11"
NOUNS = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "model": "a mapping",
    "string": "text",
    "tuple": "a list",
}
"""What pydantic calls it, and what people do."""
FIXES = {
    "source": "say where it is from, so that the next one who doubts it can look there",
    "date": f"say when it was looked up: `date: {SHOWN}`",
}


@dataclass
class Checked:
    """One file."""

    name: str
    dates: list[str] = field(default_factory=list)
    """Of all its rows or facts."""
    names: list[str] = field(default_factory=list)
    """Of its rows."""
    rows: dict[str, Any] = field(default_factory=dict)
    """Those that are valid; of a file that is one whole, none."""
    findings: list[Finding] = field(default_factory=list)


def check(today: date, folder: Path = FOLDER) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """What is wrong with the catalog, and what is out of date.

    Args:
        today: To tell how old a price is.
        folder: Where the files are.

    Returns:
        Findings, and warnings: with these the catalog can be used.
    """
    files = {name: _rows(folder / name, *of) for name, of in ROWS.items()}
    wholes = [_whole(folder / name, model) for name, model in WHOLE.items()]
    findings = [finding for file in (*files.values(), *wholes) for finding in file.findings]
    findings += consistency.gpus(files["gpus.yaml"].rows)
    findings += consistency.instances(files["aws-instances.yaml"].rows, files["gpus.yaml"].names)
    findings += consistency.hosted(files["hosted-prices.yaml"].rows)
    warnings = []
    for file in files.values():
        for name, row in file.rows.items():
            age = _months(row.date, today)
            if age < 0:
                findings.append(Finding(f"{file.name}: {name}.date", f"{row.date} is yet to come", FIXES["date"]))
            elif age > STALE_MONTHS and file.name in PRICES:
                fix = REFRESH.get(file.name, "`fleet prices refresh`")
                warnings.append(Finding(f"{file.name}: {name}.date", f"the price is {age} months old", fix))
    return in_order(findings), in_order(warnings)


def summary(folder: Path = FOLDER) -> list[tuple[str, int, str, str]]:
    """Of every file: its name, how many facts it has, the oldest date and the newest."""
    files = [_rows(folder / name, *of) for name, of in ROWS.items()]
    files += [_whole(folder / name, model) for name, model in WHOLE.items()]
    return [(it.name, len(it.dates), min(it.dates, default=""), max(it.dates, default="")) for it in files]


def _months(month: str, today: date) -> int:
    year, number = month.split("-")
    return (today.year - int(year)) * 12 + today.month - int(number)


# One file


def _rows(path: Path, key: str, model: type[Strict]) -> Checked:
    file = Checked(path.name)
    document = _document(path, file)
    if document is None:
        return file
    table = document.get(key) if isinstance(document, Mapping) else None
    if not isinstance(table, Mapping) or not table:
        file.findings.append(Finding(path.name, f"has no rows under `{key}:`", RESTORE))
        return file
    for other in document:
        if other != key:
            what = "is not a key of this file"
            file.findings.append(Finding(f"{path.name}: {other}", what, f"rows stand under `{key}:`"))
    file.names = [str(name) for name in table]
    for name, row in table.items():
        try:
            file.rows[str(name)] = parse(model, row)
        except ValidationError as error:
            file.findings += _problems(f"{path.name}: {name}", model, error)
    file.dates = list(_dates(table))
    return file


def _whole(path: Path, model: type[BaseModel]) -> Checked:
    file = Checked(path.name)
    document = _document(path, file)
    if document is not None:
        try:
            parse(model, document)
        except ValidationError as error:
            file.findings += _problems(f"{path.name}:", model, error)
        file.dates = list(_dates(document))
    return file


def _document(path: Path, file: Checked) -> Any:
    """What a file says; None if that cannot be told, with the reason among the findings."""
    try:
        text = path.read_text(encoding="utf-8")
        file.findings += _duplicates(yaml.compose(text, Loader=LOADER), path.name, ())
        document = yaml.load(text, Loader=LOADER)  # noqa: S506 - a safe loader
    except OSError as error:
        file.findings.append(Finding(path.name, f"cannot be read: {error.strerror}", RESTORE))
    except (yaml.YAMLError, ValueError) as error:
        line = f" in line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        problem = getattr(error, "problem", None) or error
        file.findings.append(Finding(path.name, f"is not YAML{line}: {problem}", "look there, or restore it"))
    else:
        if document is None:
            file.findings.append(Finding(path.name, "is empty", RESTORE))
        return document
    return None


def _duplicates(node: Node | None, name: str, path: tuple[str, ...]) -> Iterator[Finding]:
    """Keys that are there twice: YAML's readers take the last of them."""
    if isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            at, line = (*path, str(key.value)), key.start_mark.line + 1
            if key.value in lines:
                what = f"is there twice, in lines {lines[key.value]} and {line}"
                yield Finding(f"{name}: {'.'.join(at[1:] or at)}", what, "keep one of them")
            lines[key.value] = line
            yield from _duplicates(value, name, at)
    elif isinstance(node, SequenceNode):
        for value in node.value:
            yield from _duplicates(value, name, path)


def _dates(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "date":
                yield str(inner)
            else:
                yield from _dates(inner)


def _problems(where: str, model: type[BaseModel], error: ValidationError) -> Iterator[Finding]:
    for problem in error.errors():
        location = [str(part) for part in problem["loc"] if part != "[key]"]
        path = ".".join([where, *location]).replace(":.", ": ").removesuffix(":")
        yield Finding(path, *_words(model, location[-1] if location else "", problem))


def _words(model: type[BaseModel], key: str, problem: Any) -> tuple[str, str]:
    """Problem and fix of one of pydantic's errors."""
    value, context = problem["input"], problem.get("ctx", {})
    fix = FIXES.get(key, "see the other rows")
    match problem["type"]:
        case "extra_forbidden":
            what, fix = "is not a key of the catalog", did_you_mean(key, _keys(model))
        case "missing":
            what = "is missing"
        case "string_pattern_mismatch":
            what = f"{show(value)} is no month" if key == "date" else f"{show(value)} is not written as it has to be"
        case "string_too_short" | "too_short":
            what = "is empty"
        case "literal_error":
            allowed = re.findall(r"'([^']+)'", context["expected"])
            what, fix = f"{show(value)} is not known", did_you_mean(str(value), allowed)
        case "greater_than":
            what = f"{show(value)} is not above {context['gt']:g}"
        case "greater_than_equal":
            what = f"{show(value)} is below {context['ge']:g}"
        case type_ if noun := NOUNS.get(type_.removesuffix("_type")):
            what = f"is {kind(value)}, not {noun}"
        case _:
            what = f"{show(value)}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
    return what, fix


def _keys(model: type[BaseModel]) -> list[str]:
    """Of a model and of those that it is made of."""
    names = list(model.model_fields)
    for info in model.model_fields.values():
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                names += _keys(part)
    return names
