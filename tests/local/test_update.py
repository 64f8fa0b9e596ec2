"""The runbook for changing a model, carried out by its own commands on the real fleet under load."""

from __future__ import annotations

import re
import threading

from infra.paths import ROOT
from tests.fleets import Fleet
from tests.local.load import load

RUNBOOK = ROOT / "runbooks" / "update-model.md"


def commands() -> list[str]:
    """Every command of the runbook's sh blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", RUNBOOK.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_the_runbook_changes_the_model_without_dropping_a_request(fleet: Fleet) -> None:
    fewest: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            if rows := fleet.engines():
                fewest.append(sum(row["state"] == "ready" for row in rows.values()))

    watcher = threading.Thread(target=watch)
    with load(fleet, clients=4, at_least=300) as result:
        watcher.start()
        for command in commands():
            fleet.run("sh", "-c", command)
        ended.set()
        watcher.join()

    assert result.failures == []
    assert result.asked >= 300
    assert result.streamed >= 50
    assert min(fewest) >= 1, "an engine was ready at every moment"
    assert {row["format"] for row in fleet.engines().values()} == {"w8a8-int8"}
    status, answer = fleet.post(
        "/v1/chat/completions",
        {
            "model": "chat",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
        },
    )
    assert status == 200
    assert answer["choices"][0]["message"]["content"]
