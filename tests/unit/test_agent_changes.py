"""Who may change something through a node's agent, which on AWS answers the whole network."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from fleet_agent.serve import loopback_changes


@pytest.mark.parametrize(
    ("method", "remote", "status"),
    [
        ("GET", "10.64.1.2", 200),
        ("HEAD", "10.64.1.2", 200),
        ("POST", "10.64.1.2", 403),
        ("PUT", "10.64.1.2", 403),
        ("POST", "127.0.0.1", 200),
        ("POST", "::1", 200),
    ],
)
def test_only_the_machine_itself_changes_anything(method: str, remote: str, status: int) -> None:
    async def done(_: web.Request) -> web.Response:
        return web.Response()

    async def ask() -> int:
        try:
            return (await loopback_changes(make_mocked_request(method, "/drain").clone(remote=remote), done)).status
        except web.HTTPForbidden as refused:
            return refused.status

    assert asyncio.run(ask()) == status
