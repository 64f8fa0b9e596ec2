"""The stand-in for AWS: one for the whole tier, or one of its own for a test that breaks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.aws.standin import StandIn, stand_in


@pytest.fixture(scope="module")
def aws() -> Iterator[StandIn]:
    """An empty AWS for the tests of one file."""
    with stand_in() as running:
        yield running
