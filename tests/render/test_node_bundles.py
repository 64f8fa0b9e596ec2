"""What machines on AWS get: bundles, and the user data that leads to them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

from infra.paths import NODECONFIG
from infra.plan.model import FleetPlan, SchedulePlan
from infra.planning import plan_stack_file
from infra.render import node
from infra.render.bundle import Bundle
from infra.render.user_data import NodeSettings, user_data
from infra.weights.lock import WeightsLock, load
from tests.render.gateways import tool, until
from tests.render.plans import KEYS

GOLDEN = Path(__file__).parent / "golden"
ELSEWHERE = ("fleet_agent/", "node/units/", "programs/haproxy/", "programs/grafana/", "rules.yml", "manifest.json")
"""What is tested by itself or is a copy of a file in nodeconfig/."""
USER_DATA_LIMIT = 16_384


def boot_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("boot", NODECONFIG / "boot/boot.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lock() -> WeightsLock:
    return load()


@pytest.fixture(scope="module", params=["dev", "prod"])
def plan(request: pytest.FixtureRequest, lock: WeightsLock) -> FleetPlan:
    plan = plan_stack_file(request.param, lock)
    return plan.model_copy(update={"gateway": plan.gateway.model_copy(update={"keys": KEYS})})


def bundles(plan: FleetPlan, lock: WeightsLock) -> dict[str, Bundle]:
    engines = {f"engine-{pool.name}": node.engine_bundle(plan, pool, lock, node.CloudLayout()) for pool in plan.pools}
    return {**engines, "gateway": node.gateway_bundle(plan), "monitor": node.monitor_bundle(plan)}


def test_as_expected(plan: FleetPlan, lock: WeightsLock, golden: Callable[[Path, str], None]) -> None:
    text = "".join(
        f"=== {machine}/{path}\n{content}"
        for machine, bundle in bundles(plan, lock).items()
        for path, content in sorted(bundle.files.items())
        if not any(part in path for part in ELSEWHERE)
    )
    golden(GOLDEN / f"aws-{plan.stack}.txt", text)


def test_hashes_of_keys_are_apart(plan: FleetPlan, lock: WeightsLock) -> None:
    for machine, bundle in bundles(plan, lock).items():
        public, secret = node.split(bundle)
        assert {**public, **secret} == bundle.files
        assert bool(secret) == (machine == "gateway")
        for _, sha256 in KEYS:
            assert not [path for path, text in public.items() if sha256 in text]


def test_what_boots_a_machine_verifies_what_was_rendered(plan: FleetPlan, lock: WeightsLock, tmp_path: Path) -> None:
    boot = boot_program()
    for machine, bundle in bundles(plan, lock).items():
        assert boot.damage(bundle.files, bundle.digest) == []
        boot.write(tmp_path / machine, bundle.files)
        assert boot.read(tmp_path / machine) == bundle.files
        path = next(path for path in bundle.files if path.endswith("program.ini"))
        assert boot.damage({**bundle.files, path: "other"}, bundle.digest) == [f"{path} has another SHA-256"]
        without = {name: text for name, text in bundle.files.items() if name != path}
        assert boot.damage(without, bundle.digest) == [f"{path} is missing"]
        assert boot.damage(bundle.files, "0" * 64) == ["manifest.json has another SHA-256"]
        assert boot.damage({}, bundle.digest) == ["manifest.json has another SHA-256"]


def test_engines_of_a_node_are_apart_and_to_be_reached(plan: FleetPlan) -> None:
    for pool in plan.pools:
        engines = node.engines(plan, pool)
        assert len({engine.name for engine in engines}) == len({engine.port for engine in engines}) == len(pool.slots)
        gpus = [gpu for engine in engines for gpu in dict(engine.environment)["CUDA_VISIBLE_DEVICES"].split(",")]
        assert sorted(map(int, gpus)) == sorted({gpu for slot in pool.slots for gpu in slot.gpus})
        for engine in engines:
            assert engine.flags[:4] == ("--host", "0.0.0.0", "--port", str(engine.port))  # noqa: S104


def test_weights_are_named_for_the_program_that_fetches_them(plan: FleetPlan, lock: WeightsLock) -> None:
    for pool in plan.pools:
        files = node.engine_bundle(plan, pool, lock, node.CloudLayout()).files
        (entry,) = json.loads(files["node/weights.json"])["entries"]
        engine = json.loads(files[f"programs/{node.engines(plan, pool)[0].name}/engine.json"])
        assert entry["folder"] == engine["weights"]["folder"] == engine["command"][2]
        assert entry["prefix"] == f"weights/{entry['name']}/{lock.digest(entry['name'])}"
        assert (entry["files"] is None) == (engine["weights"]["record"] is not None)


def test_prometheus_takes_it(plan: FleetPlan, tmp_path: Path) -> None:
    program = next(it for it in node.monitor_bundle(plan).programs if it.name == "prometheus")
    for name, text in program.files.items():
        (tmp_path / name).write_text(text)
    command = [str(tool("promtool")), "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alertmanager_is_silent_about_a_pool_outside_of_its_hours(plan: FleetPlan, tmp_path: Path, ports: Any) -> None:
    hours = SchedulePlan(days=(0, 1, 2, 3, 4), start="07:00", end="20:00", time_zone="Europe/Berlin")
    pool = plan.pools[0].model_copy(update={"schedule": hours})
    scheduled = plan.model_copy(update={"pools": (pool, *plan.pools[1:])})
    program = next(it for it in node.monitor_bundle(scheduled).programs if it.name == "alertmanager")
    text = program.files["alertmanager.yml"]
    said = YAML(typ="safe").load(text)
    assert [route["matchers"][0] for route in said["route"]["routes"]] == ["alertname = NoReadyEngine"]
    (muted,) = said["time_intervals"]
    assert muted["time_intervals"][0] == {"weekdays": ["saturday", "sunday"], "location": "Europe/Berlin"}
    night, evening = muted["time_intervals"][1]["times"]
    assert night["end_time"] > "07:00"  # engines are loading then
    assert evening == {"start_time": "20:00", "end_time": "24:00"}
    (tmp_path / "it.yml").write_text(text)
    port = ports()
    ports.stack.close()  # Alertmanager does not share it
    command = [str(tool("alertmanager")), f"--config.file={tmp_path / 'it.yml'}", f"--storage.path={tmp_path}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            until("Alertmanager takes it", lambda: process.poll() is not None or _ready(port))
            assert process.poll() is None, (tmp_path / "log").read_text()
        finally:
            process.terminate()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as answer:
            return int(answer.status) == 200
    except OSError:
        return False


def test_every_engine_of_a_pool_is_scraped_by_its_own_name(plan: FleetPlan) -> None:
    program = next(it for it in node.monitor_bundle(plan).programs if it.name == "prometheus")
    jobs = {job["job_name"]: job for job in YAML(typ="safe").load(program.files["prometheus.yml"])["scrape_configs"]}
    wanted = {(pool.name, it.port, it.name) for pool in plan.pools for it in node.engines(plan, pool)}
    assert len(jobs["vllm"]["ec2_sd_configs"]) == len(wanted)
    labels = [row for row in jobs["vllm"]["relabel_configs"] if row["target_label"] == "engine" and "regex" in row]
    assert {(*row["regex"].split(";.*:"), row["replacement"]) for row in labels} == {
        (pool, str(port), name) for pool, port, name in wanted
    }


def settings(**more: Any) -> NodeSettings:
    told: dict[str, Any] = {
        "stack": "prod",
        "role": "engine",
        "machine": "engine-h100",
        "region": "us-east-1",
        "bucket": "fleet-prod-0123456789",
        "group": "fleet-prod-engine-h100-on-demand",
    }
    return NodeSettings(**{**told, **more})


def test_user_data_is_what_cloud_init_takes(golden: Callable[[Path, str], None]) -> None:
    text = user_data(settings())
    assert len(text.encode()) <= USER_DATA_LIMIT
    assert text.startswith("#cloud-config\n")
    files = {file["path"]: file["content"] for file in YAML(typ="safe").load(text)["write_files"]}
    assert files["/opt/fleet/bin/boot.py"] == (NODECONFIG / "boot/boot.py").read_text()
    golden(GOLDEN / "aws-node.json", files["/etc/fleet/node.json"])


def test_another_machine_is_other_user_data_and_the_same_one_is_not() -> None:
    assert user_data(settings()) == user_data(settings())
    assert user_data(settings(group="another")) != user_data(settings())


def test_a_machine_without_an_image_does_what_an_image_is_made_of(tmp_path: Path) -> None:
    files = node.runtime()
    assert {f"install-{role}.sh" for role in ("engine", "gateway", "monitor")} < files.keys()
    for name in [name for name in files if name.endswith(".sh")]:
        script = tmp_path / name
        script.write_text(files[name])
        subprocess.run(["bash", "-n", script], check=True)
        assert "{{" not in files[name], "a parameter that nobody gives"
        assert "/opt/fleet/venv" in files[name]
    assert "haproxy" in files["install-gateway.sh"]
    assert "node.txt" in files
