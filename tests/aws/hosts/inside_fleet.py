"""A fleet from nothing to an answer, and what happens to it on purpose. In this order.

Each test leaves two engine nodes and two gateways that serve. Figures: seconds, and requests that failed of how many.
"""

from __future__ import annotations

import json
import time
from typing import Any

from hosts.host import Host

from tests.aws.hosts.clients import Figure, clients
from tests.aws.hosts.world import KEY, Fleet, tell, until

RESULT = {"targets": "activeTargets", "query": "result"}


def test_groups_end_in_machines_that_answer(boots: Fleet, record_property: Figure) -> None:
    gateways = boots.in_service(boots.gateways, 2)
    record_property("two gateways in service, s", boots.age())
    hosts = boots.in_service(boots.engines, 2)
    record_property("two engine nodes in service, s", boots.age())
    until("both are registered", lambda: {f"{host.name}-chat-1" for host in hosts} <= boots.registered())
    boots.up()
    record_property("pulumi up, s", boots.age())
    answer = until("a request from outside is answered", lambda: (got := boots.ask()).whole and got)
    record_property("first answer through the load balancer, s", boots.age())
    assert answer.body.count(b"data: ") == 6
    until("its checks are good", lambda: set(boots.front.health(boots.targets).values()) == {True})
    assert boots.front.health(boots.targets).keys() == {host.name for host in gateways}


def test_nothing_secret_lies_open_on_a_machine(gateways: list[Host]) -> None:
    files = gateways[0].exec("find", "/var/lib/fleet/machine/bundles", "-type", "f", "-perm", "/077")
    assert files == ""
    assert KEY not in gateways[0].exec("sh", "-c", "cat /proc/*/cmdline /proc/*/environ | tr '\\0' ' '")


def test_only_the_machine_itself_may_change_an_engine(boots: Fleet, nodes: list[Host]) -> None:
    url = f"http://{nodes[0].instance.ip}:{boots.plan.agent.port}/drain?engine=chat-1"
    status = nodes[1].exec("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", "POST", url)
    assert status == "403"
    assert boots.agent(nodes[0])[0]["state"] == "ready"


def test_an_edit_is_taken_up_in_place(
    boots: Fleet, gateways: list[Host], nodes: list[Host], record_property: Figure
) -> None:
    """`pulumi up` of an edited stack file, then what its document runs on each machine: gateways first."""
    models = boots.stack.config["vllm-fleet:models"]
    models["chat"]["concurrency"] = 9
    boots.stack.change({"models": models})
    with clients(boots, record_property) as load:
        began = time.monotonic()
        boots.stack.up()
        record_property("pulumi up, s", round(time.monotonic() - began, 1))
        for machine, hosts in (("gateway", gateways), ("engine-small", nodes)):
            digest = boots.pointer(machine)
            for host in hosts:
                said = host.exec("/opt/fleet/bin/fleet-apply", digest, timeout=120)
                assert f"runs bundle {digest[:12]}" in said
        record_property("all moved, s", round(time.monotonic() - began, 1))
    assert load.failed == []
    assert [boots.agent(host)[0]["bundle"] for host in nodes] == [boots.pointer("engine-small")] * 2
    assert "max-num-seqs 9" in nodes[0].exec("sh", "-c", "tr '\\0' ' ' < /proc/$(pgrep -f fake_vllm | head -1)/cmdline")
    assert [host.name for host in boots.in_service(boots.engines, 2)] == [host.name for host in nodes]


def test_a_bundle_that_does_not_run_is_taken_back(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    before = boots.agent(nodes[0])[0]["bundle"]
    digest = boots.store(boots.engine_bundle(max_model_len="1000"))  # the fake dies at the first request
    with clients(boots, record_property) as load:
        began = time.monotonic()
        said = nodes[0].exec("sh", "-c", f"/opt/fleet/bin/fleet-apply {digest} 2>&1; echo ended with $?", timeout=180)
        record_property("back after, s", round(time.monotonic() - began, 1))
    assert "ended with 1" in said
    assert "going back to bundle" in said
    assert load.failed == []
    assert (boots.agent(nodes[0])[0]["bundle"], boots.agent(nodes[0])[0]["state"]) == (before, "ready")


def test_a_killed_watcher_comes_back(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    with clients(boots, record_property) as load:
        nodes[0].exec("systemctl", "kill", "--signal=KILL", "fleet-node")
        until("it is back", lambda: nodes[0].exec("systemctl", "is-active", "fleet-node", check=False) == "active\n")
    assert load.failed == []
    assert f"{nodes[0].name}-chat-1" in boots.registered()


def test_a_killed_process_manager_comes_back(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    before = boots.agent(nodes[0])[0]["pid"]
    with clients(boots, record_property) as load:
        began = time.monotonic()
        nodes[0].exec("sh", "-c", "kill -KILL $(cat /var/lib/fleet/machine/run/supervisord.pid)")
        until(
            "its engine is another one and ready",
            lambda: (rows := boots.agent(nodes[0])) and rows[0]["state"] == "ready" and rows[0]["pid"] != before,
        )
        record_property("ready again after, s", round(time.monotonic() - began, 1))
    assert load.failed == []
    until("it is registered", lambda: f"{nodes[0].name}-chat-1" in boots.registered())


def test_a_reboot_comes_back_by_itself(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    with clients(boots, record_property) as load:
        began = time.monotonic()
        nodes[0].reboot()
        nodes[0].wait()
        until("its engine is ready", lambda: (rows := boots.agent(nodes[0])) and rows[0]["state"] == "ready")
        record_property("ready again after, s", round(time.monotonic() - began, 1))
        until("it is registered", lambda: f"{nodes[0].name}-chat-1" in boots.registered())
    assert load.failed == []
    assert nodes[0].name in boots.members(boots.engines)
    said = nodes[0].journal("-u", "fleet-node", "-u", "fleet-machine", "-o", "cat")
    drained, ended = (said.rindex(f"Stopped {unit}.service") for unit in ("fleet-node", "fleet-machine"))
    assert drained < ended, "programs were ended before they were drained"


def test_without_metadata_everything_goes_on(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    with clients(boots, record_property) as load:
        with nodes[0].changed() as instance:
            instance.metadata = "off"
        until("the watcher has noticed", lambda: "what was known stays true" in tell(nodes[0]))
        nodes[0].exec("systemctl", "restart", "fleet-node")
        until("the next one waits", lambda: "waiting" in tell(nodes[0], 3))
        with nodes[0].changed() as instance:
            instance.metadata = "v2"
        until("it goes on", lambda: "watching" in tell(nodes[0], 5))
    assert load.failed == []
    assert boots.members(boots.engines)[nodes[0].name] == "InService"


def test_a_spot_notice_drains(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    with clients(boots, record_property) as load:
        began = time.monotonic()
        nodes[0].interrupt(15)
        until("it is not to be found any more", lambda: f"{nodes[0].name}-chat-1" not in boots.registered())
        record_property("out of discovery after, s", round(time.monotonic() - began, 1))
        until("nothing runs on it", lambda: (rows := boots.agent(nodes[0])) and rows[0]["drained"])
        record_property("drained after, s", round(time.monotonic() - began, 1))
        until("it is gone", lambda: not nodes[0].dir.exists())
        fresh = boots.in_service(boots.engines, 2)
        record_property("replaced after, s", round(time.monotonic() - began, 1))
    assert load.failed == []
    assert nodes[0].name not in {host.name for host in fresh}


def test_a_group_that_wants_fewer_drops_nothing(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    with clients(boots, record_property) as load:
        began = time.monotonic()
        boots.resize(boots.engines, 1)
        (left,) = boots.in_service(boots.engines, 1)
        gone = next(host for host in nodes if host.name != left.name)
        until("the other one is gone", lambda: not gone.dir.exists())
        record_property("gone after, s", round(time.monotonic() - began, 1))
        assert boots.registered() >= {f"{left.name}-chat-1"}
        assert f"{gone.name}-chat-1" not in boots.registered()
        boots.resize(boots.engines, 2)
        boots.in_service(boots.engines, 2)
    assert load.failed == []


def test_a_power_cut_is_replaced(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    """What was in flight on the machine is lost with it; nothing else may be."""
    with clients(boots, record_property) as load:
        began = time.monotonic()
        nodes[0].kill()
        until("its group has another one", lambda: nodes[0].name not in boots.members(boots.engines))
        boots.in_service(boots.engines, 2)
        record_property("replaced after, s", round(time.monotonic() - began, 1))
    assert len(load.failed) <= load.clients


def test_the_monitor_finds_the_machines_by_their_tags(boots: Fleet, nodes: list[Host]) -> None:
    host = boots.monitor()
    until("its cloud-init is done", lambda: host.wait() is None)
    attach_volume(host)

    def ask(query: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:9090/api/v1/{query}"
        text = host.exec("curl", "-sf", url, check=False)  # fails while it starts
        found: list[dict[str, Any]] = [] if not text else json.loads(text)["data"][RESULT[query.partition("?")[0]]]
        return found

    def targets() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for target in ask("targets"):
            if target["health"] == "up":
                found.setdefault(target["labels"]["job"], set()).add(target["labels"].get("engine", ""))
        return found

    wanted = {f"chat-1@{it.name}" for it in nodes}
    until("both engines are scraped", lambda: wanted <= targets().get("vllm", set()))
    until("agents and gateway too", lambda: {"agent", "gateway"} <= targets().keys())
    until(
        "the agents' engines have the same names",
        lambda: wanted <= {row["metric"]["engine"] for row in ask("query?query=fleet_engine_ready")},
    )


def attach_volume(host: Host) -> None:
    """What a machine sees of a volume that is attached to it; machines of `hosts` have no disks beside their root."""
    data, command = "/var/lib/fleet/machine/data", host.root / "usr/local/bin/lsblk"
    host.exec("sh", "-c", f"mkdir -p {data} && mount -t tmpfs -o mode=755 tmpfs {data}")
    command.write_text("#!/bin/sh\necho nvme1n1 Amazon Elastic Block Store\n")
    command.chmod(0o755)
