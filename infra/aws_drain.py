"""`fleet drain` on AWS: the agent of a node takes orders from its own machine only, so SSM carries them there."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, cast

from infra import drain as local
from infra.aws_status import engines as named
from infra.deployed import Row
from infra.findings import ConfigError, Finding, did_you_mean

if TYPE_CHECKING:
    from infra.aws_reads import Aws
    from infra.plan.model import FleetPlan

DOCUMENT = "AWS-RunShellScript"
DELIVER_S = 60
"""An agent of SSM that does not take an order for so long is not there; SSM allows 30 at least."""
RUN_S = 30
POLL_S = 1.0
PAUSE_S = 5.0
"""Between two looks at a node that drains: each is an order of its own."""
UNDER_WAY = {"Pending", "InProgress", "Delayed", "Cancelling"}


def command(port: int, path: str, method: str = "GET") -> str:
    """What a node runs: one question to its own agent, past any proxy. What it refuses fails, with its words."""
    url = f"http://127.0.0.1:{port}{path}"
    options = ("--silent", "--show-error", "--fail-with-body", "--max-time", "10", "--noproxy", "*")
    return shlex.join(["curl", *options, "--request", method, url])


class Nodes:
    """The engines of one node, which can be drained; and those elsewhere, which stand in for them."""

    def __init__(self, aws: Aws, plan: FleetPlan, node: str) -> None:
        """The node `node`, an instance's id.

        Raises:
            ConfigError: There is no such node, or AWS refuses.
        """
        self._aws, self._plan, self._node = aws, plan, node
        self.nodes = {it["InstanceId"] for it in aws.instances("engine") if it["State"]["Name"] == "running"}
        if node not in self.nodes:
            fix = did_you_mean(node, sorted(self.nodes)) if self.nodes else "`fleet status` shows what there is"
            raise ConfigError([Finding(node, "no engine node of this stack runs under this id", fix)])
        self._elsewhere: dict[str, Row] | None = None
        self._asked = float("-inf")

    def elsewhere(self) -> dict[str, Row]:
        """Engines of other nodes that are ready, as Cloud Map has them, which is told by the nodes themselves."""
        if self._elsewhere is None:
            registered = self._aws.registered()
            self._elsewhere = {
                name: {"engine": name, "model": model, "state": "ready"}
                for model, srv, _ in self._plan.gateway.srv
                for name in named(registered, srv, self.nodes - {self._node})
            }
        return self._elsewhere

    def engines(self) -> dict[str, Row]:
        """All of both, by `engine@node`. Asks no more often than every `PAUSE_S`."""
        time.sleep(max(0.0, self._asked + PAUSE_S - time.monotonic()))
        rows = cast("list[Row]", self._run("/engines"))
        self._asked = time.monotonic()
        here = {f"{row['engine']}@{self._node}": row for row in rows}
        return {**self.elsewhere(), **{name: {**row, "engine": name} for name, row in here.items()}}

    def here(self, states: Collection[str]) -> list[str]:
        """Names of the node's own engines that are in one of these states.

        Raises:
            ConfigError: There is none.
        """
        rows = {name: row for name, row in self.engines().items() if name.endswith(f"@{self._node}")}
        found = [name for name, row in rows.items() if row["state"] in states]
        if not found:
            said = ", ".join(f"{name} is {row['state']}" for name, row in rows.items()) or "it has no engines"
            raise ConfigError([Finding(self._node, f"nothing on it gets requests that could be drained: {said}")])
        return found

    @property
    def hint(self) -> str:
        """None: nobody else can look at a node's agent."""
        return ""

    def tell(self, order: str, engine: str) -> Row:
        """`drain` or `undrain` an engine of this node."""
        name, _, node = engine.partition("@")
        if node != self._node:
            raise ConfigError([Finding(engine, f"is not on {self._node}")])
        return cast("Row", self._run(f"/{order}?engine={name}", "POST"))

    def longest_s(self) -> float:
        """As the plan has it."""
        return float(self._plan.timings.drain_s)

    def _run(self, path: str, method: str = "GET") -> Any:
        """Have the node ask its agent.

        Raises:
            ConfigError: SSM does not reach the node, or the agent refuses.
        """
        sent = self._aws.call(
            "ssm",
            "send_command",
            DocumentName=DOCUMENT,
            InstanceIds=[self._node],
            Comment=f"fleet drain: {method} {path}"[:100],
            TimeoutSeconds=DELIVER_S,
            Parameters={"commands": [command(self._plan.agent.port, path, method)], "executionTimeout": [str(RUN_S)]},
        )["Command"]["CommandId"]
        limit = time.monotonic() + DELIVER_S + RUN_S
        found: dict[str, Any] = {"Status": "Pending"}
        while found["Status"] in UNDER_WAY:
            if time.monotonic() > limit:
                raise ConfigError([Finding(self._node, "SSM does not say how it went", f"command {sent}")])
            time.sleep(POLL_S)
            found = self._invocation(sent)
        text, error = found.get("StandardOutputContent", ""), found.get("StandardErrorContent", "")
        if found["Status"] != "Success":
            problem = (text.strip() or error.strip() or found.get("StatusDetails") or found["Status"]).splitlines()[-1]
            fix = (
                f"`aws ssm start-session --target {self._node} --region {self._aws.region}`, `journalctl -u 'fleet-*'`"
            )
            raise ConfigError([Finding(self._node, problem, fix)])
        try:
            return json.loads(text)
        except ValueError:
            raise ConfigError([Finding(self._node, f"its agent answers nonsense: {text[:100]!r}")]) from None

    def _invocation(self, command_id: str) -> dict[str, Any]:
        try:
            found = self._aws.call("ssm", "get_command_invocation", CommandId=command_id, InstanceId=self._node)
        except ConfigError as error:
            if "InvocationDoesNotExist" in str(error):  # it takes a moment
                return {"Status": "Pending"}
            raise
        return cast("dict[str, Any]", found)


def order(  # noqa: PLR0913 - as the command
    aws: Aws, plan: FleetPlan, what: str, say: Callable[[str], None], *, undo: bool, wait: bool, force: bool
) -> None:
    """Drain an engine, `engine@node`, or all engines of a node; or let them have requests again.

    Raises:
        ConfigError: It cannot be, or was not in its time.
    """
    engine, _, node = what.rpartition("@")
    if not node.startswith("i-"):
        fix = "`chat-1@i-0123456789abcdef0`, or a node alone: `fleet status` has them"
        raise ConfigError([Finding(what, "does not say on which node: engines are called alike on all", fix)])
    say(f"{node}: asking its agent, through SSM")
    nodes = Nodes(aws, plan, node)
    names = [what] if engine else nodes.here(local.CAN_DRAIN)
    if undo:
        for name in names:
            local.undo(nodes, name, say)
        return
    local.drain(nodes, names, say, wait=wait, force=force)
    if not engine:
        say(f"{node}: its group replaces a node of which no engine is ready for longer than a boot takes")
