"""`fleet prices refresh`: the catalog's prices, anew from AWS."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from infra.catalog.instances import Instance
from infra.catalog.services import Service
from infra.catalog.strict import FOLDER, rows
from infra.findings import ConfigError, Finding, did_you_mean
from infra.weights.progress import Say, silent

FILES: dict[str, tuple[str, type[Instance | Service]]] = {
    "aws-instances.yaml": ("instances", Instance),
    "aws-services.yaml": ("services", Service),
}
"""Files with prices of AWS: the key that their rows are under, and what a row is."""
SOURCE = "AWS price list"
PRICING_REGION = "us-east-1"
"""Where the pricing API is; it knows the prices of every region."""
FILTERS = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "preInstalledSw": "NA",
    "capacitystatus": "Used",
    "marketoption": "OnDemand",
}
"""Without the last one, capacity blocks are among the answers, at no price by the hour."""
LINE_WIDTH = 4096
"""Longer than any line: none is broken when a file is written again."""
LOG_IN = "log in (`aws sso login`), or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@dataclass(frozen=True)
class Change:
    """One price that is another now."""

    name: str
    """Of the instance type."""
    region: str
    old: float | None
    """None: there was none."""
    new: float


@dataclass
class Refreshed:
    """What became of the prices."""

    changes: list[Change] = field(default_factory=list)
    confirmed: int = 0
    """Prices that are as they were."""
    kept: list[Finding] = field(default_factory=list)
    """Prices that AWS does not tell: they stay."""


def refresh(today: date, regions: Collection[str] = (), say: Say = silent, folder: Path = FOLDER) -> Refreshed:
    """Ask AWS for the on-demand price of every instance type, and write the ones that are new into the catalog.

    A row has one date for all its prices: it becomes this month if all of them were renewed. Files are replaced whole
    or not at all, and keep their comments.

    Args:
        today: The date that the prices get.
        regions: Only these; by default those where the catalog says that a type is offered.
        say: Told how far it is.
        folder: Where the catalog is.

    Raises:
        ConfigError: AWS does not answer, or the catalog has no such region; nothing is written.
    """
    yaml = YAML()
    yaml.width = LINE_WIDTH
    yaml.preserve_quotes = True
    documents = {name: _load(folder / name, yaml) for name in FILES}
    types = {name: row for file, (key, _) in FILES.items() for name, row in documents[file][key].items()}
    _check_regions(regions, {region for row in types.values() for region in _offered(row)})
    result = Refreshed()
    with closing(_client()) as client:
        for number, (name, row) in enumerate(types.items(), 1):
            wanted = [region for region in _offered(row) if not regions or region in regions]
            if wanted:
                say(f"asking for {name} ({number} of {len(types)})")
            found = {region: _price(client, name, region) for region in wanted}
            _take(name, row, found, f"{today:%Y-%m}", result)
    for file, document in documents.items():
        _replace(folder / file, document, yaml)
    return result


def _load(path: Path, yaml: YAML) -> Any:
    key, model = FILES[path.name]
    rows(model, path, key)
    try:
        return yaml.load(path)
    except YAMLError:
        raise ConfigError([Finding(path.name, "cannot be used", "`fleet catalog check` says what is wrong")]) from None


def _offered(row: Mapping[str, Any]) -> list[str]:
    """Regions in which a type has, or should have, an on-demand price."""
    if "on-demand" not in row.get("offers", ["on-demand"]):
        return []
    return list(dict.fromkeys([*row["usd_per_hour"], *row.get("zones", ())]))


def _check_regions(regions: Collection[str], known: Collection[str]) -> None:
    fix = "to add one, write its zones into aws-instances.yaml"
    if wrong := [region for region in regions if region not in known]:
        raise ConfigError(
            Finding(f"--region {region}", "is not in the catalog", f"{did_you_mean(region, sorted(known))}; {fix}")
            for region in wrong
        )


def _take(name: str, row: Any, found: Mapping[str, float | None], month: str, result: Refreshed) -> None:
    """Put the prices of one type into its row."""
    prices = row["usd_per_hour"]
    for region, new in found.items():
        old = prices.get(region)
        if new is None:
            what = "AWS has no on-demand price" + ("" if old is None else f", {old} stays")
            fix = "if the type is no longer offered there, take the region out of the row"
            result.kept.append(Finding(f"{name} in {region}", what, fix))
        elif new == old:
            result.confirmed += 1
        else:
            result.changes.append(Change(name, region, old, new))
            prices[region] = new
    if any(new is not None for new in found.values()) and all(found.get(region) is not None for region in prices):
        row["date"] = month
        specs, prefix, _ = row["source"].rpartition("prices: ")
        row["source"] = type(row["source"])(specs + prefix + SOURCE)


# AWS


def _client() -> Any:
    try:
        from boto3.session import Session  # noqa: PLC0415 - an extra, slow to import, and other commands do not need it
        from botocore.config import Config  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415
    except ImportError:
        fix = "`uv pip install --python .venv boto3`"
        raise ConfigError([Finding("prices", "asking AWS needs boto3, which is not installed", fix)]) from None
    config = Config(connect_timeout=10, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 4})
    try:
        return Session().client("pricing", region_name=PRICING_REGION, config=config)
    except BotoCoreError as error:
        raise _failed(error) from None


def _price(client: Any, name: str, region: str) -> float | None:
    """Dollars per hour; None if the price list has none, or several that differ."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - see _client

    wanted = {**FILTERS, "instanceType": name, "regionCode": region}
    filters = [{"Type": "TERM_MATCH", "Field": key, "Value": value} for key, value in wanted.items()]
    try:
        pages = client.get_paginator("get_products").paginate(ServiceCode="AmazonEC2", Filters=filters)
        prices = {price for page in pages for item in page["PriceList"] for price in _hourly(json.loads(item), wanted)}
    except (BotoCoreError, ClientError) as error:
        raise _failed(error) from None
    return float(prices.pop()) if len(prices) == 1 else None


def _hourly(item: Any, wanted: Mapping[str, str]) -> Iterator[Decimal]:
    """On-demand prices of one product of the price list, if it is the one that was asked for."""
    attributes = item.get("product", {}).get("attributes", {})
    if any(attributes.get(key, value) != value for key, value in wanted.items()):
        return
    for term in item.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            try:
                price = Decimal(dimension["pricePerUnit"]["USD"]).normalize()
            except (KeyError, InvalidOperation):
                continue
            if dimension["unit"] == "Hrs" and price > 0:
                yield price


def _failed(error: Exception) -> ConfigError:
    from botocore import exceptions  # noqa: PLC0415 - see _client

    code = error.response["Error"]["Code"] if isinstance(error, exceptions.ClientError) else ""
    unknown = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound)
    if isinstance(error, unknown):
        return ConfigError([Finding("AWS", f"has to know who asks: {error}", LOG_IN)])
    if "AccessDenied" in code or code == "UnauthorizedOperation":
        fix = "allow the action `pricing:GetProducts`, or use another profile (AWS_PROFILE)"
        return ConfigError([Finding("AWS", "does not let these credentials ask for prices", fix)])
    if re.search("Expired|InvalidClientTokenId|UnrecognizedClient|InvalidSignature", code):
        return ConfigError([Finding("AWS", f"does not take these credentials ({code})", LOG_IN)])
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        fix = "nothing was changed; is there a connection, or a proxy to set (HTTPS_PROXY)?"
        return ConfigError([Finding("AWS", f"cannot be reached: {error}", fix)])
    return ConfigError([Finding("AWS", f"did not answer: {error}", "nothing was changed; try again later")])


def _replace(path: Path, document: Any, yaml: YAML) -> None:
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            yaml.dump(document, stream)
        partial.replace(path)
    except OSError as error:
        raise ConfigError([Finding(path.name, f"cannot be written: {error.strerror}")]) from None
    finally:
        partial.unlink(missing_ok=True)
