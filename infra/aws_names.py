"""What things of a stack on AWS are called by those who make them and those who look for them."""

from __future__ import annotations

import re

PREFIX = "vllm-fleet"
"""Of tags, and of paths in IAM and SSM."""


def parameter(stack: str, machine: str) -> str:
    """Name of the SSM parameter that says what a kind of machine runs."""
    return f"/{PREFIX}/{stack}/{machine}"


def engine_machine(pool: str) -> str:
    """What that name calls an engine node of a pool."""
    return f"engine-{pool}"


def bucket_start(stack: str) -> str:
    """What the name of the cache's bucket begins with: small letters, digits and hyphens, 37 at most."""
    return f"fleet-{re.sub('[^a-z0-9-]+', '-', stack.lower())[:30].strip('-')}-"
