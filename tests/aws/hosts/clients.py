"""Streams all the while, for tests inside a world."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.aws.hosts.front import PATIENCE_S, Load
from tests.aws.hosts.world import Fleet, until

Figure = Callable[[str, object], None]
TOKENS, EVERY_S = 20, 0.05
"""A stream takes a second: there is always one in flight."""


@contextmanager
def clients(boots: Fleet, figure: Figure, patience_s: float = PATIENCE_S) -> Iterator[Load]:
    """Streams through the load balancer, from before to after; says how many were not whole."""
    boots.up()
    until("it serves", lambda: boots.ask().whole)
    with Load(lambda: boots.ask(TOKENS, EVERY_S, patience_s)) as load:
        until("streams run", lambda: len(load.answers) > load.clients)
        yield load
        count = len(load.answers)
        until("streams still run", lambda: len(load.answers) > count + load.clients)
    figure("requests failed", f"{len(load.failed)} of {len(load.answers)}")
