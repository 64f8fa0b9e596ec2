"""An AWS that answers on loopback, and the real Pulumi engine working on it with a plugin over the real provider."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.config import Config

from infra.paths import ROOT, fleet_dir, toolchain_dir
from tests.shared import shared

REGION = "us-east-1"
TF_PLUGINS = Path("/opt/tf-plugins")
"""Where the Terraform provider is, if AWSBRIDGE_TF_PLUGINS does not say."""
LOCKED = ROOT / "requirements" / "moto.txt"
ENFORCING = Path(__file__).with_name("enforcing.py")
"""Starts the stand-in with an IAM that looks at resources: for keys that IAM gave out, not for those below."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": REGION}
PRIVATE = {"aws": {"rollout": "manual", "protect": False}}
"""For what the stand-in refuses, associations of State Manager, there is a way without them."""
PROD: dict[str, Any] = {
    "aws": {"rollout": "manual"},
    "api-keys": {"team-a": f"sha256:{'ab' * 32}"},
    "budget": {"usd_per_hour": 1000},
}
"""What the tests change of stacks/Pulumi.prod.yaml."""
NICE = ("nice", "-n", "10")
"""The machines of tests/aws/hosts boot beside this, and what they measure is seconds."""
IN_TIME_S = 600
"""After so long a step hangs: the slowest takes two minutes on two busy cores."""


def moto_python() -> Path:
    """The Python that has moto, in a virtual environment of its own: made on the first use, then kept."""
    folder = fleet_dir() / "aws" / f"moto-{hashlib.sha256(LOCKED.read_bytes()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "complete").exists():
            return python
        uv = str(Path(sys.prefix, "bin", "uv"))
        for step in (
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
            [
                uv,
                "pip",
                "install",
                "--quiet",
                "--python",
                str(python),
                "--require-hashes",
                "--no-deps",
                "-r",
                str(LOCKED),
            ],
        ):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(
                    f"moto cannot be installed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
                )
        (folder / "complete").touch()
    return python


def terraform_plugins() -> Path:
    """The folder of the Terraform AWS provider; skips the test where there is none."""
    folder = Path(os.environ.get("AWSBRIDGE_TF_PLUGINS") or TF_PLUGINS)
    if not any(folder.glob("**/terraform-provider-aws*")):
        pytest.skip(f"no Terraform AWS provider in {folder}: AWSBRIDGE_TF_PLUGINS names the folder")
    return folder


@dataclass(frozen=True)
class StandIn:
    """The stand-in, as long as it serves."""

    url: str

    def control(self, what: str, body: Any = None) -> Any:
        """Its own API: `left`, `calls`, `capacity`, `quota`, `faults`, `tick`."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/_ctl/{what}", data), timeout=60) as answer:
            return json.load(answer)

    def left(self) -> dict[str, list[str]]:
        """What exists, defaults aside."""
        found: dict[str, list[str]] = self.control("left")
        return found

    def client(self, service: str, **credentials: str) -> Any:
        """A client of one service."""
        fixed = Config(inject_host_prefix=False, s3={"addressing_style": "path"}, retries={"max_attempts": 1})
        given = credentials or {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client(service, region_name=REGION, endpoint_url=self.url, config=fixed, **given)


@contextlib.contextmanager
def stand_in(**environment: str) -> Iterator[StandIn]:
    """A stand-in on a free port, which has nothing in it."""
    command = [*NICE, str(moto_python()), str(ENFORCING), str(shared("aws/motoplus.py"))]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environment}
        ) as process,
    ):
        try:
            assert process.stdout
            url = process.stdout.readline().strip()  # printed once it answers
            if not url:
                process.wait()
                log.seek(0)
                pytest.fail(f"the stand-in does not start: {log.read().decode(errors='replace')[-2000:]}")
            yield StandIn(url)
        finally:
            process.kill()


@dataclass
class Stack:
    """A stack of this project on the stand-in: a project folder, a stack file and a state of its own."""

    name: str
    aws: StandIn
    folder: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.project = self.folder / "project"
        self.file = self.project / "stacks" / f"Pulumi.{self.name}.yaml"
        self.file.parent.mkdir(parents=True)
        (self.folder / "state").mkdir()
        # A copy: what is edited meanwhile is no part of the test.
        for name in ("infra", "nodeconfig", "toolchain", "images", "requirements", "runbooks", "policy"):
            if (ROOT / name).exists():
                shutil.copytree(ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Pulumi.yaml", "__main__.py", "pyproject.toml", "stacks/models.lock.yaml"):
            shutil.copy(ROOT / name, self.project / name)
        (self.project / ".venv").symlink_to(ROOT / ".venv")
        path = [str(shared("aws")), str(Path(sys.executable).parent), os.environ["PATH"], str(toolchain_dir() / "bin")]
        self.environment = {
            **os.environ,
            **CREDENTIALS,
            "PATH": os.pathsep.join(path),
            "AWS_ENDPOINT_URL": self.aws.url,
            "AWSBRIDGE_PYTHON": sys.executable,
            "AWSBRIDGE_TF_PLUGINS": str(terraform_plugins()),
            "FLEET_DIR": str(self.folder),
            "FLEET_STACKS": str(self.file.parent),
            "PULUMI_HOME": str(self.folder / "pulumi-home"),
            "PULUMI_BACKEND_URL": f"file://{self.folder}/state",
            "PULUMI_CONFIG_PASSPHRASE": "test",
            "PULUMI_SKIP_UPDATE_CHECK": "true",
            "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",
            "PYTHONDONTWRITEBYTECODE": "",
        }

    @property
    def config(self) -> dict[str, Any]:
        """What the stack file has now."""
        found: dict[str, Any] = yaml.safe_load(self.file.read_text())["config"]
        return found

    def write(self, config: Mapping[str, Any]) -> None:
        """The stack file; keys of ours need no `vllm-fleet:`."""
        keys = {key if ":" in key else f"vllm-fleet:{key}": value for key, value in config.items()}
        self.file.write_text(json.dumps({"config": keys}, indent=1))

    def change(self, keys: Mapping[str, Any]) -> None:
        """Keys of ours, anew."""
        self.write({**self.config, **{f"vllm-fleet:{key}": value for key, value in keys.items()}})

    def run(self, *command: str, fails: bool = False) -> str:
        """A command in the stack's environment; what it said.

        Raises:
            AssertionError: It failed, or was meant to and did not.
        """
        with subprocess.Popen(
            [*NICE, *command],
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                out, said = process.communicate(timeout=IN_TIME_S)
            except BaseException:
                process.terminate()  # pulumi ends its plugins and gives up its lock
                raise
        assert (process.returncode != 0) == fails, f"{' '.join(command)}: {process.returncode}\n{(out + said)[-8000:]}"
        return out if "--json" in command and not fails else out + said

    def pulumi(self, *arguments: str, fails: bool = False) -> str:
        """A pulumi command for this stack."""
        return self.run("pulumi", *arguments, "--stack", self.name, "--non-interactive", fails=fails)

    def up(self) -> str:
        return self.pulumi("up", "--yes", "--skip-preview", "--color=never")

    def preview(self, *arguments: str, fails: bool = False) -> str:
        return self.pulumi("preview", "--color=never", *arguments, fails=fails)

    def changes(self) -> dict[str, str]:
        """What an `up` would do: by `Type name` of each resource `create`, `update`, `replace` or `delete`.

        An update of tags alone is `retag`: nothing else comes of it.
        """
        found = {}
        for step in json.loads(self.preview("--json"))["steps"]:
            _, _, kinds, name = step["urn"].split("::")
            kind, what = kinds.split("$")[-1].split(":")[-1], step["op"]
            if what in {"same", "read"} or kind == "Stack":
                continue
            if what in {"create-replacement", "delete-replaced", "replace"}:
                what = "replace"
            paths = {path.partition("[")[0].partition(".")[0] for path in step.get("detailedDiff") or ()}
            found[f"{kind} {name}"] = "retag" if what == "update" and paths and paths <= {"tags", "tagsAll"} else what
        return dict(sorted(found.items()))

    @property
    def outputs(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.pulumi("stack", "output", "--json", "--show-secrets"))
        return found

    @property
    def state(self) -> dict[str, Any]:
        """The exported state, secrets encrypted."""
        found: dict[str, Any] = json.loads(self.pulumi("stack", "export"))
        return found


@contextlib.contextmanager
def a_stack(name: str, aws: StandIn, changes: Mapping[str, Any] | None = None) -> Iterator[Stack]:
    """A stack that is configured as stacks/Pulumi.NAME.yaml, with these keys changed, and not up."""
    if not shutil.which("pulumi", path=os.pathsep.join([os.environ["PATH"], str(toolchain_dir() / "bin")])):
        pytest.skip("pulumi is not installed: `make test` installs it")
    with tempfile.TemporaryDirectory(prefix="fleet-aws-", ignore_cleanup_errors=True) as folder:
        stack = Stack(name, aws, Path(folder))
        stack.file.write_text((ROOT / f"stacks/Pulumi.{name}.yaml").read_text())
        stack.change(changes or {})
        stack.run("pulumi", "stack", "init", name)
        yield stack
