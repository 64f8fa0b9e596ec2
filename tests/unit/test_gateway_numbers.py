"""Which number each gateway of a stack has: every one decides for itself, and all agree."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_agent import balancer
from fleet_agent.machine import Machine
from fleet_agent.peers import NOWHERE, Member, Peers, addresses, choose, own_number

ROOM = 3


def members(**numbers: int | None) -> dict[str, Member]:
    """Gateways by name, launched in the order of their names."""
    return {name: Member(name, f"10.0.0.{n}", name, number) for n, (name, number) in enumerate(numbers.items(), 1)}


@pytest.mark.parametrize(
    ("there", "own", "number"),
    [
        (members(a=None), "a", 1),
        (members(a=1, b=None), "b", 2),
        (members(a=1, b=2), "b", 2),
        (members(a=2, b=None), "b", 1),
        (members(b=2), "b", 2),
        (members(a=1, b=1), "a", 1),
        (members(a=1, b=1), "b", 2),
        (members(a=1, b=1, c=2), "b", 3),
        (members(a=1, b=2, c=3, d=None), "d", None),
        (members(a=7), "a", 1),
    ],
)
def test_it_keeps_what_it_has_if_no_elder_one_has_it(there: dict[str, Member], own: str, number: int | None) -> None:
    assert choose(own, there, ROOM) == number


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_all_agree_in_the_end_whoever_looks_first(order: tuple[str, ...]) -> None:
    there = members(a=None, b=None, c=None)
    for _ in range(2):
        seen = dict(there)  # all look before any has said
        for own in order:
            there[own] = Member(own, there[own].address, own, choose(own, seen, ROOM))
        for own in order:
            there[own] = Member(own, there[own].address, own, choose(own, there, ROOM))
    assert sorted(it.number or 0 for it in there.values()) == [1, 2, 3]


def test_of_two_with_one_number_the_elder_is_asked() -> None:
    assert addresses(members(a=1, b=1, c=None), 99) == {1: "10.0.0.1:99"}


class Ec2:
    """As much of EC2 as is asked."""

    def __init__(self, numbers: dict[str, str]) -> None:
        self.numbers = numbers

    def __getitem__(self, service: str) -> Ec2:
        assert service == "ec2"
        return self

    def get_paginator(self, _: str) -> Ec2:
        return self

    def paginate(self, **_: Any) -> Iterator[dict[str, Any]]:
        for n, (name, number) in enumerate(self.numbers.items(), 1):
            tags = [{"Key": "vllm-fleet:gateway", "Value": number}]
            row = {"InstanceId": name, "PrivateIpAddress": f"10.0.0.{n}", "LaunchTime": name, "Tags": tags}
            yield {"Reservations": [{"Instances": [row]}]}

    def create_tags(self, *, Resources: list[str], Tags: list[dict[str, str]]) -> None:  # noqa: N803 - as boto3 has it
        self.numbers[Resources[0]] = Tags[0]["Value"]


def test_haproxy_takes_it_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reloads: list[str] = []
    monkeypatch.setattr(balancer, "reload", lambda _machine, _supervisor, program: reloads.append(program))
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        machine = Machine(Path(folder))
        machine.prepare()
        ec2 = Ec2({"a": "1", "b": "new"})
        peers = Peers(machine, {"stack": "prod", "room": ROOM, "port": 8405}, ec2, "b")
        assert [peers.take_up(peers.look()) for _ in range(3)] == [True, False, False]
        assert (ec2.numbers, reloads, own_number(machine.run)) == ({"a": "1", "b": "2"}, ["haproxy"], 2)
        assert (machine.run / "peers.cfg").read_text().splitlines()[2:] == [
            "    setenv FLEET_GATEWAY_1 10.0.0.1:8405",
            "    setenv FLEET_GATEWAY_2 10.0.0.2:8405",
            f"    setenv FLEET_GATEWAY_3 {NOWHERE}",
        ]
        del ec2.numbers["a"]
        assert peers.take_up(peers.look())
        assert own_number(machine.run) == 2, "who goes changes nobody's number"


def test_one_that_ec2_does_not_list_yet_waits() -> None:
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        peers = Peers(Machine(Path(folder)), {"stack": "prod", "room": ROOM, "port": 8405}, Ec2({}), "a")
        assert not peers.take_up(peers.look())
