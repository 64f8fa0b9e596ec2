"""The policy pack in the real engine, in a preview against the stand-in."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra.paths import ROOT, fleet_dir
from tests.aws.standin import Stack, StandIn, a_stack

LOCK = ROOT / "requirements" / "policy.txt"


def policy_python() -> Path:
    """The virtual environment of the pack: made on the first use from its lock, then kept."""
    folder = fleet_dir() / f"policy-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"
    uv = str(Path(sys.prefix, "bin", "uv"))
    with (fleet_dir() / "policy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            python = str(folder / "bin" / "python")
            for step in (
                [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
                [uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "--no-deps", "-r", str(LOCK)],
            ):
                done = subprocess.run(step, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"pulumi-policy cannot be installed: {done.stderr.strip()[-300:]}")
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack, with a virtual environment that is there."""
    folder = tmp_path_factory.mktemp("policy")
    for name in ("__main__.py", "rules.py"):
        (folder / name).symlink_to(ROOT / "policy" / name)
    project = yaml.safe_load((ROOT / "policy/PulumiPolicy.yaml").read_text())
    project["runtime"]["options"]["virtualenv"] = str(policy_python())
    (folder / "PulumiPolicy.yaml").write_text(yaml.safe_dump(project))
    return folder


@pytest.fixture(scope="module")
def stack(aws: StandIn) -> Iterator[Stack]:
    with a_stack("dev", aws) as made:
        found = shutil.which("pulumi-language-python", path=made.environment["PATH"])
        host = Path(found).resolve().with_name("language_host.py") if found else None
        if host and host.exists() and "RunPlugin" not in host.read_text():
            pytest.skip("the language host beside this pulumi runs no plugins: `make test` installs one that does")
        yield made


def test_our_own_stack_passes_every_rule(stack: Stack, pack: Path) -> None:
    said = stack.preview("--policy-pack", str(pack))

    assert "vllm-fleet@" in said
    assert "[mandatory]" not in said
    assert "[advisory]" not in said  # which is how the engine says that a rule could not run


def test_a_fleet_over_the_budget_and_without_the_companys_tags_is_refused(
    stack: Stack, pack: Path, tmp_path: Path
) -> None:
    wanted = tmp_path / "wanted.json"
    wanted.write_text(json.dumps({"budget": {"usd_per_hour": 0.5}, "tags": {"required": ["team"]}}))

    said = stack.preview("--policy-pack", str(pack), "--policy-pack-config", str(wanted), fails=True)

    assert "the fleet costs $0.93 an hour, and may cost $0.5" in said
    assert "cache has no tag team" in said
    assert "[mandatory]" in said
