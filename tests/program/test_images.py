"""The pipelines that make images, on mocks: the stand-in for AWS refuses Image Builder, so arguments are proven here.

What their components do is proven in tests/aws/hosts/test_images_on_host.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from typing import Any

import pulumi
import pytest

from infra.catalog import bakes
from infra.config import from_pulumi
from infra.planning import plan_config
from infra.targets.aws.bakery import Bakery, parameter, version
from infra.targets.aws.cache import Cache
from infra.targets.aws.identity import Account
from infra.targets.aws.site import Site
from infra.weights import load
from tests.program.aws_graph import ACCOUNT, Graph, config_of
from tests.program.test_graph import close_event_loops

ROLES = ("engine", "gateway", "monitor")


@pytest.fixture(scope="module")
def graph() -> Graph:
    """What a bakery declares for the stack prod."""
    texts = {key: it if isinstance(it, str) else json.dumps(it) for key, it in config_of("prod").items()}
    wanted = from_pulumi(texts)
    site = Site.of(plan_config("prod", wanted, load(), wanted.api_keys))
    made = Graph()

    def program() -> None:
        account = Account("aws", ACCOUNT, site.region)
        bakery = Bakery("images", site, account, Cache("cache", site), "subnet-1", "sg-1")
        pulumi.Output.all(**bakery.commands).apply(made.exports.update)

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        pulumi.runtime.set_mocks(made, project="vllm-fleet", stack="prod")
        until_settled: Any = pulumi.runtime.test
        until_settled(program)()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        close_event_loops()
    return made


def test_on_mocks_as_the_stand_in_refuses_image_builder_each_role_has_a_pipeline_of_its_parts(graph: Graph) -> None:
    assert sorted(made.name for made in graph.of("ImagePipeline")) == [f"image-{role}" for role in ROLES]
    for role in ROLES:
        inputs = graph.one("ImagePipeline", f"image-{role}").inputs
        for argument, kind in (
            ("imageRecipeArn", "ImageRecipe"),
            ("infrastructureConfigurationArn", "InfrastructureConfiguration"),
            ("distributionConfigurationArn", "DistributionConfiguration"),
        ):
            assert inputs[argument] == f"arn:aws:any:us-east-1:{ACCOUNT}:{kind}/image-{role}"
        assert "schedule" not in inputs  # a new image is somebody's decision
        assert graph.exports[role].endswith(f"ImagePipeline/image-{role}")


def test_on_mocks_the_id_of_the_image_goes_into_a_parameter_that_image_builder_may_write(graph: Graph) -> None:
    for role in ROLES:
        (where,) = graph.one("DistributionConfiguration", f"image-{role}").inputs["distributions"]
        assert where["ssmParameterConfigurations"] == [
            {"parameterName": f"/imagebuilder/vllm-fleet/prod/{role}", "dataType": "aws:ec2:image"}
        ]
        assert where["region"] == "us-east-1"
        name = where["amiDistributionConfiguration"]["name"]
        assert "{{ imagebuilder:buildDate }}" in name  # two images cannot have one name
        written = from_pulumi(
            {
                **{k: v if isinstance(v, str) else json.dumps(v) for k, v in config_of("prod").items()},
                "vllm-fleet:aws": json.dumps({"images": {role: parameter("prod", role)}}),
            }
        )
        assert getattr(written.aws.images, role) == parameter("prod", role)


def test_on_mocks_recipes_have_their_components_in_order_and_an_encrypted_root(graph: Graph) -> None:
    for role, row in bakes.images().items():
        inputs = graph.one("ImageRecipe", f"image-{role}").inputs
        assert inputs["parentImage"] == f"ssm:{row.parent}"
        arns = [it["componentArn"].rpartition("/")[2] for it in inputs["components"]]
        assert arns == [f"image-{name}" for name in row.components]
        (root,) = inputs["blockDeviceMappings"]
        assert root["deviceName"] == row.root
        assert root["ebs"]["encrypted"] == "true"
        assert inputs["systemsManagerAgent"] == {"uninstallAfterBuild": False}


def test_on_mocks_a_machine_that_builds_gets_the_locks_by_their_digest_and_may_do_little_else(graph: Graph) -> None:
    stored = graph.one("BucketObjectv2", "image-files").inputs
    digest = hashlib.sha256(stored["content"].encode()).hexdigest()
    assert stored["key"] == f"runtime/{digest}.json"
    given = {
        it["name"]: it["value"] for it in graph.one("ImageRecipe", "image-engine").inputs["components"][0]["parameters"]
    }
    assert given == {"Source": f"s3://cache-bucket/runtime/{digest}.json", "Sha256": digest}
    (rights,) = graph.of("RolePolicy")
    statements = json.loads(rights.inputs["policy"])["Statement"]
    actions = {action for statement in statements for action in statement["Action"]}
    assert not any("*" in action for action in actions)
    anywhere = {action for it in statements if it["Resource"] == "*" for action in it["Action"]}
    assert {action.split(":")[0] for action in anywhere} == {"ssm", "ssmmessages", "ec2messages"}
    assert f"runtime/{digest}.json" in rights.text
    for made in graph.of("InfrastructureConfiguration"):
        assert made.inputs["instanceMetadataOptions"] == {"httpTokens": "required", "httpPutResponseHopLimit": 1}
        assert made.inputs["terminateInstanceOnFailure"] is True
        assert (made.inputs["subnetId"], made.inputs["securityGroupIds"]) == ("subnet-1", ["sg-1"])


def test_on_mocks_everything_has_the_fleets_tags_and_documents_fit_into_a_request(graph: Graph) -> None:
    for made in graph.resources:
        if made.kind.startswith("aws:imagebuilder"):
            assert {"vllm-fleet:stack", "vllm-fleet:role"} <= set(made.inputs["tags"]), made.name
    for made in graph.of("Component"):
        assert len(made.inputs["data"]) <= 16_000
        assert made.inputs["platform"] == "Linux"


def test_content_that_changes_has_another_version_of_the_form_that_image_builder_takes() -> None:
    assert version("a") != version("b")
    assert version("a", "b") != version("ab")
    for text in ("a", "b", ""):
        assert re.fullmatch(r"1\.0\.\d+", version(text))
        assert int(version(text).rpartition(".")[2]) < 2**30
