"""What a stack asks of its gateway and nginx cannot do: refused by name. HAProxy does all of it.

What it does otherwise is noted. docs/gateway.md has both side by side; infra/render/nginx.py is what there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sized

    from infra.config import StackConfig
    from infra.plan.ledger import Ledger

HAPROXY = "`proxy: haproxy`"


def on_nginx(config: StackConfig, models: Sized, ledger: Ledger, *, srv: bool) -> None:
    """Refuse what nginx cannot do.

    Args:
        config: What is asked for.
        models: That the fleet serves.
        ledger: Where it is written down.
        srv: Whether engines are found by SRV records of the DNS.
    """
    if config.gateway.proxy != "nginx":
        return
    if srv:
        problem = f"nginx finds no engines by DNS SRV before 1.27.3, and on {config.target} that is how they are found"
        ledger.refuse("gateway.proxy", problem, HAPROXY)
    if len(models) > 1:
        problem = f"{len(models)} models: nginx cannot read `model` from the body of a request, as clients expect it to"
        ledger.refuse("models", problem, f"{HAPROXY}, or a stack for each model")
    if config.gateway.routing == "prefix-affinity":
        problem = "nginx cannot read the first message of a request, which `prefix-affinity` goes by"
        ledger.refuse("gateway.routing", problem, f"`session`, `least-loaded`, `round-robin`, or {HAPROXY}")
    if config.gateway.routing == "session":
        note = "nginx: a session stays with its engine however busy that is; HAProxy passes over one that has too much"
        ledger.note("gateway.routing", note)
    note = "nginx has no queue: requests wait in the engines, and what is too much is refused at once"
    ledger.note("gateway.proxy", f"{note}; docs/gateway.md says what else it does otherwise than HAProxy")
