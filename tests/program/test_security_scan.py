"""Checkov on every resource of our stacks: it finds nothing that has no reason written here.

It reads a plan of Terraform, which is made from the graph on mocks. References between resources are lost on the way;
what it says of a resource that it cannot see with its parts is asserted here on the graph.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.paths import ROOT, fleet_dir
from tests.program.aws_graph import Graph, config_of, graph_of
from tests.program.terraform_plan import terraform_plan

LOCK = ROOT / "requirements" / "checkov.txt"
REASONS = {
    "CKV_AWS_18": "access logs of the cache: it holds weights that anyone may download, and configuration; data "
    "events of CloudTrail record who read what, where an account wants that",
    "CKV_AWS_91": "access logs of the balancer: a network balancer logs TLS handshakes alone; each gateway logs every "
    "request with the name of its key",
    "CKV_AWS_126": "detailed monitoring: Prometheus looks every few seconds, more often than CloudWatch at its best",
    "CKV_AWS_135": "EBS-optimized: every type that the catalog has is so, always",
    "CKV_AWS_144": "replication of the cache to another region: it is filled anew, by the same digests",
    "CKV_AWS_150": "deletion protection of the balancer: it holds no data, and `pulumi destroy` has to work",
    "CKV_AWS_158": "logs with a key of one's own: they are encrypted with AWS's; there are no prompts in them",
    "CKV_AWS_290": "`*` with writes: what the SSM agent says of its own machine has no narrower resource; all else "
    "names its resources (test_aws_security.py)",
    "CKV_AWS_355": "`*`: as CKV_AWS_290",
    "CKV2_AWS_11": "flow logs: `aws.network.flow-logs: true` makes them; they cost more than the rest of the network",
    "CKV2_AWS_34": "parameters in plain text: they are pointers, digests and ARNs; secrets are in Secrets Manager",
    "CKV2_AWS_57": "rotation of secrets: it holds SHA-256 hashes of keys that clients have: runbooks/rotate-keys.md",
    "CKV2_AWS_62": "events of the cache: what reads it is started by Pulumi, or by EventBridge",
    "CKV2_AWS_64": "policy of the key: without one, IAM of the account decides, and roles name the key",
}
"""By check of checkov: what it is about, and why not."""
SEEN_APART = {
    # What it says because it does not see which resource belongs to which; by the test below that does see.
    *(
        "CKV_AWS_21",
        "CKV_AWS_145",
        "CKV2_AWS_5",
        "CKV2_AWS_6",
        "CKV2_AWS_12",
        "CKV2_AWS_19",
        "CKV2_AWS_23",
        "CKV2_AWS_61",
    ),
}
PUBLIC: dict[str, Any] = {
    "aws": {"endpoint": "public", "clients": ["0.0.0.0/0"], "hosted-zone": "Z0123456789ABC"},
    "gateway": {"hosts": 2, "hostname": "llm.example.com"},
}
STACKS = {"dev": config_of("dev"), "prod": config_of("prod"), "prod, public": config_of("prod", **PUBLIC)}


def checkov() -> Path:
    """The scanner, in a virtual environment of its own: made on the first use, then kept."""
    folder = fleet_dir() / f"checkov-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"
    uv, python = str(Path(sys.prefix, "bin", "uv")), str(folder / "bin" / "python")
    with (fleet_dir() / "checkov.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            for step in (
                [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
                [uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "--no-deps", "-r", str(LOCK)],
            ):
                done = subprocess.run(step, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"checkov cannot be installed: {done.stderr.strip()[-300:]}")
            (folder / "complete").touch()
    return folder / "bin" / "checkov"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    found = {}
    for name, config in STACKS.items():
        with pytest.MonkeyPatch.context() as patch:
            found[name] = graph_of(patch, tmp_path_factory.mktemp("aws"), name.partition(",")[0], config)
    return found


@pytest.fixture(scope="module")
def failed(graphs: dict[str, Graph], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Resources by the check that they fail."""
    folder = tmp_path_factory.mktemp("plans")
    for number, graph in enumerate(graphs.values()):
        (folder / f"{number}.json").write_text(json.dumps(terraform_plan(graph), default=str))
    done = subprocess.run(
        [
            str(checkov()),
            "-d",
            str(folder),
            "--framework",
            "terraform_plan",
            "--skip-download",
            "--compact",
            "-o",
            "json",
        ],
        env={**os.environ, "LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    results = report["results"]
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 300  # it did read them
    found: dict[str, list[str]] = {}
    for check in results["failed_checks"]:
        found.setdefault(check["check_id"], []).append(f"{check['resource']}: {check['check_name']}")
    return found


def test_checkov_finds_nothing_without_a_reason(failed: dict[str, list[str]]) -> None:
    assert {check: where for check, where in failed.items() if check not in REASONS.keys() | SEEN_APART} == {}


def test_no_reason_is_left_over(failed: dict[str, list[str]]) -> None:
    assert REASONS.keys() | SEEN_APART == failed.keys()


def test_what_checkov_sees_apart_belongs_together(graphs: dict[str, Graph]) -> None:
    for graph in graphs.values():
        buckets = {f"{made.name}-id" for made in graph.of("Bucket")}
        for part in (
            *("BucketVersioning", "BucketServerSideEncryptionConfiguration", "BucketPublicAccessBlock"),
            "BucketLifecycleConfiguration",
        ):
            assert {made.inputs["bucket"] for made in graph.of(part)} == buckets, part
        (versioning,), (rules,) = graph.of("BucketVersioning"), graph.of("BucketServerSideEncryptionConfiguration")
        assert versioning.inputs["versioningConfiguration"]["status"] == "Enabled"
        assert rules.inputs["rules"][0]["applyServerSideEncryptionByDefault"]["sseAlgorithm"] == "aws:kms"
        (default,) = graph.of("DefaultSecurityGroup")
        assert default.inputs["vpcId"] == "vpc-id"
        assert not default.inputs.get("ingress")
        assert not default.inputs.get("egress")
        used = json.dumps([made.inputs for made in graph.resources if made.type != "SecurityGroup"], default=str)
        assert all(f'"{made.name}-id"' in used for made in graph.of("SecurityGroup"))
        assert all(f'"{made.name}-id"' in used for made in graph.of("Eip"))
        assert all(made.inputs.get("aliases") or made.inputs.get("records") for made in graph.of("Record"))
