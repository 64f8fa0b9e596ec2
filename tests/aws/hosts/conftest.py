"""Inside a world: one fleet for the tests of a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.aws.hosts.world import Fleet


@pytest.fixture(scope="session")
def boots() -> Iterator[Fleet]:
    """A fleet with its account, weights and pointers; no machines yet."""
    from infra.render.node import gateway_bundle  # noqa: PLC0415
    from tests.aws.hosts import world  # noqa: PLC0415 - only inside a world there is what it needs

    with world.fleet(json.loads(os.environ["FLEET_TEST_BINDS"])) as made:
        made.fill()
        made.point("engine-small", made.store(made.engine_bundle()))
        made.point("gateway", made.store(gateway_bundle(made.plan)))
        yield made
