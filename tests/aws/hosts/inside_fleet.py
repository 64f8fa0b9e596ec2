"""A fleet from nothing to an answer, and what may happen to it afterwards. One fleet for all, in this order.

Each test leaves two engine nodes and a gateway that serve. Figures: seconds, and requests that failed of how many.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hosts.host import Host

from tests.aws.hosts.world import KEY, Fleet, Load, tell, until

Figure = Callable[[str, object], None]
ENGINES, GATEWAYS = "fleet-boots-engine-small-0", "fleet-boots-gateway-0"
TOKENS, EVERY_S = 20, 0.05
"""A stream takes a second: there is always one in flight."""


@pytest.fixture
def gateway(boots: Fleet) -> Host:
    return boots.in_service(GATEWAYS, 1)[0]


@pytest.fixture
def nodes(boots: Fleet) -> list[Host]:
    found = boots.in_service(ENGINES, 2)
    until("both are registered", lambda: {f"{host.name}-chat-1" for host in found} <= boots.registered())
    return found


@contextmanager
def clients(boots: Fleet, gateway: Host, figure: Figure) -> Iterator[Load]:
    """Streams all the while; each must be whole."""
    until("it serves", lambda: boots.ask(gateway).whole)
    with Load(lambda: boots.ask(gateway, TOKENS, EVERY_S)) as load:
        until("streams run", lambda: len(load.answers) > 2)
        yield load
        count = len(load.answers)
        until("streams still run", lambda: len(load.answers) > count + 2)
    figure("requests failed", f"{len(load.failed)} of {len(load.answers)}")


def test_a_group_ends_in_machines_that_answer(boots: Fleet, record_property: Figure) -> None:
    began = time.monotonic()
    engines, gateways = boots.group("engine-small", 2), boots.group("gateway", 1)
    (gateway,) = boots.in_service(gateways, 1)
    record_property("gateway in service, s", round(time.monotonic() - began, 1))
    hosts = boots.in_service(engines, 2)
    record_property("two engine nodes in service, s", round(time.monotonic() - began, 1))
    until("both are registered", lambda: boots.registered() == {f"{host.name}-chat-1" for host in hosts})
    answer = until("a request from outside is answered", lambda: (got := boots.ask(gateway)).whole and got)
    record_property("first answer through the gateway, s", round(time.monotonic() - began, 1))
    assert answer.body.count(b"data: ") == 6


def test_nothing_secret_lies_open_on_a_machine(gateway: Host) -> None:
    files = gateway.exec("find", "/var/lib/fleet/machine/bundles", "-type", "f", "-perm", "/077")
    assert files == ""
    assert KEY not in gateway.exec("sh", "-c", "cat /proc/*/cmdline /proc/*/environ | tr '\\0' ' '")


def test_only_the_machine_itself_may_change_an_engine(boots: Fleet, nodes: list[Host]) -> None:
    url = f"http://{nodes[0].instance.ip}:{boots.plan.agent.port}/drain?engine=chat-1"
    status = nodes[1].exec("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", "POST", url)
    assert status == "403"
    assert boots.agent(nodes[0])[0]["state"] == "ready"


def test_another_bundle_is_taken_up_in_place(
    boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure
) -> None:
    digest = boots.store(boots.engine_bundle(max_num_seqs="9"))
    boots.point("engine-small", digest)
    with clients(boots, gateway, record_property) as load:
        began = time.monotonic()
        for host in nodes:
            said = host.exec("/opt/fleet/bin/fleet-apply", digest, timeout=120)
            assert f"runs bundle {digest[:12]}" in said
        record_property("both moved, s", round(time.monotonic() - began, 1))
    assert load.failed == []
    assert [boots.agent(host)[0]["bundle"] for host in nodes] == [digest] * 2
    assert "max-num-seqs 9" in nodes[0].exec("sh", "-c", "tr '\\0' ' ' < /proc/$(pgrep -f fake_vllm | head -1)/cmdline")


def test_a_bundle_that_does_not_run_is_taken_back(
    boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure
) -> None:
    before = boots.agent(nodes[0])[0]["bundle"]
    digest = boots.store(boots.engine_bundle(max_model_len="1000"))  # the fake dies at the first request
    with clients(boots, gateway, record_property) as load:
        began = time.monotonic()
        said = nodes[0].exec("sh", "-c", f"/opt/fleet/bin/fleet-apply {digest} 2>&1; echo ended with $?", timeout=180)
        record_property("back after, s", round(time.monotonic() - began, 1))
    assert "ended with 1" in said
    assert "going back to bundle" in said
    assert load.failed == []
    assert (boots.agent(nodes[0])[0]["bundle"], boots.agent(nodes[0])[0]["state"]) == (before, "ready")


def test_a_killed_watcher_comes_back(boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure) -> None:
    with clients(boots, gateway, record_property) as load:
        nodes[0].exec("systemctl", "kill", "--signal=KILL", "fleet-node")
        until("it is back", lambda: nodes[0].exec("systemctl", "is-active", "fleet-node", check=False) == "active\n")
    assert load.failed == []
    assert f"{nodes[0].name}-chat-1" in boots.registered()


def test_a_killed_process_manager_comes_back(
    boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure
) -> None:
    before = boots.agent(nodes[0])[0]["pid"]
    with clients(boots, gateway, record_property) as load:
        began = time.monotonic()
        nodes[0].exec("sh", "-c", "kill -KILL $(cat /var/lib/fleet/machine/run/supervisord.pid)")
        until(
            "its engine is another one and ready",
            lambda: (rows := boots.agent(nodes[0])) and rows[0]["state"] == "ready" and rows[0]["pid"] != before,
        )
        record_property("ready again after, s", round(time.monotonic() - began, 1))
    assert load.failed == []
    until("it is registered", lambda: f"{nodes[0].name}-chat-1" in boots.registered())


def test_a_reboot_comes_back_by_itself(boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure) -> None:
    with clients(boots, gateway, record_property) as load:
        began = time.monotonic()
        nodes[0].reboot()
        nodes[0].wait()
        until("its engine is ready", lambda: (rows := boots.agent(nodes[0])) and rows[0]["state"] == "ready")
        record_property("ready again after, s", round(time.monotonic() - began, 1))
        until("it is registered", lambda: f"{nodes[0].name}-chat-1" in boots.registered())
    assert load.failed == []
    assert nodes[0].name in boots.members(ENGINES)


def test_without_metadata_everything_goes_on(
    boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure
) -> None:
    with clients(boots, gateway, record_property) as load:
        with nodes[0].changed() as instance:
            instance.metadata = "off"
        until("the watcher has noticed", lambda: "what was known stays true" in tell(nodes[0]))
        nodes[0].exec("systemctl", "restart", "fleet-node")
        until("the next one waits", lambda: "waiting" in tell(nodes[0], 3))
        with nodes[0].changed() as instance:
            instance.metadata = "v2"
        until("it goes on", lambda: "watching" in tell(nodes[0], 5))
    assert load.failed == []
    assert boots.members(ENGINES)[nodes[0].name] == "InService"


def test_a_spot_notice_drains(boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure) -> None:
    with clients(boots, gateway, record_property) as load:
        began = time.monotonic()
        nodes[0].interrupt(25)
        until("it is not to be found any more", lambda: f"{nodes[0].name}-chat-1" not in boots.registered())
        record_property("out of discovery after, s", round(time.monotonic() - began, 1))
        until("nothing runs on it", lambda: (rows := boots.agent(nodes[0])) and rows[0]["drained"])
        record_property("drained after, s", round(time.monotonic() - began, 1))
        until("it is gone", lambda: not nodes[0].dir.exists())
        fresh = boots.in_service(ENGINES, 2)
        record_property("replaced after, s", round(time.monotonic() - began, 1))
    assert load.failed == []
    assert nodes[0].name not in {host.name for host in fresh}


def test_a_group_that_wants_fewer_drops_nothing(
    boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure
) -> None:
    with clients(boots, gateway, record_property) as load:
        began = time.monotonic()
        boots.resize(ENGINES, 1)
        (left,) = boots.in_service(ENGINES, 1)
        gone = next(host for host in nodes if host.name != left.name)
        until("the other one is gone", lambda: not gone.dir.exists())
        record_property("gone after, s", round(time.monotonic() - began, 1))
        assert boots.registered() >= {f"{left.name}-chat-1"}
        assert f"{gone.name}-chat-1" not in boots.registered()
        boots.resize(ENGINES, 2)
        boots.in_service(ENGINES, 2)
    assert load.failed == []


def test_a_power_cut_is_replaced(boots: Fleet, gateway: Host, nodes: list[Host], record_property: Figure) -> None:
    """What was in flight on the machine is lost with it; nothing else may be."""
    with clients(boots, gateway, record_property) as load:
        began = time.monotonic()
        nodes[0].kill()
        until("its group has another one", lambda: nodes[0].name not in boots.members(ENGINES))
        boots.in_service(ENGINES, 2)
        record_property("replaced after, s", round(time.monotonic() - began, 1))
    assert len(load.failed) <= load.clients


def test_the_monitor_finds_the_machines_by_their_tags(boots: Fleet, nodes: list[Host]) -> None:
    from infra.render.node import monitor_bundle  # noqa: PLC0415

    boots.point("monitor", boots.store(monitor_bundle(boots.plan)))
    (host,) = boots.in_service(boots.group("monitor", 1), 1)

    def targets() -> dict[str, set[str]]:
        text = host.exec("curl", "-s", "http://127.0.0.1:9090/api/v1/targets", check=False)
        found: dict[str, set[str]] = {}
        for target in json.loads(text)["data"]["activeTargets"] if text else ():
            if target["health"] == "up":
                found.setdefault(target["labels"]["job"], set()).add(target["labels"].get("engine", ""))
        return found

    wanted = {f"chat-1@{it.name}" for it in nodes}
    until("both engines are scraped", lambda: wanted <= targets().get("vllm", set()))
    until("agents and gateway too", lambda: {"agent", "gateway"} <= targets().keys())
    query = "http://127.0.0.1:9090/api/v1/query?query=fleet_engine_ready"

    def ready() -> set[str]:
        return {row["metric"]["engine"] for row in json.loads(host.exec("curl", "-s", query))["data"]["result"]}

    until("the agents' engines have the same names", lambda: wanted <= ready())
    boots.remove(boots.group_name("monitor"))
