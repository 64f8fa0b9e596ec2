"""A stack as it is deployed on this machine, read from its machines' folders: needs no plan and no Pulumi."""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from infra.findings import ConfigError, Finding, nearest
from infra.paths import stack_dir

TIMEOUT_S = 5.0
DRAIN_S = 600.0
"""How long a drain is waited for where the agent's settings do not say."""
OK = 200
Row = dict[str, Any]
"""What the agent says of one engine: see `GET /engines` in nodeconfig/agent/fleet_agent/serve.py."""

PORTS = {
    "gateway": ("gateway/slots/haproxy/haproxy.cfg", r"^frontend clients\n\s+bind \S+:(\d+)"),
    "gateway statistics": ("gateway/slots/haproxy/haproxy.cfg", r"^frontend status\n\s+bind \S+:(\d+)"),
    "agent": ("engine/slots/agent/agent.json", r'"port": *(\d+)'),
    "prometheus": ("monitor/slots/prometheus/program.ini", r"--web\.listen-address=\S*:(\d+)"),
    "alertmanager": ("monitor/slots/alertmanager/program.ini", r"--web\.listen-address=\S*:(\d+)"),
    "grafana": ("monitor/slots/grafana/grafana.ini", r"^http_port *= *(\d+)"),
}
"""The file below machines/ that tells a server where to listen, and how it says it."""
ON_NGINX = {
    "gateway": ("gateway/slots/nginx/nginx.conf", r"server \{ # clients\n\s+listen \S+:(\d+)"),
    "gateway statistics": ("gateway/slots/nginx/nginx.conf", r"server \{ # status\n\s+listen \S+:(\d+)"),
}
"""The same of a gateway with nginx."""


class NotDeployedError(ConfigError):
    """There is no such stack on this machine."""

    exit_code = 2


class SilentError(ConfigError):
    """A server does not answer, or not as it should."""


def command_to_deploy(stack: str) -> str:
    """What a user types to bring a stack up, or back up."""
    return "`make up`" if stack == "local" else f"`make up STACK={stack}`"


@dataclass(frozen=True)
class Deployed:
    """One stack on this machine."""

    stack: str

    @property
    def machines(self) -> Path:
        """The folder of the stack's machines."""
        return stack_dir(self.stack) / "machines"

    def require(self) -> None:
        """See that there is something.

        Raises:
            NotDeployedError: There is nothing.
        """
        if not any(self.machines.glob("*/slots/*")):
            fix = f"{command_to_deploy(self.stack)} deploys it; `-s NAME` or PULUMI_STACK chooses another stack"
            raise NotDeployedError([Finding(f"stack {self.stack}", "is not deployed on this machine", fix)])

    @property
    def hint(self) -> str:
        """What shows how far a drain is, in words."""
        return "`fleet status` shows what is in flight, "

    @property
    def proxy(self) -> str:
        """What the gateway is: `haproxy` or `nginx`."""
        return "nginx" if (self.machines / "gateway/slots/nginx").exists() else "haproxy"

    def port(self, server: str) -> int | None:
        """Where a server was told to listen; None if it is not deployed. `server` is a key of `PORTS`."""
        path, pattern = ON_NGINX.get(server, PORTS[server]) if self.proxy == "nginx" else PORTS[server]
        try:
            text = (self.machines / path).read_text(encoding="utf-8")
        except OSError:
            return None
        match = re.search(pattern, text, re.MULTILINE)
        return int(match[1]) if match else None

    def declared(self) -> dict[str, Row]:
        """The engines that should run, by name, from their slots: what is known of them when the agent is silent."""
        rows = {}
        for file in sorted((self.machines / "engine" / "slots").glob("*/engine.json")):
            try:
                settings = json.loads(file.read_text(encoding="utf-8"))
                known = {"model": settings["model"], "port": settings["port"]}
                known |= {"weights": settings["weights"]["name"], "format": settings["weights"]["format"]}
            except (OSError, ValueError, LookupError, TypeError):  # edited by hand: `pulumi up` mends it
                known = {"last_error": f"{file} cannot be read"}
            rows[file.parent.name] = {"engine": file.parent.name, "bundle": file.resolve().parents[2].name, **known}
        return rows

    def engines(self) -> dict[str, Row]:
        """What the agent says of each engine, by name.

        Raises:
            SilentError: It does not answer.
        """
        rows = cast("list[Row]", self._agent("GET", "/engines"))
        return {row["engine"]: row for row in rows}

    def tell(self, order: str, engine: str) -> Row:
        """Give the agent an order for an engine: `drain` or `undrain`.

        Returns:
            What it then says of the engine.

        Raises:
            SilentError: It does not answer, or refuses.
        """
        return cast("Row", self._agent("POST", f"/{order}?engine={engine}"))

    def longest_s(self) -> float:
        """Seconds that the longest answer may take, as the agent was told."""
        try:
            settings = json.loads((self.machines / "engine/slots/agent/agent.json").read_text(encoding="utf-8"))
            return float(settings["drain_s"])
        except (OSError, ValueError, LookupError):
            return DRAIN_S

    def _agent(self, method: str, path: str) -> Any:
        port = self.port("agent")
        where = f"agent of stack {self.stack}"
        if port is None:
            raise SilentError([Finding(where, "has no settings", f"{command_to_deploy(self.stack)} mends the machine")])
        try:
            status, text = ask(port, path, method)
            if status == OK:
                return json.loads(text)
            problem = f"answers {status} to {path}: {text.strip()}"
        except OSError as error:
            problem = f"does not answer on port {port}: {error.strerror or error}"
        except (ValueError, http.client.HTTPException) as error:
            problem = f"answers nonsense on port {port}: {error!r}"
        fix = f"`fleet logs agent` may say why; {command_to_deploy(self.stack)} brings it back"
        raise SilentError([Finding(where, problem, fix)])

    def log(self, program: str) -> Path:
        """Where a program's log is.

        Raises:
            ConfigError: There is no such program, or it has not written anything.
        """
        logs = {file.stem: file for file in sorted(self.machines.glob("*/log/*.log"))}
        programs = {slot.name for slot in self.machines.glob("*/slots/*")} | logs.keys()
        if program in logs:
            return logs[program]
        if program in programs:
            raise ConfigError([Finding(program, "has no log yet", "`fleet status` says whether it runs")])
        near = nearest(program, programs)
        fix = f"{f'did you mean `{near}`? ' if near else ''}There are: {', '.join(sorted(programs))}"
        raise ConfigError([Finding(program, f"no program of stack {self.stack} is called that", fix)])


def ask(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """One request to a server on this machine, past any proxy that the environment names: status and body.

    Raises:
        OSError: It does not answer.
        HTTPException: What it answers is no HTTP.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()
