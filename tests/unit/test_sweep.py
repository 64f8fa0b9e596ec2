"""Who is struck out of Cloud Map."""

from __future__ import annotations

from typing import Any

from fleet_agent.sweep import Roll, Sweep


def test_an_engine_is_struck_out_when_its_machine_was_missing_twice() -> None:
    roll, registered = Roll(), ["i-0a-chat-1", "i-0b-chat-1", "i-0b-my-chat-2"]
    assert roll.dead(registered, ["i-0a"]) == []
    assert roll.dead(registered, ["i-0a", "i-0b"]) == []
    assert roll.dead(registered, ["i-0a"]) == []
    assert roll.dead(registered, ["i-0a"]) == ["i-0b-chat-1", "i-0b-my-chat-2"]


class Aws:
    """As much of the three services as is asked."""

    def __init__(self) -> None:
        self.registered = ["i-0a-chat-1", "i-0b-chat-1"]

    def get_paginator(self, name: str) -> Any:
        made = Aws.Pages()
        made.pages = {
            "describe_instances": lambda: {"Reservations": [{"Instances": [{"InstanceId": "i-0a"}]}]},
            "list_services": lambda: {"Services": [{"Id": "srv-1"}]},
            "list_instances": lambda: {"Instances": [{"Id": it} for it in self.registered]},
        }[name]
        return made

    class Pages:
        pages: Any

        def paginate(self, **_: Any) -> list[Any]:
            return [self.pages()]

    def list_namespaces(self, **_: Any) -> Any:
        return {"Namespaces": [{"Id": "ns-1"}]}

    def deregister_instance(self, **asked: Any) -> None:
        assert asked["ServiceId"] == "srv-1"
        self.registered.remove(asked["InstanceId"])


def test_it_tells_aws() -> None:
    aws = Aws()
    sweep = Sweep({"stack": "prod", "namespace": "prod.internal"}, dict.fromkeys(("ec2", "servicediscovery"), aws))
    sweep.strike()
    assert aws.registered == ["i-0a-chat-1", "i-0b-chat-1"]
    sweep.strike()
    assert aws.registered == ["i-0a-chat-1"]
