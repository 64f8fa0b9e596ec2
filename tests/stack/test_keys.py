"""API keys, from `fleet keys add` to the gateway: no restart, no request lost, no key on disk."""

from __future__ import annotations

import re
import threading

from tests.fleets import Fleet

ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


def test_keys_are_added_and_revoked_without_losing_a_request(fleet: Fleet) -> None:
    alice = fleet.fleet("keys", "add", "alice").splitlines()
    key = next(found[0] for line in alice if (found := re.search(r"sk-fleet-[\w-]{43}", line)))
    fleet.up()
    pid = fleet.pid("gateway", "haproxy")
    statuses: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            statuses.append(fleet.post("/v1/chat/completions", ASK, key)[0])

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    bob = re.search(r"sk-fleet-[\w-]{43}", fleet.fleet("keys", "add", "bob"))
    assert bob
    assert fleet.post("/v1/chat/completions", ASK, bob[0])[0] == 401
    fleet.up()
    fleet.until("the new key works", lambda: fleet.post("/v1/chat/completions", ASK, bob[0])[0] == 200)
    fleet.fleet("keys", "revoke", "bob")
    fleet.up()
    fleet.until("the revoked one does not", lambda: fleet.post("/v1/chat/completions", ASK, bob[0])[0] == 401)
    ended.set()
    for client in clients:
        client.join()

    assert len(statuses) > 100
    assert set(statuses) == {200}
    assert fleet.pid("gateway", "haproxy") == pid, "reloaded, not restarted"
    held = [
        file
        for file in fleet.folder.rglob("*")
        if file.is_file()
        and not file.is_symlink()
        and (key.encode() in (data := file.read_bytes()) or bob[0].encode() in data)
    ]
    assert held == []
