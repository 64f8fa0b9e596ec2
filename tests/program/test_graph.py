"""The whole Pulumi graph on mocks: which resources there are, and what waits for what."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path
from typing import Any

import pulumi
import pytest
from pulumi.runtime import mocks

from infra import program
from infra.findings import ConfigError
from infra.targets.local import host, tools

CONFIG = {
    "vllm-fleet:target": "local",
    "vllm-fleet:models": json.dumps({"chat": {"weights": "smollm2-135m-instruct"}}),
}


class Recorder(mocks.Mocks):
    """Takes note of every resource."""

    def __init__(self) -> None:
        self.resources: dict[str, mocks.MockResourceArgs] = {}

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, dict[Any, Any]]:
        self.resources[args.name] = args
        return args.name, dict(args.inputs)

    def call(self, args: mocks.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        raise AssertionError(f"nothing is looked up: {args.token}")


def close_event_loops() -> None:
    """The SDK leaves its own open; whichever test runs when they are collected would get the warning."""
    for one in gc.get_objects():
        if isinstance(one, asyncio.BaseEventLoop) and not one.is_closed() and not one.is_running():
            one.close()


def deploy(monkeypatch: pytest.MonkeyPatch, folder: Path, config: dict[str, str]) -> Recorder:
    """Run the program as Pulumi would, on a machine that has every tool."""
    found = tools.Tools(Path("/bin/haproxy"), Path("/bin/prometheus"), Path("/bin/alertmanager"), None)
    monkeypatch.setattr(tools, "find", lambda: found)
    monkeypatch.setattr(tools, "missing", lambda _plan: [])
    monkeypatch.setattr(host, "taken_ports", lambda _stack, _ports: [])
    monkeypatch.setenv("FLEET_DIR", str(folder))
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps(config))
    recorder = Recorder()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        pulumi.runtime.set_mocks(recorder, project="vllm-fleet", stack="local")
        until_settled: Any = pulumi.runtime.test
        until_settled(lambda: program.run("local"))()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        close_event_loops()
    return recorder


def test_one_resource_a_role_however_many_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = deploy(monkeypatch, tmp_path, CONFIG)
    models = {"chat": {"weights": "smollm2-135m-instruct", "engines": 1}}
    fewer = deploy(monkeypatch, tmp_path, {**CONFIG, "vllm-fleet:models": json.dumps(models)})

    expected = {"host", "weights-smollm2-135m-instruct", "gateway", "monitor", "engine"}
    assert expected <= few.resources.keys()
    assert few.resources.keys() == fewer.resources.keys()


def test_a_machine_carries_its_whole_bundle_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resources = deploy(monkeypatch, tmp_path, CONFIG).resources
    key = host.default_key_file("local").read_text().strip()

    for role in ("gateway", "monitor", "engine"):
        inputs = resources[role].inputs
        assert {"manifest.json"} < inputs["files"].keys()
        assert len(inputs["digest"]) == 64
        assert key not in json.dumps(inputs)


def test_a_target_to_come_is_planned_and_not_deployed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {
        "vllm-fleet:target": "kubernetes",
        "vllm-fleet:models": json.dumps({"chat": {"weights": "llama-3.1-8b-instruct"}}),
        "vllm-fleet:pools": json.dumps({"gpus": {"gpu": "h100-80gb"}}),
    }
    monkeypatch.setenv("FLEET_DIR", str(tmp_path))
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps(config))
    with pytest.raises(ConfigError, match=r"kubernetes.*not available yet"):
        program.run("local")


def test_the_plan_is_an_output_to_compare_the_next_one_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exported: dict[str, Any] = {}
    monkeypatch.setattr(pulumi, "export", exported.__setitem__)
    deploy(monkeypatch, tmp_path, CONFIG)
    assert exported["plan"]["models"][0]["name"] == "chat"
    assert "timings" not in exported["plan"]
