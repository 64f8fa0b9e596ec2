"""Two gateways of one fleet: what a key may do, it may do at both together."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet_agent.peers import opened, publish, render

from infra.render.gateway import gateway
from tests.render.gateways import IN_TIME_S, Fleet, Gateway, Ports, StartFleet, tool, until
from tests.render.plans import a_layout, a_plan, counter
from tests.render.test_gateway_keys import auth, keys, release, running

ROOM = 3
"""Gateways that there is room for: two, and one more while one is replaced."""
CLIENTS = 4
"""At each gateway."""


@dataclass
class Pair:
    """Two gateways before the same engines."""

    fleet: Fleet
    gateways: tuple[Gateway, Gateway]

    def each(self, work: Callable[[httpx.Client], Counter[int]], clients: int = CLIENTS) -> Counter[int]:
        """The statuses that clients get which do this at both at the same time."""

        def one(number: int) -> Counter[int]:
            with httpx.Client(base_url=self.gateways[number % 2].url, timeout=IN_TIME_S) as client:
                return work(client)

        with ThreadPoolExecutor(2 * clients) as pool:
            return sum(pool.map(one, range(2 * clients)), Counter())


@contextmanager
def telling(pair: Pair) -> Iterator[None]:
    """Both gateways' machines say what is open, as their node agents do."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(0.05):
            for it in pair.gateways:
                publish(it.root / "run")

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


@pytest.fixture
def start_pair(start_fleet: StartFleet, ports: Ports) -> Iterator[Callable[..., Pair]]:
    ends: list[Callable[[], None]] = []

    def start(**limit: Any) -> Pair:
        peers = {number: f"127.0.0.1:{ports()}" for number in (1, 2)}
        fleet = start_fleet(
            gateway={**keys(a=limit), "gateways": ROOM, "peers_port": 1024}, run_peers=render(1, ROOM, peers)
        )
        first = fleet.gateway
        folder = tempfile.TemporaryDirectory(prefix="fleet-")
        ends.append(folder.cleanup)
        plan = first.plan.model_copy(
            update={"gateway": first.plan.gateway.model_copy(update={"port": ports(), "stats_port": ports()})}
        )
        second = Gateway(Path(folder.name), plan, first.binary, run_peers=render(2, ROOM, peers))
        ends.append(second.stop)
        second.start()
        second.await_states(**{name.replace("-", "_"): "UP" for name in fleet.engines})
        until(
            "they know each other",
            lambda: all(" last_status=ESTA" in it.command("show peers") for it in (first, second)),
        )
        return Pair(fleet, (first, second))

    yield start
    for end in reversed(ends):
        end()


def there_are(count: Callable[[], int], wanted: int) -> bool:
    return count() == wanted


class TestRendering:
    def test_one_alone_has_no_peers_file(self) -> None:
        one = gateway(a_plan(gateway={**keys(a={"rpm": 5})}), a_layout())
        unlimited = gateway(a_plan(gateway={**keys(a={}), "gateways": 3, "peers_port": 1024}), a_layout())
        for bundle in (one, unlimited):
            assert "programs/haproxy/peers.cfg" not in bundle.files
            assert "run/peers.cfg" not in bundle.programs[0].command

    @pytest.mark.parametrize("limit", [{"rpm": 5}, {"concurrency": 5}, {"rpm": 5, "concurrency": 5}])
    def test_haproxy_takes_it_without_a_warning(self, root: Path, limit: dict[str, Any]) -> None:
        wanted = {**keys(a=limit), "gateways": ROOM, "peers_port": 1024}
        result = Gateway(root, a_plan(port=counter(20000), gateway=wanted), tool("haproxy")).check()
        assert result.returncode == 0, result.stderr
        assert "WARNING" not in result.stderr
        assert "ALERT" not in result.stderr


class TestRequestsPerMinute:
    LIMIT = 60

    def test_hold_together_within_ten_per_cent(self, start_pair: Callable[..., Pair]) -> None:
        pair = start_pair(rpm=self.LIMIT)

        def work(client: httpx.Client) -> Counter[int]:
            return Counter(
                client.post("/v1/completions", headers=auth("a"), json={"model": "chat"}).status_code
                for _ in range(self.LIMIT)
            )

        begins = time.time()
        statuses = pair.each(work)
        minutes = 1 + int(time.time() // 60) - int(begins // 60)  # a minute may end meanwhile
        assert set(statuses) == {200, 429}
        assert statuses[200] >= 0.9 * self.LIMIT
        assert statuses[200] <= 1.1 * self.LIMIT * minutes

    def test_what_one_has_let_in_the_other_knows(self, start_pair: Callable[..., Pair]) -> None:
        pair = start_pair(rpm=5)
        first, second = (it.url for it in pair.gateways)
        let_in = [httpx.post(f"{first}/v1/completions", headers=auth("a"), json={}).status_code for _ in range(5)]
        assert let_in == [200] * 5

        def refused() -> bool:
            return httpx.post(f"{second}/v1/completions", headers=auth("a"), json={}).status_code == 429

        until("the other has heard of it", refused, 5)


class TestOpenRequests:
    LIMIT = 10

    def test_as_many_as_one_alone_would_let_in(self, start_pair: Callable[..., Pair], pool: ThreadPoolExecutor) -> None:
        pair = start_pair(concurrency=self.LIMIT)

        def ask(number: int) -> int:
            headers = {**auth("a"), "X-Fake": "hold"}
            url = f"{pair.gateways[number % 2].url}/v1/completions"
            return httpx.post(url, headers=headers, json={"model": "chat"}, timeout=IN_TIME_S).status_code

        def told() -> int:
            """What the gateways have heard of one another."""
            rows = [it.command(f"show table keys/open-{2 - n}") for n, it in enumerate(pair.gateways)]
            return sum(int(count) for row in rows for count in re.findall(r"gpt0=(\d+)", row))

        with telling(pair):
            for _ in range(3):
                asked = []
                for number in range(self.LIMIT):
                    asked.append(pool.submit(ask, number))
                    until("an engine has it", partial(there_are, lambda: running(pair.fleet), number + 1))
                    until("the other has heard of it", partial(there_are, told, number + 1))
                assert [ask(number) for number in range(4)] == [429] * 4
                release(pair.fleet)
                assert [future.result(IN_TIME_S) for future in asked] == [200] * self.LIMIT
                until("both have heard of the end", lambda: told() == 0)

    def test_what_has_ended_is_told(self, start_pair: Callable[..., Pair]) -> None:
        pair = start_pair(concurrency=1)
        first, second = pair.gateways

        def status(url: str) -> int:
            return httpx.post(f"{url}/v1/completions", headers=auth("a"), json={"model": "chat"}).status_code

        assert status(first.url) == 200
        until("the other has heard that it began", lambda: "gpt0=1" in second.command("show table keys/open-1"))
        assert status(second.url) == 429
        with telling(pair):
            until("the other has heard that it ended", lambda: status(second.url) == 200)


def test_what_is_open_is_read_from_the_table() -> None:
    table = """# table: keys/open-1, type: string, size:20, used:2
0x1: key=a use=0 exp=0 shard=0 gpt0=3 conn_cur=1
0x2: key=b use=1 exp=0 shard=0 gpt0=1 conn_cur=0
"""
    assert opened(table) == {"a": 1, "b": 0}
