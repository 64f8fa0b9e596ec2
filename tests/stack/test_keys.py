"""API keys, from `fleet keys` to the gateway: no restart, no request lost, no stream cut, no key on disk."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from infra.paths import ROOT
from tests.fleets import Fleet

ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
KEY = re.compile(r"sk-fleet-[\w-]{43}")
RUNBOOK = ROOT / "runbooks" / "rotate-keys.md"
IN_FORCE_S = 5
"""From when `pulumi up` reaches the gateway."""


def add(fleet: Fleet, name: str, *limits: str) -> str:
    found = KEY.search(fleet.fleet("keys", "add", name, *limits))
    assert found
    return found[0]


def status(fleet: Fleet, key: str) -> int:
    return fleet.post("/v1/chat/completions", ASK, key)[0]


@contextmanager
def load(fleet: Fleet, key: str) -> Iterator[list[int]]:
    """Four clients that ask without pause; the statuses that they got."""
    statuses: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            statuses.append(status(fleet, key))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        yield statuses
    finally:
        ended.set()
        for client in clients:
            client.join()


def holding(fleet: Fleet, *keys: str) -> list[str]:
    """Files under the stack's folder that have a key in them."""
    return [
        str(file)
        for file in fleet.folder.rglob("*")
        if file.is_file() and not file.is_symlink() and any(key.encode() in file.read_bytes() for key in keys)
    ]


def commands() -> list[str]:
    """Every command of the runbook's sh blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", RUNBOOK.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_keys_are_added_and_revoked_without_losing_a_request(fleet: Fleet) -> None:
    alice = add(fleet, "alice")
    fleet.up()
    pid = fleet.pid("gateway", "haproxy")
    with load(fleet, alice) as statuses:
        bob = add(fleet, "bob")
        assert status(fleet, bob) == 401
        fleet.up()
        fleet.until("the new key works", lambda: status(fleet, bob) == 200)
        fleet.fleet("keys", "revoke", "bob")
        fleet.up()
        fleet.until("the revoked one does not", lambda: status(fleet, bob) == 401)

    assert len(statuses) > 100
    assert set(statuses) == {200}
    assert fleet.pid("gateway", "haproxy") == pid, "reloaded, not restarted"
    assert holding(fleet, alice, bob) == []


def release(fleet: Fleet) -> None:
    """Let the engines answer what they hold."""
    for row in fleet.engines().values():
        urllib.request.urlopen(f"http://127.0.0.1:{row['port']}/release", data=b"", timeout=5).close()


def test_a_revoked_key_is_refused_within_seconds_on_every_connection_and_what_runs_goes_on(fleet: Fleet) -> None:
    add(fleet, "alice")
    bob = add(fleet, "bob", "--rpm", "100000")
    fleet.up()
    address = fleet.gateway.removeprefix("http://")
    kept, busy = (http.client.HTTPConnection(address, timeout=60) for _ in range(2))
    headers = {"Authorization": f"Bearer {bob}", "Content-Type": "application/json"}

    def ask(connection: http.client.HTTPConnection, **more: object) -> int:
        connection.request("POST", "/v1/chat/completions", json.dumps({**ASK, **more}), headers)
        with connection.getresponse() as answer:
            answer.read()
            return answer.status

    assert ask(kept) == 200
    fleet.fleet("keys", "revoke", "bob")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, busy, hold=True)
        fleet.until("an engine has it", lambda: any(row["in_flight"] for row in fleet.engines().values()))
        reached = refused = 0.0
        with fleet.start(*fleet.pulumi("up", "--yes", "--skip-preview")) as up:
            assert up.stdout
            for line in up.stdout:
                if not reached and "haproxy: reloading" in line:
                    reached = time.monotonic()
                    fleet.until("it is refused", lambda: status(fleet, bob) == 401)
                    refused = time.monotonic()
        assert up.returncode == 0
        assert 0 < refused - reached < IN_FORCE_S
        assert ask(kept) == 401, "a connection that the old worker has kept is no way round it"
        assert not running.done()
        release(fleet)
        assert running.result(60) == 200
    for connection in (kept, busy):
        connection.close()


def test_the_runbook_moves_a_client_to_a_new_key(fleet: Fleet) -> None:
    old = add(fleet, "alice")
    other = add(fleet, "other")
    fleet.up()
    shown: list[str] = []
    new = ""
    with load(fleet, other) as statuses:
        for command in commands():
            shown.append(fleet.run("sh", "-c", command))
            if found := KEY.search(shown[-1]):
                new = found[0]
            elif new and command.startswith("pulumi up") and status(fleet, old) == 200:
                assert status(fleet, new) == 200, "both work until the old one is revoked"
    assert (status(fleet, old), status(fleet, new)) == (401, 200)
    assert set(statuses) == {200}
    assert "alice-2  " in shown[-1]
    assert "6000 requests a minute; 64 at once; until 2099-12-31" in shown[-1]
    assert holding(fleet, old, new) == []
