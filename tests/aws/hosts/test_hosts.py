"""What became of each test that outside.py ran in a world."""

from __future__ import annotations

import sys
from concurrent.futures import Future

import pytest

from tests.aws.hosts.outside import CASES, LIMIT_S, SKIPPED, Ran


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(("file", "name"), CASES)
def test_on_booted_hosts(world: Future[Ran], file: str, name: str, request: pytest.FixtureRequest) -> None:
    ran = world.result()
    for figure, value in ran.figures.get(name, ()):
        request.node.user_properties.append((figure, value))
        sys.stdout.write(f"{name}: {figure}: {value}\n")
    assert name in ran.results, f"{file}.py: did not run:\n{ran.said}"
    if ran.results[name].startswith(SKIPPED):
        pytest.skip(ran.results[name].removeprefix(SKIPPED))
    assert not ran.results[name], f"{ran.results[name]}\n{ran.said[-4000:]}"
