"""AWS itself in trouble, and machines that somebody reboots or ends by hand. Each test leaves the fleet whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hosts.host import Host

from tests.aws.hosts.clients import Figure, clients
from tests.aws.hosts.front import Load
from tests.aws.hosts.inside_faults import in_rotation, since
from tests.aws.hosts.world import Fleet, until

AWAY_S = 25
"""Longer than anything here waits for one answer of AWS."""
OWN = "CompleteLifecycleAction|RecordLifecycleActionHeartbeat|SetInstanceProtection"
"""What machines ask of Auto Scaling; what boots them asks for the rest."""


@pytest.fixture(autouse=True)
def _mended(boots: Fleet) -> Iterator[None]:
    yield
    boots.faults()


def down(*services: str) -> list[dict[str, Any]]:
    """They answer nothing but that they are unavailable."""
    fault = {"code": "ServiceUnavailable", "message": "Service Unavailable", "status": 503, "count": 1_000_000}
    return [{"service": it, "action": OWN if it == "autoscaling" else ".*", **fault} for it in services]


def healthy(boots: Fleet) -> bool:
    """All gateways, to the load balancer."""
    return boots.members(boots.gateways).keys() <= {
        name for name, ok in boots.front.health(boots.targets).items() if ok
    }


def test_services_of_aws_that_are_down_drop_nothing(
    boots: Fleet, gateways: list[Host], nodes: list[Host], record_property: Figure
) -> None:
    """Though what watches machines and what names engines starts anew meanwhile."""
    with clients(boots, record_property) as load:
        began = time.monotonic()
        boots.faults(*down("servicediscovery", "autoscaling", "ssm", "secretsmanager", "s3", "monitoring"))
        for host in (nodes[0], gateways[0]):
            host.exec("systemctl", "kill", "--signal=KILL", "fleet-node")
        gateways[0].exec("pkill", "-KILL", "-f", "fleet_agent names")
        until("it lasts", lambda: since(began) > AWAY_S)
        assert in_rotation(gateways, nodes[0])
        boots.faults()
        until("engines are found", lambda: in_rotation(gateways, nodes[0]) and in_rotation(gateways, nodes[1]))
    assert load.failed == []


def test_a_gateway_that_is_rebooted_while_cloud_map_is_down(
    boots: Fleet, gateways: list[Host], nodes: list[Host], record_property: Figure
) -> None:
    """It leaves the load balancer, lets what is open finish, and comes back once it has engines."""
    with clients(boots, record_property) as load:
        boots.faults(*down("servicediscovery"))
        began = time.monotonic()
        gateways[0].reboot()
        gateways[0].wait()
        record_property("booted after, s", since(began))
        until("it lasts", lambda: since(began) > AWAY_S)
        boots.faults()
        until("it has engines", lambda: in_rotation(gateways, nodes[0]))
        until("gateways are healthy", lambda: healthy(boots))
        record_property("healthy after, s", since(began))
    assert load.failed == []


def test_a_gateway_that_cannot_have_its_keys_at_once(boots: Fleet, record_property: Figure) -> None:
    """Nor say that it is ready."""
    fault = {"service": "secretsmanager", "action": "GetSecretValue", "code": "InternalServiceError", "status": 500}
    hook = {"service": "autoscaling", "action": "CompleteLifecycleAction", "code": "Throttling", "status": 400}
    with clients(boots, record_property) as load:
        boots.faults({**fault, "count": 10}, {**hook, "count": 3})
        began = time.monotonic()
        boots.resize(boots.gateways, 3)
        boots.in_service(boots.gateways, 3)
        record_property("in service after, s", since(began))
        boots.resize(boots.gateways, 2)
        boots.in_service(boots.gateways, 2)
    assert load.failed == []


def replaced(boots: Fleet, group: str, figure: Figure) -> Load:
    """What clients had while somebody terminated a machine of a group, and the group made another one."""
    lost = boots.in_service(group, 2)[0].name
    with clients(boots, figure) as load:
        began = time.monotonic()
        boots.client("ec2").terminate_instances(InstanceIds=[lost])
        until("its group has another one", lambda: lost not in boots.members(group))
        boots.in_service(group, 2)
        until("gateways are healthy", lambda: healthy(boots))
        figure("replaced after, s", since(began))
    return load


def test_a_node_that_somebody_terminates(boots: Fleet, record_property: Figure) -> None:
    assert replaced(boots, boots.engines, record_property).failed == []


def test_a_gateway_that_somebody_terminates(boots: Fleet, record_property: Figure) -> None:
    """What is on its way there may be lost."""
    load = replaced(boots, boots.gateways, record_property)
    assert len(load.failed) <= load.clients
