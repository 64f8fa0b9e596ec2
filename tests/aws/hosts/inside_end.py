"""The end of the stack."""

from __future__ import annotations

from tests.aws.hosts.world import Fleet


def test_destroy_leaves_nothing(boots: Fleet) -> None:
    boots.up()
    boots.end_cases()
    boots.stack.pulumi("destroy", "--yes", "--skip-preview")
    assert boots.stand_in.left() == {}
