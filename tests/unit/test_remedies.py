"""What a refusal proposes is accepted; it is one change where one is enough, else several together."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from infra.config import parse
from infra.findings import ConfigError, Finding
from tests.unit.inputs import plan_of

CHANGE = re.compile(r"`([\w.-]+): ([\w.-]+)`")
OF_POOLS = {"gpu", "instance"}


def stack(model: dict[str, Any], target: str = "aws", **pool: Any) -> dict[str, Any]:
    pool = {key.replace("_", "-"): value for key, value in pool.items()}
    return {"target": target, "models": {"chat": model}, "pools": {"p": pool}}


def refused(config: dict[str, Any]) -> Finding:
    with pytest.raises(ConfigError) as error:
        plan_of(parse(copy.deepcopy(config)).in_region("us-east-1"))
    (finding,) = error.value.findings
    return finding


def changed(config: dict[str, Any], words: str) -> dict[str, Any]:
    """A stack with what one proposal says."""
    config = copy.deepcopy(config)
    if "in place of `instance`" in words:
        del config["pools"]["p"]["instance"]
    for key, value in CHANGE.findall(words):
        part = config["pools"]["p"] if key in OF_POOLS else config["models"]["chat"]
        part[key] = int(value) if value.isdigit() else value
    return config


LLAMA, LARGE, QWEN = "llama-3.1-8b-instruct", "llama-3.3-70b-instruct", "qwen2.5-7b-instruct"


@pytest.mark.parametrize(
    ("config", "path", "proposals"),
    [
        (stack({"weights": QWEN, "tensor-parallel-size": 8}, gpu="h100-80gb"), "tensor-parallel-size", 1),
        (stack({"weights": QWEN, "tensor-parallel-size": 3}, gpu="h100-80gb"), "tensor-parallel-size", 1),
        (stack({"weights": LARGE, "tensor-parallel-size": 1}, gpu="h100-80gb"), "weights", 2),
        (stack({"weights": LARGE}, instance="g6.2xlarge"), "weights", 1),
        (stack({"weights": LARGE, "quantization": "8bit"}, instance="g6e.2xlarge"), "weights", 2),
        (stack({"weights": LARGE, "tensor-parallel-size": 1}, gpu="l4-24gb"), "weights", 1),
        (stack({"weights": LLAMA, "context": 131072, "tensor-parallel-size": 1}, gpu="l4-24gb"), "context", 3),
        (stack({"weights": LLAMA, "concurrency": 1024, "tensor-parallel-size": 1}, gpu="a100-40gb"), "concurrency", 1),
        (stack({"weights": LARGE}, "kubernetes", gpu="l4-24gb", gpus_per_node=4), "weights", 1),
        (stack({"weights": LARGE, "tensor-parallel-size": 1}, "kubernetes", gpu="a100-40gb"), "weights", 1),
        (stack({"weights": "mistral-7b-instruct-v0.3", "quantization": "4bit"}, gpu="h100-80gb"), "quantization", 1),
    ],
)
def test_each_proposal_is_accepted(config: dict[str, Any], path: str, proposals: int) -> None:
    finding = refused(config)
    assert finding.path == f"models.chat.{path}"
    said = finding.fix.partition(";")[0].removeprefix("would fit: ").split(", or ")
    assert len(said) >= proposals, finding.fix
    for words in said:
        assert CHANGE.search(words), finding.fix
        plan_of(parse(changed(config, words)).in_region("us-east-1"))


def test_several_changes_are_proposed_only_where_none_alone_is_enough() -> None:
    together = refused(stack({"weights": LARGE, "tensor-parallel-size": 1}, gpu="l4-24gb"))
    assert "` and `" in together.fix
    assert "` and `" not in refused(stack({"weights": LARGE, "tensor-parallel-size": 1}, gpu="h100-80gb")).fix


def test_a_cluster_is_not_told_to_have_other_gpus() -> None:
    assert "gpu:" not in refused(stack({"weights": LARGE}, "kubernetes", gpu="l4-24gb", gpus_per_node=4)).fix


def test_where_nothing_fits_that_is_said() -> None:
    finding = refused(stack({"weights": LARGE}, "kubernetes", gpu="l4-24gb", gpus_per_node=1))
    assert finding.fix == "a smaller model, or other GPUs"


def test_the_pool_is_called_by_its_name() -> None:
    finding = refused(stack({"weights": LLAMA}, gpu="h200-141gb", disk="20GB"))
    assert finding.path == "pools.p.disk"
