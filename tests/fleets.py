"""A whole stack under test: `pulumi` as a user runs it, in a folder of its own, with ports of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fleet_agent.machine import Machine
from fleet_agent.supervise import Supervisor, machine_processes, wait_for

from infra.paths import ROOT, shared_dir, toolchain_dir

ROLES = ("gateway", "monitor", "engine")
PORTS = 100
IN_TIME_S = 300


def free_range() -> int:
    """The first of 100 ports of which none is taken now; chosen by lot, so that two runs at once rarely meet."""
    bases = list(range(20000, 32000, PORTS))
    random.SystemRandom().shuffle(bases)
    for base in bases:
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise AssertionError("no 100 free ports")


@dataclass
class Fleet:
    """One stack."""

    stack: str
    folder: Path
    """FLEET_DIR."""
    shared: Path
    """FLEET_SHARED."""
    base_port: int

    def __post_init__(self) -> None:
        self.project = self.folder / "project"
        self.stack_file = self.project / "stacks" / f"Pulumi.{self.stack}.yaml"
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        self.stack_file.parent.mkdir(parents=True, exist_ok=True)
        for name in ("Pulumi.yaml", "__main__.py", "infra", "nodeconfig", "runbooks", "toolchain", ".venv"):
            (self.project / name).symlink_to(ROOT / name)

    @property
    def environment(self) -> dict[str, str]:
        path = [str(Path(sys.executable).parent), os.environ["PATH"], str(toolchain_dir() / "bin")]
        return {
            **os.environ,
            "PATH": os.pathsep.join(path),
            "FLEET_DIR": str(self.folder),
            "FLEET_SHARED": str(self.shared),
            "FLEET_STACKS": str(self.stack_file.parent),
            "PULUMI_STACK": self.stack,
            "PULUMI_HOME": str(self.folder / "pulumi-home"),
            "PULUMI_BACKEND_URL": f"file://{self.folder}/state",
            "PULUMI_CONFIG_PASSPHRASE": "test",
            "PULUMI_SKIP_UPDATE_CHECK": "true",
            "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",
            "PYTHONDONTWRITEBYTECODE": "",
        }

    def configure(self, **model: Any) -> None:
        """Write the stack file: one model `chat`, with these settings on top of the defaults."""
        config = {
            "vllm-fleet:target": "local",
            "vllm-fleet:models": {"chat": {"weights": "smollm2-135m-instruct", "tool-calls": "hermes", **model}},
            "vllm-fleet:local": {"base-port": self.base_port},
        }
        self.stack_file.write_text(json.dumps({"config": config}, indent=1))

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command in the stack's environment, in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> str:
        """A command that must succeed; its output."""
        with self.start(*command) as process:
            output, _ = process.communicate(timeout=IN_TIME_S * 3)
        assert process.returncode == 0, output
        return output

    def fails(self, *command: str) -> str:
        """A command that must not succeed; its output."""
        with self.start(*command) as process:
            output, _ = process.communicate(timeout=IN_TIME_S * 3)
        assert process.returncode != 0, output
        return output

    def pulumi(self, command: str, *arguments: str) -> tuple[str, ...]:
        """A pulumi command line for this stack."""
        return ("pulumi", command, *arguments, "--stack", self.stack, "--non-interactive")

    def up(self) -> str:
        return self.run(*self.pulumi("up", "--yes", "--skip-preview"))

    def destroy(self) -> str:
        return self.run(*self.pulumi("destroy", "--yes", "--skip-preview"))

    def fleet(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "infra.cli", *arguments)

    @property
    def outputs(self) -> dict[str, Any]:
        outputs: dict[str, Any] = json.loads(self.run(*self.pulumi("stack", "output", "--json", "--show-secrets")))
        return outputs

    @property
    def key(self) -> str:
        return (self.folder / self.stack / "keys" / "default.key").read_text().strip()

    def machine(self, role: str) -> Machine:
        return Machine(self.folder / self.stack / "machines" / role)

    def supervisor(self, role: str) -> Supervisor:
        return Supervisor(self.machine(role))

    def pid(self, role: str, program: str) -> int:
        return next(process.pid for process in self.supervisor(role).of(program))

    @property
    def gateway(self) -> str:
        return f"http://127.0.0.1:{self.base_port + 80}"

    @property
    def prometheus(self) -> str:
        return f"http://127.0.0.1:{self.base_port + 91}"

    def engines(self) -> dict[str, dict[str, Any]]:
        """What the agent says; nothing while it does not answer."""
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.base_port + 90}/engines") as it,
        ):
            return {row["engine"]: row for row in json.load(it)}
        return {}

    def in_rotation(self) -> set[str]:
        """Engines that the gateway sends requests to."""
        url = f"http://127.0.0.1:{self.base_port + 81}/;csv"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            header, *rows = answer.read().decode().lstrip("# ").splitlines()
            names = header.split(",")
            table = [dict(zip(names, row.split(","), strict=False)) for row in rows if row]
            return {
                row["svname"] for row in table if row["svname"].startswith("chat-") and row["status"].startswith("UP")
            }
        return set()

    def post(self, path: str, body: Any, key: str | None = None) -> tuple[int, dict[str, Any]]:
        """One request through the gateway."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key != "":
            headers["Authorization"] = f"Bearer {key or self.key}"
        request = urllib.request.Request(f"{self.gateway}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def until(self, what: str, condition: Callable[[], bool], timeout_s: float = IN_TIME_S) -> None:
        assert wait_for(condition, timeout_s, 0.1), what

    def processes(self) -> list[int]:
        return [process.pid for role in ROLES for process in machine_processes(self.machine(role).root)]

    def end(self) -> None:
        """Leave nothing behind, whatever the test did."""
        for role in ROLES:
            if self.machine(role).root.is_dir():
                self.supervisor(role).halt(60, print)
        for process in psutil.process_iter():  # plugins of a pulumi that was killed: they do not notice
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLEET_DIR") == str(self.folder):
                    process.kill()


@contextlib.contextmanager
def a_fleet(stack: str, shared: Path | None = None) -> Iterator[Fleet]:
    """A stack that is configured and not up; whatever runs of it at the end is ended."""
    for tool in ("pulumi", "haproxy", "prometheus", "alertmanager"):
        if not shutil.which(tool, path=os.pathsep.join([os.environ["PATH"], str(toolchain_dir() / "bin")])):
            pytest.skip(f"{tool} is not installed: `make test` installs it")
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder:
        fleet = Fleet(stack, Path(folder), shared or shared_dir(), free_range())
        fleet.configure()
        fleet.run("pulumi", "stack", "init", stack)
        try:
            yield fleet
        finally:
            fleet.end()
