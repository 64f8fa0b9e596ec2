"""What models cost that others host."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal

from pydantic import Field

from infra.catalog.strict import FOLDER, Month, Source, Strict, rows

HOSTED = FOLDER / "hosted-prices.yaml"
Price = Annotated[float, Field(gt=0)]


class HostedPrice(Strict):
    """One model of one provider; prices without batch, cache or volume discounts."""

    provider: str
    model: str
    size: Literal["small", "large"]
    """What it stands in for: a small model (an 8B) or a large one (a 70B)."""
    input_usd_per_mtok: Price
    output_usd_per_mtok: Price
    source: Source
    date: Month


@cache
def hosted_prices() -> dict[str, HostedPrice]:
    """Every price by `provider/model`."""
    return rows(HostedPrice, HOSTED, "hosted")
