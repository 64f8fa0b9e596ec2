"""The stand-in for AWS: one for the whole tier, or one of its own for a test that breaks it.

Machines boot beside all else of this tier, for minutes in which they mostly wait: their tests begin first and are asked
last.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.aws.hosts import outside
from tests.aws.hosts.outside import Ran
from tests.aws.standin import StandIn, stand_in


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda it: (outside.HERE in it.path.parents, it.path.stem == "test_hosts"))


@pytest.fixture(scope="session", autouse=True)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Ran]]:
    """A world in which those tests run that this session asks for."""
    asked = outside.asked(request.session.items)
    with ThreadPoolExecutor(1) as beside:
        yield beside.submit(outside.run, asked, tmp_path_factory.mktemp("world")) if asked else Future()


@pytest.fixture(scope="module")
def aws() -> Iterator[StandIn]:
    """An empty AWS for the tests of one file."""
    with stand_in() as running:
        yield running
