"""Every alert, with the real promtool: it fires when it should, and stays quiet when it should."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from infra import weights
from infra.paths import ROOT
from infra.plan.model import FleetPlan, Timings
from infra.planning import plan_stack_file
from infra.render.monitor import PERCENTILE_WINDOWS, machine_limits, monitor
from tests.render.gateways import tool
from tests.render.plans import a_layout, a_plan

PLAN = a_plan(("chat", "code"), timings={"stop_s": 45})
T: Timings = PLAN.timings
CLOUD: FleetPlan = plan_stack_file("prod", weights.load())
"""Has the machines' alerts beside all others."""
LIMITS = machine_limits(CLOUD)
PAGES = ROOT / "runbooks" / "alerts"

ENGINE = 'engine="chat-0",model="chat"'
UP = f'up{{job="vllm",instance="127.0.0.1:1",{ENGINE}}}'
ROTATION = 'haproxy_backend_active_servers{proxy="model-chat",model="chat"}'
OTHER = 'haproxy_backend_active_servers{proxy="model-code",model="code"}'
ENGINE_QUEUE = f"vllm:num_requests_waiting{{{ENGINE}}}"
GATEWAY_QUEUE = 'haproxy_backend_current_queue{proxy="model-chat",model="chat"}'
WEDGED = f"fleet_engine_wedged_total{{{ENGINE}}}"

Labels = Mapping[str, str]
CHAT_0 = {"engine": "chat-0", "model": "chat"}
CHAT = {"model": "chat"}
DOWN_S = max(T.alert_window_s, T.stop_s)


def state(name: str) -> str:
    return f'fleet_engine_state{{{ENGINE},state="{name}"}}'


def lasting(*parts: tuple[float, int], last: float | None = None) -> str:
    """A series: each value for so many seconds, then the last one for ever."""
    steps = [f"{value:g}x{max(seconds // T.scrape_s - 1, 0)}" for value, seconds in parts]
    return " ".join([*steps, f"{parts[-1][0] if last is None else last:g}x2000"])


def histogram(name: str, promised: float, seconds: float) -> dict[str, str]:
    """One of vLLM's of an engine that counts once a scrape, so many seconds each time."""
    return {
        f'{name}{{{ENGINE},le="{le:g}"}}': "0+1x2000" if seconds <= le else "0x2000" for le in (promised, 2 * promised)
    } | {f'{name}{{{ENGINE},le="+Inf"}}': "0+1x2000"}


def ttft(seconds: float) -> dict[str, str]:
    """Every request has this time to the first token."""
    return histogram("vllm:time_to_first_token_seconds_bucket", PLAN.monitor.thresholds.ttft_p95_s, seconds)


@dataclass(frozen=True)
class Case:
    """Series, and what of one alert fires at a time."""

    alert: str
    what: str
    series: Mapping[str, str]
    at_s: int
    fires: tuple[Labels, ...] = ()


MINUTE = 60
QUEUE = PLAN.monitor.thresholds.queue_waiting
CASES = [
    Case("EngineDown", "no metrics", {UP: lasting((1, 60), (0, 60))}, 60 + DOWN_S + 5, (CHAT_0,)),
    Case("EngineDown", "a process that is stopped", {UP: "0x2000", state("silent"): "1x2000"}, DOWN_S + 5, (CHAT_0,)),
    Case("EngineDown", "no word from its agent either", {UP: "0x2000", 'up{job="agent"}': "0x99"}, 300, (CHAT_0,)),
    Case("EngineDown", "a moment ago", {UP: lasting((1, 60), (0, 60))}, 60 + DOWN_S - 5),
    Case("EngineDown", "one lost scrape", {UP: lasting((1, 60), (0, 5), last=1)}, 300),
    Case("EngineDown", "it loads", {UP: "0x2000", state("loading"): "1x2000", state("stopped"): "0x2000"}, 300),
    Case("EngineDown", "it warms", {UP: "0x2000", state("warming"): "1x2000"}, 300),
    Case(
        "EngineDown",
        "an update stops it for as long as it may, then it loads",
        {
            UP: lasting((1, 60), (0, 60)),
            state("stopped"): lasting((0, 60), (1, T.stop_s), last=0),
            state("loading"): lasting((0, 60 + T.stop_s), (1, 5)),
        },
        60 + T.stop_s + 60,
    ),
    Case("EngineCrashLoop", "the agent says so", {f"fleet_engine_crash_loop{{{ENGINE}}}": "1x99"}, 5, (CHAT_0,)),
    Case("EngineCrashLoop", "the agent says no", {f"fleet_engine_crash_loop{{{ENGINE}}}": "0x99"}, 60),
    Case("EngineWedged", "restarted once", {WEDGED: lasting((0, 60), (1, 60))}, 90, (CHAT_0,)),
    Case("EngineWedged", "restarted long ago", {WEDGED: lasting((0, 60), (1, 60))}, 90 + T.crash_loop_window_s),
    Case("EngineWedged", "never", {WEDGED: "0x2000"}, 90),
    Case("EngineWedged", "before this agent and this Prometheus", {WEDGED: "3x2000"}, 90),
    Case(
        "NoReadyEngine",
        "all gone, another model is served",
        {ROTATION: lasting((2, 60), (0, 60)), OTHER: "2x2000"},
        60 + T.alert_window_s + 5,
        (CHAT,),
    ),
    Case("NoReadyEngine", "one is left", {ROTATION: lasting((2, 60), (1, 60))}, 300),
    Case("NoReadyEngine", "a moment ago", {ROTATION: lasting((2, 60), (0, 60))}, 60 + T.alert_window_s - 5),
    Case("NoReadyEngine", "a new fleet starts", {ROTATION: "0x2000"}, T.start_s - 10),
    Case("NoReadyEngine", "a new fleet never starts", {ROTATION: "0x2000"}, T.start_s + T.alert_window_s + 5, (CHAT,)),
    Case("NoReadyEngine", "gone for long", {ROTATION: lasting((2, 60), (0, 60))}, 3 * T.start_s, (CHAT,)),
    Case("QueueBuilding", "in an engine", {ENGINE_QUEUE: f"{QUEUE + 1}x99"}, T.alert_window_s + 5, (CHAT,)),
    Case("QueueBuilding", "in the gateway", {GATEWAY_QUEUE: f"{QUEUE + 1}x99"}, T.alert_window_s + 5, (CHAT,)),
    Case(
        "QueueBuilding",
        "in both together",
        {ENGINE_QUEUE: f"{QUEUE}x99", GATEWAY_QUEUE: "1x99"},
        T.alert_window_s + 5,
        (CHAT,),
    ),
    Case("QueueBuilding", "as many as may wait", {ENGINE_QUEUE: f"{QUEUE}x99"}, 120),
    Case("QueueBuilding", "a peak", {ENGINE_QUEUE: lasting((0, 60), (99, 20), last=0)}, 60 + T.alert_window_s + 5),
    Case("TtftP95High", "slow", ttft(1.5 * PLAN.monitor.thresholds.ttft_p95_s), 10 * MINUTE, (CHAT,)),
    Case("TtftP95High", "fast", ttft(0.5 * PLAN.monitor.thresholds.ttft_p95_s), 10 * MINUTE),
    Case(
        "TtftP95High",
        "slow long ago, and nothing since",
        {name: values.replace("0+1x2000", "0+1x60 60x2000") for name, values in ttft(99).items()},
        60 * T.scrape_s + PERCENTILE_WINDOWS * T.alert_window_s + T.alert_window_s + 60,
    ),
    *(
        case
        for alert, job in (("GatewayDown", "gateway"), ("AgentDown", "agent"))
        for series in (f'up{{job="{job}",instance="127.0.0.1:2"}}',)
        for case in (
            Case(alert, "no metrics", {series: lasting((1, 60), (0, 60))}, 60 + T.alert_window_s + 5, ({},)),
            Case(alert, "a moment ago", {series: lasting((1, 60), (0, 60))}, 60 + T.alert_window_s - 5),
            Case(alert, "a restart", {series: lasting((1, 60), (0, 10), last=1)}, 60 + T.alert_window_s + 5),
            Case(alert, "another job is down", {UP: "0x99"}, 120),
        )
    ),
]


def on_machines() -> list[Case]:
    """Of the alerts about machines of a cloud."""
    assert LIMITS
    later, node = LIMITS.starting_s + 60, {"node": "i-1"}
    disk = 'job="machine",node="i-1",mountpoint="/",fstype="ext4"'
    avail, size = (f"node_filesystem_{what}_bytes{{{disk}}}" for what in ("avail", "size"))
    writable = {f"node_filesystem_readonly{{{disk}}}": "0x9999", size: "1000x9999"}
    offset = 'node_timex_offset_seconds{job="machine",node="i-1"}'
    synced = 'node_timex_sync_status{job="machine",node="i-1"}'
    error = 'node_timex_maxerror_seconds{job="machine",node="i-1"}'
    kills = 'node_vmstat_oom_kill{job="machine",node="i-1"}'
    of_gpu = 'job="gpu",node="i-1",pool="h100"'
    xid = f'DCGM_FI_DEV_XID_ERRORS{{{of_gpu},gpu="3"}}'
    gpu, row = {"node": "i-1", "gpu": "3"}, f'{{{of_gpu},gpu="3"}}'
    up = {f"up{{{of_gpu}}}": "1x9999"}
    eight = {f'DCGM_FI_DEV_GPU_TEMP{{{of_gpu},gpu="{index}"}}': "40x9999" for index in range(8)}
    seven = dict(list(eight.items())[:7])
    missing, pool = LIMITS.gpu_missing_s, {"node": "i-1", "pool": "h100"}
    exporter = 'up{job="machine",node="i-1",instance="10.0.0.1:9100"}'
    return [
        Case("ExporterDown", "it does not answer", {exporter: "0x9999"}, later, ({**node, "job": "machine"},)),
        Case("ExporterDown", "of the GPUs", {f"up{{{of_gpu}}}": "0x9999"}, later, ({**node, "job": "gpu"},)),
        Case("ExporterDown", "a node that starts", {exporter: "0x9999"}, LIMITS.starting_s - 60),
        Case("ExporterDown", "another job is down", {"up{job='vllm'}": "0x9999"}, later),
        Case(
            "DiskFilling",
            "full within hours",
            {**writable, avail: "149-0.06x9999"},
            later,
            ({**node, "mountpoint": "/"},),
        ),
        Case(
            "DiskFilling",
            "nearly full, for good",
            {**writable, avail: "25x9999"},
            later,
            ({**node, "mountpoint": "/"},),
        ),
        Case("DiskFilling", "small, and stays so", {**writable, avail: "100x9999"}, later),
        Case("DiskFilling", "fast, with much room", {**writable, avail: "900-0.05x9999"}, later),
        Case("DiskFilling", "weights come", {**writable, avail: lasting((100, 300), (20, 300), last=200)}, later),
        Case(
            "DiskFilling",
            "read only",
            {**writable, f"node_filesystem_readonly{{{disk}}}": "1x9999", avail: "9x9999"},
            later,
        ),
        Case(
            "DiskFilling",
            "memory",
            {k.replace("ext4", "tmpfs"): v for k, v in {**writable, avail: "9x9999"}.items()},
            later,
        ),
        Case("ClockOff", "ahead", {offset: "0.06x9999"}, 1200, (node,)),
        Case("ClockOff", "behind, and falling", {offset: "-0.06-0.001x9999"}, 1200, (node,)),
        Case("ClockOff", "ahead, and corrected", {offset: "2-0.001x9999"}, 1200),
        Case("ClockOff", "nobody corrects it", {synced: "0x9999", error: "16x9999"}, 1200, (node,)),
        Case("ClockOff", "not yet", {synced: "0x9999", error: "1x9999"}, 1200),
        Case("ClockOff", "right", {offset: "0.001x9999", synced: "1x9999", error: "0.1x9999"}, 1200),
        Case("OutOfMemory", "a process was killed", {kills: lasting((0, 60), (1, 60))}, 120, (node,)),
        Case("OutOfMemory", "long ago", {kills: lasting((0, 60), (1, 60))}, 120 + LIMITS.oom_window_s),
        Case("OutOfMemory", "before this Prometheus", {kills: "3x9999"}, 600),
        Case("GpuXid", "off the bus", {xid: "79x99"}, 60, (gpu,)),
        *(Case("GpuXid", f"of a program: {one}", {xid: f"{one}x99"}, 60) for one in (13, 31, 43, 45, 68, 109)),
        Case("GpuXid", "none", {xid: "0x99"}, 60),
        Case("GpuMemoryErrors", "no row is left", {f"DCGM_FI_DEV_ROW_REMAP_FAILURE{row}": "1x99"}, 60, (gpu,)),
        *(
            case
            for counter in ("UNCORRECTABLE_REMAPPED_ROWS", "ECC_DBE_VOL_TOTAL")
            for series in (f"DCGM_FI_DEV_{counter}{row}",)
            for case in (
                Case("GpuMemoryErrors", f"{counter}: a new one", {series: lasting((2, 60), (3, 60))}, 120, (gpu,)),
                Case("GpuMemoryErrors", f"{counter}: all of them old", {series: "2x99"}, 120),
            )
        ),
        Case("GpuMissing", "one of eight", {**up, **seven}, missing + 60, (pool,)),
        Case("GpuMissing", "all of them", up, missing + 60, (pool,)),
        Case("GpuMissing", "none", {**up, **eight}, missing + 60),
        Case("GpuMissing", "a moment ago", {**up, **seven}, missing - 60),
        Case("GpuMissing", "nobody knows", {f"up{{{of_gpu}}}": "0x9999"}, missing + 60),
    ]


def answers(failed: str, other: str) -> dict[str, str]:
    """What HAProxy counts of a model's answers."""
    return {
        f'haproxy_backend_http_responses_total{{proxy="model-chat",model="chat",code="{code}"}}': values
        for code, values in (("2xx", other), ("4xx", other), ("5xx", failed))
    }


def of_promises() -> list[Case]:
    """Of the alerts about what the stack promises, and another one may not."""
    promised, failing = CLOUD.monitor.thresholds.tpot_p95_s, CLOUD.monitor.thresholds.failing
    assert promised
    assert failing == 0.001
    tpot = partial(histogram, "vllm:inter_token_latency_seconds_bucket", promised)
    fast, slowly = "ErrorBudgetBurnsFast", "ErrorBudgetBurnsSlowly"
    return [
        Case("TpotP95High", "slow", tpot(1.5 * promised), 10 * MINUTE, (CHAT,)),
        Case("TpotP95High", "fast", tpot(0.5 * promised), 10 * MINUTE),
        Case(fast, "one in fifty fails", answers("0+2x2000", "0+49x2000"), 10 * MINUTE, (CHAT,)),
        Case(fast, "for hours, one in a hundred", answers("0+1x2000", "0+50x2000"), 120 * MINUTE, (CHAT,)),
        Case(fast, "one in five hundred fails", answers("0+1x2000", "0+250x2000"), 10 * MINUTE),
        Case(fast, "many did, none does", answers("0+9x100 900x2000", "0+49x2000"), 45 * MINUTE),
        Case(fast, "nobody asks", answers("7x2000", "7x2000"), 10 * MINUTE),
        Case(slowly, "one in five hundred fails", answers("0+1x2000", "0+250x2000"), 120 * MINUTE, (CHAT,)),
        Case(slowly, "one in two thousand fails", answers("0+1x2000", "0+1000x2000"), 120 * MINUTE),
    ]


LOCAL_CASES = CASES
CASES = [*LOCAL_CASES, *on_machines(), *of_promises()]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rendered rules of a local stack."""
    return rendered(PLAN, tmp_path_factory.mktemp("rules"))


@pytest.fixture(scope="module")
def cloud_rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of a stack on AWS."""
    return rendered(CLOUD, tmp_path_factory.mktemp("rules"))


def rendered(plan: FleetPlan, folder: Path) -> Path:
    programs = {program.name: program for program in monitor(plan, a_layout()).programs}
    file = folder / "rules.yml"
    file.write_text(programs["prometheus"].files["rules.yml"], encoding="utf-8")
    return file


def by_name(rules: Path) -> dict[str, Any]:
    """The alerting rules of a file."""
    groups = YAML(typ="safe").load(rules)["groups"]
    found = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


@pytest.fixture(scope="module")
def alerts(cloud_rules: Path) -> dict[str, Any]:
    """All alerting rules, by name."""
    return by_name(cloud_rules)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}: {case.what}")
def test_alert(case: Case, rules: Path, cloud_rules: Path, alerts: Mapping[str, Any], tmp_path: Path) -> None:
    file = rules if case in LOCAL_CASES else cloud_rules
    # The labels alone are compared: texts are for people, and tested below.
    names = ",".join(f'{name}="{value}"' for name, value in alerts[case.alert]["labels"].items())
    by = ",".join(sorted({"alertname"}.union(*case.fires)))
    expression = f'sum by ({by}) (ALERTS{{alertname="{case.alert}",alertstate="firing",{names}}})'
    expected = [{"labels": _series({"alertname": case.alert, **labels}), "value": 1} for labels in case.fires]
    document = {
        "rule_files": [str(file)],
        "evaluation_interval": f"{T.scrape_s}s",
        "tests": [
            {
                "interval": f"{T.scrape_s}s",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "promql_expr_test": [{"expr": expression, "eval_time": f"{case.at_s}s", "exp_samples": expected}],
            }
        ],
    }
    tests = tmp_path / "test.yml"
    tests.write_text(json.dumps(document), encoding="utf-8")
    done = subprocess.run([tool("promtool"), "test", "rules", tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _series(labels: Labels) -> str:
    return "{" + ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items()) + "}"


def test_a_stack_has_alerts_about_the_machines_and_promises_that_it_has(rules: Path, alerts: Mapping[str, Any]) -> None:
    assert by_name(rules).keys() == {case.alert for case in LOCAL_CASES}
    assert alerts.keys() - by_name(rules).keys() == {case.alert for case in (*on_machines(), *of_promises())}


def test_every_alert_is_seen_to_fire_and_to_stay_quiet(alerts: Mapping[str, Any]) -> None:
    assert {case.alert for case in CASES if case.fires} == alerts.keys()
    assert {case.alert for case in CASES if not case.fires} == alerts.keys()


def test_every_alert_has_a_page_and_every_page_an_alert(alerts: Mapping[str, Any]) -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == alerts.keys()
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook"] == f"runbooks/alerts/{name}.md"
        assert rule["labels"]["severity"] in {"page", "warn"}
        assert {"summary", "description"} <= rule["annotations"].keys()


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_pages_have_the_same_parts(page: Path, alerts: Mapping[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {page.stem}\n\n`{alerts[page.stem]['labels']['severity']}`")
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["What users see", "Check", "Fix", "Escalate"]


def test_texts_say_which_engine_or_model(alerts: Mapping[str, Any]) -> None:
    """A label that the expression has dropped would leave a hole in the text."""
    for name, rule in alerts.items():
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        known = {label for case in CASES if case.alert == name for labels in case.fires for label in labels}
        assert used <= known | {"instance"}, name
