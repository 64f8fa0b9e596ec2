"""Dollars: how they are written, and how long a month is."""

from __future__ import annotations

import math

HOURS_PER_MONTH = 730
"""8,760 hours of a year by twelve, as cloud price lists have it."""
CENTS_UP_TO = 999.995
"""What is rounded to $1,000 is written without cents."""


def usd(amount: float) -> str:
    """Dollars for people: $8,972, $12.29, $0.042, -$3.10. Parts of a cent have two digits that count."""
    size = abs(amount)
    decimals = 2
    if size >= CENTS_UP_TO:
        decimals = 0
    elif 0 < size < 1:
        decimals = max(2, 1 - math.floor(math.log10(size)))
    text = f"{size:,.{decimals}f}"
    return f"-${text}" if amount < 0 and float(text.replace(",", "")) else f"${text}"


def per_month(usd_per_hour: float) -> float:
    """Dollars a month of what is paid by the hour."""
    return usd_per_hour * HOURS_PER_MONTH
