"""A node's processes and time: what stood still, what is frozen, what has no room."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from fleet_agent import serve, watch
from fleet_agent.engine import Engine, Sample
from fleet_agent.machine import Machine

WEDGED_S, START_S = 20.0, 100.0
Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - as shutil has it


def busy() -> Engine:
    """Ready, with a request that has just had a token."""
    one = Engine("chat-1", {"port": 9001, "model": "chat"}, "bundle", expected=True)
    one.sees((10, 1.0), 0.0, 0.0, 60.0)
    one.latched = True
    one.probed("ok", 1.0)
    one.sampled(Sample(running=1, progress=1), 1.0)
    return one


def test_what_nobody_looked_at_is_not_wedged() -> None:
    one = busy()
    one.probed("slow", 31.0)
    assert "no answer" in one.hopeless(31.0, WEDGED_S, START_S)
    one.stood(30.0)
    assert not one.hopeless(31.0, WEDGED_S, START_S)
    assert "no answer" in one.hopeless(52.0, WEDGED_S, START_S)


def test_what_nobody_looked_at_was_not_long_in_starting() -> None:
    one = busy()
    one.latched = False
    one.stood(200.0)
    assert not one.hopeless(210.0, WEDGED_S, START_S)


def test_an_agent_that_stood_still_kills_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"wedged_s": WEDGED_S, "start_s": START_S, "crash_loop_window_s": 60.0}
    agent = serve.Agent(Machine(tmp_path), settings, None)  # type: ignore[arg-type]
    one = busy()
    agent.engines = {"chat-1": one}
    ended: list[str] = []
    monkeypatch.setattr(agent, "_find_engines", lambda: None)
    monkeypatch.setattr(agent, "_identities", lambda: {"chat-1": one.identity})
    monkeypatch.setattr(agent, "_end", lambda _, reason: ended.append(reason))
    one.started = one.moved = one.probed_ok = agent.looked = serve.time.monotonic() - 30  # type: ignore[attr-defined]
    one.probe = "slow"
    asyncio.run(agent.look())
    assert ended == []
    one.started = one.probed_ok = one.probed_ok - 30  # it was looked at all the while
    asyncio.run(agent.look())
    assert ended == ["no answer for 20 s"]


def test_systemd_hears_that_the_watcher_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch.alive()  # elsewhere there is nobody to hear it
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        watch.alive()
        assert systemd.recv(100) == b"WATCHDOG=1"


def test_a_full_disk_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free: Any = [0, 0, 1 << 30, 1 << 30]
    monkeypatch.setattr(watch.shutil, "disk_usage", lambda _: Usage(1 << 30, 0, free.pop(0)))  # type: ignore[attr-defined]
    watcher = watch.Watch.__new__(watch.Watch)
    watcher.machine, watcher.full = Machine(tmp_path), False
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            watcher._room()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
