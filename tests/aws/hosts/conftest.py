"""Outside: images, which are made beside all else. Inside a world: one fleet for all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from infra.catalog import bakes

if TYPE_CHECKING:
    from hosts.host import Host

    from tests.aws.hosts.world import Fleet


@pytest.fixture(scope="session")
def baked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[str]]]:
    """What was said while the image of each role that is asked for was made: one after the other, beside the rest."""
    from tests.aws.hosts import baking  # noqa: PLC0415 - not inside a world

    asked = [it.name for it in request.session.items if it.path.stem == "test_images_on_host"]
    roles = [role for role in sorted(bakes.images()) if any(f"[{role}]" in name for name in asked)]
    with ThreadPoolExecutor(1) as beside:
        given = beside.submit(baking.given, tmp_path_factory.mktemp("given")) if roles else Future()
        yield {role: beside.submit(baking.bake, role, given) for role in roles}


@pytest.fixture(scope="session")
def boots() -> Iterator[Fleet]:
    """A stack whose machines boot while `pulumi up` still waits for the load balancer."""
    from tests.aws.hosts import world  # noqa: PLC0415 - only inside a world there is what it needs

    with world.fleet(json.loads(os.environ["FLEET_TEST_BINDS"])) as made:
        yield made


@pytest.fixture
def gateways(boots: Fleet) -> list[Host]:
    return boots.in_service(boots.gateways, 2)


@pytest.fixture
def nodes(boots: Fleet) -> list[Host]:
    """The nodes with the fake engines."""
    from tests.aws.hosts.world import until  # noqa: PLC0415

    found = boots.in_service(boots.engines, 2)
    until("both are registered", lambda: {f"{host.name}-chat-1" for host in found} <= boots.registered())
    return found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Inside a world what failed is said at once: what comes after may hang."""
    if report.failed and "FLEET_TEST_BINDS" in os.environ:
        print(report.longreprtext, flush=True)  # noqa: T201
