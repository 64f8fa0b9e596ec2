"""The stack `prod`, deployed once: what edits of it would change, what is reported, what is left when it goes.

golden/edits.txt is a table of edits: exactly which resources each updates or replaces, by `pulumi preview`, and which
machines it moves. Machines move in two ways: where a bundle changes, those that run take it up, one at a time; where a
launch template changes, a group replaces its machines. Both drain before they stop.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.aws import rights
from tests.aws.standin import PROD, REGION, Stack, a_stack, stand_in

pytestmark = pytest.mark.timeout(1800)  # beside machines that boot, on two cores
GOLDEN = Path(__file__).with_name("golden") / "edits.txt"
KEY_HASH = "ab" * 32
Config = dict[str, Any]
Edit = Callable[[Config], None]


def put(section: str, name: str = "", **changes: Any) -> Edit:
    """Change keys of a section, or of what has a name in it."""

    def change(config: Config) -> None:
        part = config.setdefault(f"vllm-fleet:{section}", {})
        part = part[name] if name else part
        part.update({key.replace("_", "-"): value for key, value in changes.items()})

    return change


def promise(config: Config) -> None:
    config["vllm-fleet:slo"]["ttft_p95"] = "3s"


EDITS: dict[str, Edit] = {
    "engines of fast: 4 -> 8, which the node has GPUs for": put("models", "fast", engines=8),
    "engines of chat: 4 -> 8, which need another node": put("models", "chat", engines=8),
    "another model": put("models", "fast", weights="qwen2.5-14b-instruct"),
    "quantisation: none -> 8bit": put("models", "fast", quantization="8bit"),
    "context: 16384 -> 8192": put("models", "chat", context=8192),
    "another API key": put("api-keys", **{"team-b": f"sha256:{'cd' * 32}"}),
    "alert threshold: time to the first token 2s -> 3s": promise,
    "routing: least-loaded -> round-robin": put("gateway", routing="round-robin"),
    "gateways: 2 -> 3": put("gateway", hosts=3),
    "another instance type": put("pools", "a100", gpu="a100-80gb"),
    "root volume: 100 -> 300 GB": put("pools", "a100", disk="300GB"),
    "a tag of the user's": put("aws", tags={"team": "ml"}),
    "other clients": put("aws", clients=["10.0.0.0/8"]),
    "a rung more": put("pools", "h100", capacity=["on-demand", {"spot": 0.6}]),
    "an image that is named": put("aws", images={"gateway": "ami-0b0000000000022a4"}),
}


@pytest.fixture(scope="module")
def prod() -> Iterator[Stack]:
    """Up, while there is no p5.48xlarge to be had."""
    with stand_in() as aws, a_stack("prod", aws, PROD) as stack:
        aws.control("capacity", {"p5.48xlarge": {f"{REGION}{letter}": 0 for letter in "abcdef"}})
        stack.up()
        yield stack


def moves(changes: Mapping[str, str]) -> Iterator[str]:
    """Which machines drain because of these changes."""
    for what, how in changes.items():
        kind, _, name = what.partition(" ")
        if kind == "BucketObjectv2" and name.startswith("bundle-") and how == "replace":
            yield f"{name.removeprefix('bundle-')}: takes up another bundle"
        if kind == "LaunchTemplate" and how == "update":
            yield f"{name}: the group replaces its machines"
        if kind in {"Group", "Instance"} and how in {"replace", "delete"}:
            yield f"{name}: machines end" if how == "delete" else f"{name}: is replaced"


def test_each_edit_changes_exactly_what_it_must(prod: Stack, golden: Callable[[Path, str], None]) -> None:
    before, table = prod.config, []
    for what, edit in EDITS.items():
        config = json.loads(json.dumps(before))
        edit(config)
        prod.write(config)
        changes = prod.changes()
        table += [what, *(f"    {how:8}{name}" for name, how in changes.items())]
        table += [f"    -> {move}" for move in moves(changes)] or ["    -> no machine moves"]
    prod.write(before)
    golden(GOLDEN, "\n".join(table) + "\n")


def test_nothing_changes_without_an_edit_and_nothing_drifts(prod: Stack) -> None:
    assert prod.changes() == {}
    prod.pulumi("refresh", "--yes", "--skip-preview", "--expect-no-changes")


def test_a_rung_without_capacity_is_reported_and_not_fatal(prod: Stack) -> None:
    groups = prod.aws.client("autoscaling")
    found = {it["AutoScalingGroupName"]: it for it in groups.describe_auto_scaling_groups()["AutoScalingGroups"]}

    assert found["fleet-prod-engine-h100-on-demand"]["Instances"] == []
    assert len(found["fleet-prod-engine-a100-on-demand"]["Instances"]) == 1
    said = groups.describe_scaling_activities(AutoScalingGroupName="fleet-prod-engine-h100-on-demand")["Activities"]
    assert "sufficient p5.48xlarge capacity" in said[0]["StatusMessage"]


def test_no_secret_is_in_the_state_or_in_what_machines_are_told(prod: Stack) -> None:
    assert KEY_HASH not in json.dumps(prod.state)
    ec2 = prod.aws.client("ec2")
    for template in ec2.describe_launch_templates()["LaunchTemplates"]:
        (version,) = ec2.describe_launch_template_versions(
            LaunchTemplateId=template["LaunchTemplateId"], Versions=["$Latest"]
        )["LaunchTemplateVersions"]
        assert KEY_HASH not in base64.b64decode(version["LaunchTemplateData"]["UserData"]).decode()
    bucket = prod.aws.left()["s3:bucket"][0]
    s3 = prod.aws.client("s3")
    for item in s3.list_objects_v2(Bucket=bucket)["Contents"]:
        assert KEY_HASH.encode() not in s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()


def test_each_role_can_do_its_work_and_nothing_else(prod: Stack) -> None:
    wrong = []
    for role, (own, others) in rights.work(prod).items():
        credentials = rights.keys(prod, role)
        for calls, allowed in ((own, True), (others, False)):
            wrong += [
                f"{role} {'cannot' if allowed else 'can'} {rights.shown(it)}"
                for it in calls
                if rights.may(prod, credentials, it) != allowed
            ]
    assert wrong == []


def test_what_holds_data_is_left_and_nothing_else(prod: Stack) -> None:
    """The last one: it destroys the stack."""
    prod.pulumi("destroy", "--yes", "--skip-preview", "--exclude-protected")
    left = prod.aws.left()
    assert {kind: len(names) for kind, names in left.items()} == {"s3:bucket": 1, "kms:key": 1, "ec2:volume": 1}
