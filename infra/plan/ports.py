"""Which port each server of a local stack listens on.

A stack has a block of 100 ports, so that the same ports end in the same digits in every stack:

    +1 … +29  engines              +80  gateway              +91  Prometheus
    +30       Grafana              +81  gateway statistics   +93  Alertmanager
                                   +90  agent
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from infra.config import LocalConfig
    from infra.plan.ledger import Ledger

SERVICES = {"gateway": 80, "gateway-stats": 81, "agent": 90, "prometheus": 91, "alertmanager": 93, "grafana": 30}
"""By key of `local.ports`."""
MAX_ENGINES = 29
DEFAULT_STACK = "local"
FIRST_BASE = 18000
BLOCK = 100
BLOCKS = 100
"""18100 to 28099: below 32768, from where Linux takes ports for outgoing connections."""


def base_port(stack: str) -> int:
    """First port of a stack's block: 18000 for `local`, else by the CRC-32 of its name, so that stacks rarely meet."""
    if stack == DEFAULT_STACK:
        return FIRST_BASE
    return FIRST_BASE + BLOCK * (1 + zlib.crc32(stack.encode()) % BLOCKS)


def plan_ports(stack: str, config: LocalConfig, engines: Sequence[str], ledger: Ledger) -> dict[str, int]:
    """Port of every service (by key of `local.ports`) and of every engine (by name)."""
    base = config.base_port or base_port(stack)
    if config.base_port:
        ledger.given("local.base-port", base)
    else:
        ledger.because("local.base-port", base, "default" if stack == DEFAULT_STACK else "from the name of the stack")
    if len(engines) > MAX_ENGINES:
        problem = f"{len(engines)} engines, and the ports of a stack are enough for {MAX_ENGINES}"
        ledger.refuse("models", problem, f"at most {MAX_ENGINES} `engines` of all models together")
    chosen = config.ports.model_dump(by_alias=True)
    ports = {name: chosen[name] or base + offset for name, offset in SERVICES.items()}
    ports |= {engine: base + number for number, engine in enumerate(engines[:MAX_ENGINES], start=1)}
    holders: dict[int, str] = {}
    for name, port in ports.items():
        if port in holders:
            path = f"local.ports.{name}" if chosen.get(name) else f"local.ports.{holders[port]}"
            ledger.refuse(path, f"port {port} is for {holders[port]} and for {name}", "choose another one")
        holders.setdefault(port, name)
        if name in SERVICES:
            reason = "written in the stack file" if chosen[name] else f"base port + {SERVICES[name]}"
            ledger.because(f"local.ports.{name}", port, reason)
    return ports
