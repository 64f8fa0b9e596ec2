"""What happens to a fleet that nobody wanted: each test leaves it whole. Figures as in inside_fleet.py."""

from __future__ import annotations

import time

import pytest
from hosts.host import Host

from tests.aws.hosts.clients import Figure, clients
from tests.aws.hosts.front import Load
from tests.aws.hosts.world import REAL, Fleet, tell, until

OWN_DISK = "bootcmd:\n  - mkdir -p /var/lib/fleet\n  - mount -t tmpfs -o size=48m tmpfs /var/lib/fleet\n"
"""What a machine writes is on a file system of its own."""
FILL = "cat /dev/zero > /var/lib/fleet/fill; df --output=avail /var/lib/fleet | tail -1"
QUICK = "mkdir -p /run/systemd/system/fleet-node.service.d && printf '[Service]\\nWatchdogSec=10\\n' > {}"
DROP_IN = "/run/systemd/system/fleet-node.service.d/quick.conf"
PYTHON = ("env", "PYTHONPATH=/var/lib/fleet/machine/wanted/node/agent", "/opt/fleet/venv/bin/python", "-c")
ASK_HAPROXY = """
from pathlib import Path
from fleet_agent.balancer import command
for question in ("show servers state model-chat", "show stat"):
    print(command(Path("/var/lib/fleet/machine/run"), question))
"""


def since(moment: float) -> float:
    return round(time.monotonic() - moment, 1)


def at(gateway: Host, node: Host) -> tuple[bool, int]:
    """What a gateway says of the engine on a node: whether it is in rotation, and how many requests it was sent."""
    lines = gateway.exec(*PYTHON, ASK_HAPROXY, check=False).splitlines()
    known = [line.split() for line in lines if line[:1].isdigit() and " model-chat " in line]
    names = [line[3] for line in known if line[4] == node.instance.ip]
    rows = [row for row in (line.split(",") for line in lines) if row[0] == "model-chat" and row[1] in names]
    return any(row[17].startswith("UP") for row in rows), sum(int(row[7]) for row in rows)


def in_rotation(gateways: list[Host], node: Host) -> bool:
    return all(at(gateway, node)[0] for gateway in gateways)


def out_of_rotation(gateways: list[Host], node: Host) -> bool:
    return not any(at(gateway, node)[0] for gateway in gateways)


def sent(gateways: list[Host], node: Host) -> int:
    return sum(at(gateway, node)[1] for gateway in gateways)


@pytest.fixture(scope="module", autouse=True)
def full(boots: Fleet) -> str:
    """The group of a node whose disk will be full: it boots meanwhile."""
    return boots.case("full", boots.store(boots.engine_bundle()), OWN_DISK)


def unreachable(boots: Fleet, gateways: list[Host], node: Host, figure: Figure, for_s: float = 0) -> None:
    """From a fault that has just begun until after its end: nothing is sent there, and it comes back by itself."""
    began = time.monotonic()
    until("no gateway sends anything there", lambda: out_of_rotation(gateways, node))
    figure("out of rotation after, s", since(began))
    before = sent(gateways, node)
    assert all(boots.ask().whole for _ in range(6))
    until("it lasts", lambda: since(began) > for_s)
    assert sent(gateways, node) == before
    mended = time.monotonic()
    node.mend()
    until("it is in rotation again", lambda: in_rotation(gateways, node))
    figure("in rotation again after, s", since(mended))
    until("it serves", lambda: boots.ask().whole and sent(gateways, node) > before)


def test_a_node_whose_network_is_cut_comes_back_by_itself(
    boots: Fleet, gateways: list[Host], nodes: list[Host], record_property: Figure
) -> None:
    with clients(boots, record_property) as load:
        nodes[0].cut()
        unreachable(boots, gateways, nodes[0], record_property)
    assert len(load.failed) <= load.clients
    assert boots.members(boots.engines)[nodes[0].name] == "InService"


def test_a_node_that_hangs_goes_on_where_it_was(
    boots: Fleet, gateways: list[Host], nodes: list[Host], record_property: Figure
) -> None:
    """For longer than an engine may be silent: its agent stood still as well, and must not take it for wedged."""
    before = boots.agent(nodes[0])[0]["pid"]
    with clients(boots, record_property) as load:
        nodes[0].hang()
        unreachable(boots, gateways, nodes[0], record_property, for_s=boots.plan.timings.wedged_s + 2)
    assert len(load.failed) <= load.clients
    assert boots.agent(nodes[0])[0]["pid"] == before
    assert boots.members(boots.engines)[nodes[0].name] == "InService"


def test_a_full_disk_drops_nothing(boots: Fleet, full: str, gateways: list[Host], record_property: Figure) -> None:
    (host,) = boots.in_service(full, 1)
    until("it is in rotation", lambda: in_rotation(gateways, host))
    digest = boots.store(boots.engine_bundle(max_num_seqs="7"))
    with clients(boots, record_property) as load:
        assert host.exec("sh", "-c", FILL, check=False).split() == ["0"]
        until("it says so", lambda: "is full: logs and state are lost" in tell(host))
        host.exec("systemctl", "kill", "--signal=KILL", "fleet-node")
        until("what starts anew says it too", lambda: tell(host).count("is full: logs and state are lost") > 1)
        said = host.exec("sh", "-c", f"/opt/fleet/bin/fleet-apply {digest} 2>&1; echo ended with $?")
        assert "No space left on device" in said
        assert "ended with 1" in said
        before = sent(gateways, host)
        until("it goes on serving", lambda: sent(gateways, host) > before + 2)
        assert boots.state(host) == "ready"
        began = time.monotonic()
        host.exec("rm", "/var/lib/fleet/fill")
        until("it says that too", lambda: "there is room in" in tell(host))
        assert f"runs bundle {digest[:12]}" in host.exec("/opt/fleet/bin/fleet-apply", digest, timeout=120)
        record_property("runs another bundle after, s", since(began))
    assert load.failed == []
    boots.resize(full, 0)


def watcher(host: Host) -> int:
    """The process between a node and its cloud; 0: none."""
    return int(host.exec("systemctl", "show", "--property=MainPID", "--value", "fleet-node"))


def test_a_frozen_watcher_is_started_anew(boots: Fleet, nodes: list[Host], record_property: Figure) -> None:
    host = nodes[0]
    assert host.exec("systemctl", "show", "--property=WatchdogUSec", "--value", "fleet-node") == "2min\n"
    host.exec("sh", "-c", QUICK.format(DROP_IN))
    host.exec("systemctl", "daemon-reload")
    host.exec("systemctl", "restart", "fleet-node")
    with clients(boots, record_property) as load:
        before = watcher(host)
        began = time.monotonic()
        host.exec("systemctl", "kill", "--signal=STOP", "fleet-node")
        until("another one watches", lambda: watcher(host) not in {before, 0})
        record_property("another one watches after, s", since(began))
    assert load.failed == []
    host.exec("rm", DROP_IN)
    host.exec("systemctl", "daemon-reload")
    host.exec("systemctl", "restart", "fleet-node")


def test_a_killed_haproxy_comes_back(
    boots: Fleet, gateways: list[Host], nodes: list[Host], record_property: Figure
) -> None:
    """Until it is back, or the load balancer has noticed, half of all connections are refused."""
    with clients(boots, record_property) as load:
        began = time.monotonic()
        gateways[0].exec("pkill", "-KILL", "haproxy")
        until("another one has found the engines", lambda: in_rotation([gateways[0]], nodes[0]))
        until("both are healthy", lambda: list(boots.front.health(boots.targets).values()) == [True] * 2)
        record_property("healthy again after, s", since(began))
        with Load(boots.ask) as after:
            until("requests are answered", lambda: len(after.answers) > 20)
        assert after.failed == []
    assert all(answer.status in {0, 200} for answer in load.failed)


def test_a_gateway_that_hangs_and_dies_is_replaced(boots: Fleet, gateways: list[Host], record_property: Figure) -> None:
    """What the load balancer gives it until its checks have failed is lost, and what was open; then nothing more."""
    lost = gateways[0]
    with clients(boots, record_property, patience_s=8):
        began = time.monotonic()
        lost.hang()
        until("the load balancer's checks fail", lambda: boots.front.health(boots.targets)[lost.name] is False)
        record_property("out after, s", since(began))
        with Load(boots.ask) as after:
            lost.kill()
            until("its group has another one", lambda: lost.name not in boots.members(boots.gateways))
            fresh = {host.name for host in boots.in_service(boots.gateways, 2)}
            until(
                "both are healthy", lambda: fresh <= {it for it, ok in boots.front.health(boots.targets).items() if ok}
            )
            record_property("replaced after, s", since(began))
        record_property("requests failed after it was out", f"{len(after.failed)} of {len(after.answers)}")
        assert after.failed == []


def test_a_real_engine_answers_through_a_gateway(boots: Fleet, record_property: Figure) -> None:
    """Weights from S3 with their real digests, warmed, registered, found."""
    if not REAL:
        pytest.skip("vLLM for the CPU or its weights are not installed: `make up` installs them")
    (host,) = boots.in_service(boots.real, 1)
    record_property("what the fetch said last", tell(host, 400).split(" weights: ")[-1].splitlines()[0])
    until("it is registered", lambda: boots.registered("real") == {f"{host.name}-real-1"})
    question = [{"role": "user", "content": "Name a colour."}]

    def answered() -> object:
        answer = boots.ask(tokens=8, model="real", messages=question, temperature=0)
        return answer.whole and answer

    answer = until("it answers", answered)
    assert answer.body.count(b'"content":"') > 1
    row = boots.agent(host)[0]
    assert (row["state"], row["warmup_s"] > 0) == ("ready", True)
    assert row["generation_tokens"] > 0
    record_property("warm-up, s", row["warmup_s"])
    boots.resize(boots.real, 0)
