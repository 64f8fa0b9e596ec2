"""`fleet status`, `logs` and `drain` on a stack whose servers answer as they are told."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from infra import cli, drain, status
from infra.deployed import Deployed
from tests.unit.deployments import Deployment, deployment

ALL = ("agent", "gateway", "prometheus", "alertmanager")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A clock that moves only when someone sleeps: rates come out exact, and nothing waits."""
    clock = SimpleNamespace(now=100.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    clock.sleep, clock.monotonic = sleep, lambda: clock.now
    monkeypatch.setattr(status, "time", clock)
    monkeypatch.setattr(drain, "time", clock)
    monkeypatch.delenv("PULUMI_STACK", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    # Not pytest's own folder: its path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        monkeypatch.setenv("FLEET_DIR", folder)
        yield clock


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Deployment]:
    with deployment(tmp_path, *ALL) as deployed:
        yield deployed


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def as_json() -> tuple[int, dict[str, object]]:
    code, output, _ = run("status", "--json")
    return code, json.loads(output)


def test_all_is_well(fleet: Deployment) -> None:
    code, output, _ = run("status")
    assert code == 0
    row = next(line for line in output.splitlines() if line.startswith("chat-1")).split()
    assert row == ["chat-1", "chat", "ready", "62", "s", "in", "rotation", "0", "0.0", "small", "bf16", "b" * 12, "1"]
    assert "2 of 2 engines in rotation" in output
    assert f"{fleet.plan.gateway.port}  2 of 2" in output, "the port that is shown is the clients'"


def test_ports_are_read_from_what_is_deployed(fleet: Deployment) -> None:
    deployed, plan = Deployed("local"), fleet.plan
    assert deployed.port("gateway") == plan.gateway.port
    assert deployed.port("gateway statistics") == plan.gateway.stats_port
    assert deployed.port("agent") == plan.agent.port
    assert deployed.port("prometheus") == plan.monitor.prometheus_port
    assert deployed.port("alertmanager") == plan.monitor.alertmanager_port
    assert deployed.port("grafana") is None


def test_tokens_per_second(fleet: Deployment) -> None:
    fleet.rows["chat-2"]["in_flight"] = 3
    fleet.tokens = 50
    code, found = as_json()
    assert code == 0
    rates = {row["engine"]: (row["in_flight"], row["tokens_per_s"]) for row in found["engines"]}  # type: ignore[attr-defined]
    assert rates == {"chat-1": (0, 0.0), "chat-2": (3, 50 / status.INTERVAL_S)}


@pytest.mark.parametrize("state", ["loading", "warming", "draining", "silent", "stopped"])
def test_an_engine_that_is_not_ready_is_a_problem(fleet: Deployment, state: str) -> None:
    fleet.rows["chat-2"] |= {"state": state, "last_error": "warm-up: no answer"}
    code, output, _ = run("status")
    assert code == 1
    assert f"chat-2 is {state}" in output
    assert "warm-up: no answer" in output


def test_a_crash_loop_is_told_even_while_the_engine_is_ready(fleet: Deployment) -> None:
    fleet.rows["chat-1"]["crash_loop"] = True
    code, output, _ = run("status")
    assert code == 0
    assert "chat-1 crashes again and again" in output


@pytest.mark.parametrize("word", ["DOWN", "NOLB", "MAINT"])
def test_a_ready_engine_that_the_gateway_leaves_out_is_a_problem(fleet: Deployment, word: str) -> None:
    fleet.servers["chat-2"] = word
    code, found = as_json()
    assert code == 1
    assert found["problems"] == ["chat-2 is ready, and the gateway sends it nothing"]


def test_a_gateway_that_lags_behind_is_asked_again(fleet: Deployment, clock: SimpleNamespace) -> None:
    def sleep(seconds: float) -> None:
        clock.now += seconds
        fleet.servers["chat-2"] = "UP"

    clock.sleep = sleep
    fleet.servers["chat-2"] = "DOWN"
    assert as_json()[0] == 0


@pytest.mark.parametrize("missing", ALL)
def test_a_server_that_is_down_is_a_problem(tmp_path: Path, missing: str) -> None:
    with deployment(tmp_path, *(name for name in ALL if name != missing)):
        code, output, _ = run("status")
    assert code == 1
    assert f"{missing} is down: " in output
    assert "Nothing of it runs" not in output
    engines = [line for line in output.splitlines() if line.startswith("chat-") and "small" in line]
    assert len(engines) == 2, "engines are listed even if the agent says nothing of them"
    assert ("unknown" in engines[0]) == (missing == "agent")


def test_monitoring_that_is_not_ready_is_down(fleet: Deployment) -> None:
    fleet.monitoring = 503
    code, output, _ = run("status")
    assert code == 1
    assert "prometheus is down: answers 503 to /-/ready" in output


def test_nothing_runs(tmp_path: Path) -> None:
    with deployment(tmp_path):
        code, output, _ = run("status")
    assert code == 1
    assert "Nothing of it runs, as after a reboot: `make up` starts it." in output


def test_files_edited_by_hand_do_not_hide_the_rest(fleet: Deployment) -> None:
    file = fleet.machine("engine").slots / "chat-1" / "engine.json"
    file.write_text("{")
    assert as_json()[0] == 0, "the agent knows what runs"
    (fleet.machine("engine").slots / "agent" / "agent.json").write_text("{}")
    code, output, _ = run("status")
    assert code == 1
    assert "agent is down: has no settings" in output
    assert "chat-1 is unknown" in output
    assert "engine.json cannot be read" in output


@pytest.mark.parametrize("command", [["status"], ["status", "--watch"], ["logs", "agent"], ["drain", "chat-1"]])
def test_a_stack_that_is_not_deployed(command: list[str]) -> None:
    code, output, error = run(*command, "-s", "other")
    assert code == 2
    assert output.strip() == ""
    assert error.startswith("stack other: is not deployed on this machine\n    `make up STACK=other` deploys it")


def test_the_stack_is_named_by_option_or_environment(fleet: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fleet.plan.stack == "local"
    monkeypatch.setenv("PULUMI_STACK", "organization/vllm-fleet/other")
    code, _, error = run("status")
    assert (code, error.split(":")[0]) == (2, "stack other")
    assert run("status", "-s", "local")[0] == 0
    code, _, error = run("status", "-s", "..")
    assert code == 2
    assert "letters, digits" in error


def test_watch_goes_on_until_it_is_interrupted(fleet: Deployment, clock: SimpleNamespace) -> None:
    fleet.rows["chat-1"]["in_flight"] = 1
    fleet.tokens = 10
    sleeps = iter((1, 2, 3))

    def sleep(seconds: float) -> None:
        clock.now += seconds
        count = next(sleeps)
        if count == 2:
            fleet.rows["chat-2"]["state"] = "silent"
        if count == 3:
            raise KeyboardInterrupt

    clock.sleep = sleep
    code, output, _ = run("status", "--watch", "--json")
    looks = [json.loads(line) for line in output.splitlines() if line]
    assert [look["ok"] for look in looks] == [True, True, False]
    assert [look["engines"][0]["tokens_per_s"] for look in looks] == [None, 5.0, 5.0]
    assert code == 1, "as the last look"


def test_watch_ends_when_the_stack_is_destroyed(fleet: Deployment, clock: SimpleNamespace) -> None:
    root = fleet.machine("engine").root.parent
    clock.sleep = lambda _: shutil.rmtree(root)
    code, output, error = run("status", "--watch")
    assert code == 2
    assert "chat-1" in output
    assert "is not deployed" in error


# Logs.


def test_logs_of_every_machine(fleet: Deployment, capfd: pytest.CaptureFixture[str]) -> None:
    assert fleet.machine("gateway").log.is_dir()
    for program in ("chat-2", "agent", "haproxy", "prometheus"):
        assert run("logs", program, "-n", "2")[0] == 0
        assert capfd.readouterr().out == f"{program} line 99\n{program} line 100\n"


def test_logs_of_an_unknown_program(fleet: Deployment) -> None:
    (fleet.machine("engine").log / "chat-1.log").unlink()
    code, _, error = run("logs", "proxyha")
    assert code == 1
    assert "There are: agent, alertmanager, chat-1, chat-2, haproxy, prometheus" in error
    assert "did you mean `chat-2`?" in run("logs", "chat2")[2]
    code, _, error = run("logs", "chat-1")
    assert code == 1
    assert "has no log yet" in error


# Drain.


def test_drain_waits_until_nothing_is_in_flight(fleet: Deployment) -> None:
    fleet.rows["chat-1"]["in_flight"] = 12
    fleet.finishing = 1
    code, _, error = run("drain", "chat-1")
    assert code == 0
    assert fleet.rows["chat-1"]["in_flight"] == 0
    assert fleet.orders == ["/drain?engine=chat-1"]
    lines = error.splitlines()
    assert lines[0] == "chat-1: draining"
    assert "in flight, 2 of" in lines[1]
    assert "drained in 3 s; `fleet drain chat-1 --undo` puts it back" in lines[-1]


def test_drain_without_waiting_and_back(fleet: Deployment) -> None:
    fleet.rows["chat-1"]["in_flight"] = 5
    assert run("drain", "chat-1", "--no-wait")[0] == 0
    assert fleet.rows["chat-1"]["state"] == "draining"
    assert run("drain", "chat-1", "--undo") == (0, "", "chat-1: ready\n")
    assert fleet.rows["chat-1"]["state"] == "ready"


def test_the_last_ready_engine_is_not_drained_unless_forced(fleet: Deployment) -> None:
    fleet.rows["chat-2"]["state"] = "warming"
    code, _, error = run("drain", "chat-1", "--no-wait")
    assert code == 1
    assert "no other engine of the model `chat` is ready" in error
    assert fleet.orders == []
    assert run("drain", "chat-1", "--no-wait", "--force")[0] == 0
    assert fleet.orders == ["/drain?engine=chat-1"]


def test_another_models_engine_does_not_stand_in(fleet: Deployment) -> None:
    fleet.rows["chat-2"]["model"] = "other"
    assert run("drain", "chat-1")[0] == 1
    assert fleet.orders == []


def test_drains_that_cannot_be(fleet: Deployment) -> None:
    code, _, error = run("drain", "chat1")
    assert (code, error) == (1, "chat1: there is no such engine\n    did you mean `chat-1`?\n")
    fleet.rows["chat-1"]["state"] = "loading"
    code, _, error = run("drain", "chat-1")
    assert code == 1
    assert "is loading" in error
    assert fleet.orders == []


@pytest.mark.parametrize(("state", "words"), [("loading", "it was restarted"), ("ready", "someone else ended")])
def test_a_drain_that_ends_otherwise(fleet: Deployment, clock: SimpleNamespace, state: str, words: str) -> None:
    fleet.rows["chat-1"]["in_flight"] = 5
    clock.sleep = lambda _: fleet.rows["chat-1"].update(state=state)
    code, _, error = run("drain", "chat-1")
    assert code == 1
    assert words in error


def test_a_drain_that_takes_too_long(fleet: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "POLL_S", 60.0)
    fleet.rows["chat-1"]["in_flight"] = 5
    code, _, error = run("drain", "chat-1")
    assert code == 1
    limit = fleet.plan.timings.drain_s + drain.MARGIN_S
    assert f"still has 5 requests after {limit:.0f} s" in error


def test_an_agent_that_does_not_answer(tmp_path: Path) -> None:
    with deployment(tmp_path, "gateway"):
        code, _, error = run("drain", "chat-1")
    assert code == 1
    assert "does not answer on port" in error
    assert "fleet logs agent" in error
