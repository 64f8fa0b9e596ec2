"""What the monitor's bundle holds, and that the real programs take it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from infra.paths import ROOT
from infra.plan.model import FleetPlan
from infra.render import dashboard
from infra.render.bundle import Bundle
from infra.render.monitor import monitor
from tests.render.gateways import tool, until, write
from tests.render.plans import a_layout, a_plan

GRAFANA = Path("/opt/grafana/bin/grafana")


def files(bundle: Bundle, program: str) -> dict[str, str]:
    return next(dict(found.files) for found in bundle.programs if found.name == program)


def yaml(text: str) -> Any:
    return YAML(typ="safe").load(text)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("models", [("chat",), ("chat", "code.v2", "true")])
def test_promtool_takes_it(models: tuple[str, ...], tmp_path: Path) -> None:
    write(monitor(a_plan(models), a_layout(tmp_path)), tmp_path)
    promtool("check", "config", tmp_path / "slots/prometheus/prometheus.yml")
    promtool("check", "rules", tmp_path / "slots/prometheus/rules.yml")


def test_everything_is_scraped() -> None:
    plan = a_plan(("chat", "code"), 1)
    scraped = yaml(files(monitor(plan, a_layout()), "prometheus")["prometheus.yml"])["scrape_configs"]
    targets = {
        job["job_name"]: [(config["targets"], config.get("labels")) for config in job["static_configs"]]
        for job in scraped
    }
    assert targets == {
        "vllm": [([f"127.0.0.1:{e.port}"], {"engine": e.name, "model": e.model}) for e in plan.engines],
        "agent": [([f"127.0.0.1:{plan.agent.port}"], None)],
        "gateway": [([f"127.0.0.1:{plan.gateway.stats_port}"], None)],
        "prometheus": [([f"127.0.0.1:{plan.monitor.prometheus_port}"], None)],
        "alertmanager": [([f"127.0.0.1:{plan.monitor.alertmanager_port}"], None)],
    }


def test_numbers_come_from_the_plan() -> None:
    plan = a_plan(timings={"scrape_s": 7, "alert_window_s": 41, "retention": "3d"})
    bundle = monitor(plan, a_layout())
    assert yaml(files(bundle, "prometheus")["prometheus.yml"])["global"]["scrape_interval"] == "7s"
    assert "for: 41s" in files(bundle, "prometheus")["rules.yml"]
    assert "--storage.tsdb.retention.time=3d" in bundle.programs[0].command


def test_other_timings_need_no_restart() -> None:
    one, other = (monitor(a_plan(timings={"scrape_s": seconds}), a_layout()) for seconds in (5, 9))
    assert one.digest != other.digest
    assert [program.command for program in one.programs] == [program.command for program in other.programs]
    assert [program.reload for program in one.programs] == ["SIGHUP", "SIGHUP"]


@pytest.mark.parametrize("missing", ["prometheus", "alertmanager"])
def test_what_is_missing_is_named(missing: str) -> None:
    layout = a_layout(**{missing: None})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Prometheus and Alertmanager"):
        monitor(a_plan(), layout)


class Running:
    """Prometheus and Alertmanager on a machine of their own."""

    def __init__(self, plan: FleetPlan, root: Path) -> None:
        self.plan = plan
        self.root = root
        self.layout = a_layout(root, prometheus=tool("prometheus"), alertmanager=tool("alertmanager"))
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        bundle = monitor(self.plan, self.layout)
        write(bundle, self.root)
        for program in bundle.programs:
            with (self.root / f"log/{program.name}.log").open("wb") as log:
                process = subprocess.Popen(program.command, cwd=self.root, stdout=log, stderr=log)
            self.started.append(process)
        until("Prometheus is ready", lambda: self.answers(self.plan.monitor.prometheus_port))
        until("Alertmanager is ready", lambda: self.answers(self.plan.monitor.alertmanager_port))

    def answers(self, port: int) -> bool:
        for process in self.started:
            logs = [file.read_text() for file in (self.root / "log").iterdir()]
            assert process.poll() is None, logs
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as answer:
                return int(answer.status) == 200
        except OSError:
            return False

    def get(self, path: str) -> Any:
        url = f"http://127.0.0.1:{self.plan.monitor.prometheus_port}/api/v1/{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]

    def alerts(self) -> set[str]:
        url = f"http://127.0.0.1:{self.plan.monitor.alertmanager_port}/api/v2/alerts"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return {alert["labels"]["alertname"] for alert in json.load(answer)}

    def stop(self) -> None:
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.wait(30)


@pytest.fixture
def running(tmp_path: Path, free_ports: Iterator[int]) -> Iterator[Running]:
    # Nothing but these two runs: every other target is down, which is what the alerts are for.
    plan = a_plan(
        port=lambda: next(free_ports), timings={"scrape_s": 1, "alert_window_s": 1, "stop_s": 1, "start_s": 60}
    )
    machine = Running(plan, tmp_path)
    try:
        machine.start()
        yield machine
    finally:
        machine.stop()


@pytest.fixture
def free_ports(ports: Any) -> Iterator[int]:
    """Ports that others may listen on now: Prometheus does not share them with whoever holds them."""
    found = [ports() for _ in range(20)]
    ports.stack.close()
    return iter(found)


def test_it_runs_and_an_alert_arrives(running: Running) -> None:
    def up() -> dict[str, str]:
        return {target["labels"]["job"]: target["health"] for target in running.get("targets")["activeTargets"]}

    expected = {"vllm": "down", "agent": "down", "gateway": "down", "prometheus": "up", "alertmanager": "up"}
    until("every target was scraped", lambda: up() == expected)
    assert len(running.get("targets")["activeTargets"]) == 6
    until("alerts arrive", lambda: {"EngineDown", "GatewayDown", "AgentDown"} <= running.alerts())
    rules = [rule for group in running.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}


def test_a_changed_file_is_taken_up_without_a_restart(running: Running) -> None:
    timings = running.plan.timings.model_copy(update={"scrape_s": 3})
    write(monitor(running.plan.model_copy(update={"timings": timings}), running.layout), running.root)
    for process in running.started:
        process.send_signal(signal.SIGHUP)
    until("the new interval is in force", lambda: "scrape_interval: 3s" in running.get("status/config")["yaml"])
    assert all(process.poll() is None for process in running.started)


def test_grafana_is_left_out_where_there_is_none() -> None:
    assert [program.name for program in monitor(a_plan(), a_layout()).programs] == ["prometheus", "alertmanager"]


def test_grafana_has_its_files() -> None:
    plan = a_plan()
    found = files(monitor(plan, a_layout(grafana=GRAFANA)), "grafana")
    [source] = yaml(found["provisioning/datasources/prometheus.yml"])["datasources"]
    assert source["url"] == f"http://127.0.0.1:{plan.monitor.prometheus_port}"
    assert source["uid"] == dashboard.DATASOURCE
    [provider] = yaml(found["provisioning/dashboards/fleet.yml"])["providers"]
    assert provider["options"]["path"] == "$FLEET_DASHBOARDS"
    assert f"http_port = {plan.monitor.grafana_port}\n" in found["grafana.ini"]
    assert json.loads(found["dashboards/fleet.json"])["uid"] == "fleet"


@pytest.mark.parametrize(
    ("program", "home", "first"),
    [
        ("bin/grafana", ".", ["server"]),
        ("bin/grafana", "share/grafana", ["server"]),
        ("bin/grafana-server", ".", []),
    ],
)
def test_grafana_is_started_as_its_package_wants(program: str, home: str, first: list[str], tmp_path: Path) -> None:
    """With a stand-in that says how it was called: the real one is in no package registry."""
    package, machine = tmp_path / "package", tmp_path / "machine"
    stand_in = package / program
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$GF_PATHS_PROVISIONING" "$FLEET_DASHBOARDS"\n')
    stand_in.chmod(0o755)
    (package / home / "conf").mkdir(parents=True)
    (package / home / "conf/defaults.ini").touch()
    machine.mkdir()
    bundle = monitor(a_plan(), a_layout(machine, grafana=stand_in))
    write(bundle, machine)
    said = subprocess.run(bundle.programs[-1].command, cwd=machine, capture_output=True, text=True, check=True).stdout
    *arguments, provisioning, dashboards = said.splitlines()
    assert arguments[: len(first)] == first
    options = dict(zip(arguments[len(first) :: 2], arguments[len(first) + 1 :: 2], strict=True))
    assert Path(options["--homepath"]).samefile(package / home)
    assert Path(options["--config"]).is_file()
    assert (Path(provisioning) / "dashboards/fleet.yml").is_file()
    assert (Path(dashboards) / "fleet.json").is_file()


def test_grafana_without_its_files_says_so(tmp_path: Path) -> None:
    if Path("/usr/share/grafana/conf/defaults.ini").exists():
        pytest.skip("this machine has Grafana's files")
    bundle = monitor(a_plan(), a_layout(tmp_path, grafana=tmp_path / "bin/grafana"))
    write(bundle, tmp_path)
    done = subprocess.run(bundle.programs[-1].command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "reinstall Grafana" in done.stderr


def test_the_dashboard_is_current() -> None:
    assert dashboard.FILE.read_text() == dashboard.build(), "run `python -m infra.render.dashboard`"


def test_queries_are_found_in_rows_too() -> None:
    inner = {"title": "in", "targets": [{"expr": "up"}, {"expr": "down"}]}
    assert dashboard.queries({"panels": [{"title": "row", "panels": [inner]}, {"title": "text"}]}) == [
        ("in", "up"),
        ("in", "down"),
    ]
    assert len(dashboard.queries(json.loads(dashboard.FILE.read_text()))) == sum(
        len(panel.queries) for panel in dashboard.PANELS
    )


def test_promtool_takes_every_query(tmp_path: Path) -> None:
    asked = [text.replace("$__rate_interval", "1m") for _, text in dashboard.queries(json.loads(dashboard.build()))]
    rules = [{"record": f"query:{n}", "expr": text} for n, text in enumerate(asked)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", file)
    recorded = files(monitor(a_plan(), a_layout()), "prometheus")["rules.yml"]
    for name in re.findall(r"\bmodel:\w+:\w+", " ".join(asked)):
        assert f"record: {name}\n" in recorded


def test_rendering_imports_no_sdk() -> None:
    code = (
        "import sys, infra.render.monitor, infra.render.dashboard; assert 'grafana_foundation_sdk' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
