"""Whatever is written in a stack file: a plan that is whole, or findings that say what to do. Never a traceback."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.catalog import gpus, instances
from infra.config import parse
from infra.config.shape import keys, type_at
from infra.findings import ConfigError, Finding
from infra.plan.model import FleetPlan
from tests.unit.inputs import GPU_LOCK, a_lock, plan_of

REGIONS = (None, "us-east-1", "eu-west-1", "us-east-2", "mars-1", "")
STACKS: dict[str, dict[str, Any]] = {
    "local": {
        "target": "local",
        "models": {
            "chat": {"weights": "small", "context": 4096, "concurrency": 4, "max-answer": 512, "tool-calls": "hermes"},
            "code": {"weights": "small", "quantization": "8bit", "engines": 1, "typical-tokens": 512},
        },
        "gateway": {"routing": "round-robin", "max-body": "1MiB"},
        "api-keys": {"team-a": f"sha256:{'a' * 64}"},
        "slo": {"ttft_p95": "5s"},
        "local": {"base-port": 20000, "ports": {"gateway": 20500}},
    },
    "aws": {
        "target": "aws",
        "models": {
            "chat": {
                "weights": "llama-3.1-8b-instruct",
                "quantization": "8bit",
                "context": 16384,
                "concurrency": 64,
                "pool": "h100",
                "engines": 4,
                "kv-cache-dtype": "fp8",
                "gpu-memory-utilization": 0.9,
                "max-num-batched-tokens": 8192,
            },
            "big": {
                "weights": "llama-3.3-70b-instruct",
                "quantization": "4bit",
                "tensor-parallel-size": 2,
                "max-answer": 2048,
                "pool": "h100",
                "sleep": True,
                "traffic": {"requests-per-month": 1_000_000, "prompt-tokens": 800, "answer-tokens": 200},
            },
            "code": {"weights": "qwen2.5-7b-instruct", "quantization": "auto", "enforce-eager": True, "pool": "small"},
        },
        "pools": {
            "h100": {
                "gpu": "h100-80gb",
                "instance": "p5.48xlarge",
                "capacity": [{"reservation": "cr-0123456789abcdef0"}, "on-demand", {"spot": 0.6}],
                "zones": 2,
                "nodes": 3,
                "usd_per_hour": 50.0,
            },
            "small": {"gpu": "l4-24gb", "nodes": "auto", "disk": "300GB"},
        },
        "gateway": {"hosts": 2, "hostname": "llm.example.com"},
        "slo": {"ttft_p95": "1s", "tpot_p95": "60ms", "availability": 99.9},
        "budget": {"usd_per_hour": 400, "usd_per_month": 300_000.0},
        "prices": {
            "hosted": {"ours/large": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 4}},
            "instances": {"g6.xlarge": 0.7},
        },
    },
    "kubernetes": {
        "target": "kubernetes",
        "models": {
            "chat": {"weights": "mistral-7b-instruct-v0.3", "context": 8192, "pool": "gpus", "concurrency": 16},
            "moe": {"weights": "mixtral-8x7b-instruct-v0.1", "tensor-parallel-size": 4, "engines": 3, "pool": "gpus"},
        },
        "pools": {"gpus": {"gpu": "a100-80gb", "gpus-per-node": 8, "nodes": 4, "usd_per_hour": 20}},
        "budget": {"usd_per_month": 100_000},
    },
}
MINIMAL: dict[str, dict[str, Any]] = {
    "local": {"target": "local", "models": {"small": None}},
    "aws": {"target": "aws", "models": {"llama-3.1-8b-instruct": {}}},
    "kubernetes": {
        "target": "kubernetes",
        "models": {"qwen2.5-7b-instruct": {}},
        "pools": {"a": {"gpu": "l40s-48gb"}},
    },
}

# What is put in place of a value.

EXTREME = st.sampled_from(
    [
        *(0, -1, 1, 2, 3, 7, 127, 128, 1023, 10**5, 10**6, 10**7, 10**12, 2**31, 2**63, 2**64, 10**30),
        *(0.0, -0.0, 1e-9, 0.1, 0.5, 0.98, 1.0, 1.5, 99.9, 1e9, 1e308, math.inf, -math.inf, math.nan),
    ]
)
WORD = st.sampled_from(
    [
        *(*gpus(), *instances(), *GPU_LOCK.models, *a_lock().models, "none", "8bit", "4bit", "auto", "fp8", "hermes"),
        *("on-demand", "spot", "0s", "1ms", "600s", "10m", "1B", "1GB", "64TiB", "yes", "", " ", "\n", "\ud800", "é"),
    ]
)
SINGLE = EXTREME | WORD | st.none() | st.booleans() | st.text(max_size=9) | st.integers() | st.dates()
VALUE = (
    SINGLE
    | st.lists(SINGLE, max_size=3)
    | st.dictionaries(st.text(max_size=6) | st.integers() | st.none(), SINGLE, max_size=2)
    | st.sampled_from([{"secure": "v1:abc"}, {"spot": 0.5}, {"reservation": "cr-0"}, {"capacity-block": True}, [], {}])
)

# Changes of a config.

Path = tuple[Any, ...]


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """Of everything in a config but itself."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*at, key))


def holder(config: Any, path: Path) -> Any:
    for part in path[:-1]:
        config = config[part]
    return config


def get(config: Any, path: Path) -> Any:
    return holder(config, path)[path[-1]]


RENAMED = ("wieghts", "Pool", "GPU", "max_answer", "model", "nodes", "a b", "x" * 60, "sk-live-0123456789abcdefABCDEF")
Draw = Callable[[st.SearchStrategy[Any]], Any]


def delete(config: Any, path: Path, _: Draw) -> None:
    del holder(config, path)[path[-1]]


def replace(config: Any, path: Path, draw: Draw) -> None:
    holder(config, path)[path[-1]] = draw(VALUE)


def extreme(config: Any, path: Path, draw: Draw) -> None:
    holder(config, path)[path[-1]] = draw(EXTREME)


def nudge(config: Any, path: Path, draw: Draw) -> None:
    """Another number of the same kind: most of these are valid."""
    old = get(config, path)
    if isinstance(old, int | float) and not isinstance(old, bool):
        holder(config, path)[path[-1]] = draw(st.sampled_from([old * 2, old // 2, old + 1, old * 10, max(1, old - 1)]))


def retype(config: Any, path: Path, draw: Draw) -> None:
    old = get(config, path)
    holder(config, path)[path[-1]] = draw(st.sampled_from([str(old), [old], {"a": old}, {path[-1]: old}, [[]]]))


def rename(config: Any, path: Path, draw: Draw) -> None:
    where = holder(config, path)
    if isinstance(where, dict):
        where[draw(st.text(max_size=8) | st.sampled_from(RENAMED))] = where.pop(path[-1])


def duplicate(config: Any, path: Path, draw: Draw) -> None:
    where = holder(config, path)
    if isinstance(where, dict):
        where[draw(st.sampled_from(["second", "third", *RENAMED]))] = copy.deepcopy(where[path[-1]])
    else:
        where.append(copy.deepcopy(where[path[-1]]))


def swap(config: Any, path: Path, draw: Draw) -> None:
    other = draw(st.sampled_from(list(paths(config))))
    if path[: len(other)] != other[: len(path)]:  # neither is in the other
        one, two = get(config, path), get(config, other)
        holder(config, path)[path[-1]], holder(config, other)[other[-1]] = two, one


def add(config: Any, path: Path, draw: Draw) -> None:
    """A key that can be there."""
    part, known = get(config, path), keys(type_at(path))
    if isinstance(part, dict) and known:
        part[draw(st.sampled_from(known))] = draw(VALUE)


CHANGES = (delete, replace, extreme, nudge, nudge, retype, rename, duplicate, swap, add)


@st.composite
def broken(draw: Draw, target: str) -> dict[str, Any]:
    """A valid config in which a few things were changed."""
    config: dict[str, Any] = copy.deepcopy(draw(st.sampled_from([STACKS[target], STACKS[target], MINIMAL[target]])))
    for change in draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=4)):
        if there := list(paths(config)):
            change(config, draw(st.sampled_from(there)), draw)
    return config


QUICK = settings(derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
"""The same examples every time: what they find is found for everybody."""
FEW = settings(QUICK, max_examples=40)
"""Plans of AWS take a tenth of a second each, as everything that it offers is compared."""


def planned(raw: Any, region: str | None) -> FleetPlan | None:
    """The plan, whole; or nothing, if there are findings and each of them helps."""
    try:
        plan = plan_of(parse(raw).in_region(region), "test")
    except ConfigError as error:
        check(error.findings)
        return None
    text = plan.model_dump_json()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert FleetPlan.model_validate_json(text) == plan
    models = set(raw["models"])
    assert {model.name for model in plan.models} == models
    if plan.target == "local":
        assert {engine.model for engine in plan.engines} == models
    else:
        assert {engines.model for engines in plan.engine_sets} == models
        assert {model for pool in plan.pools for model, _ in pool.engines} == models
    return plan


def check(findings: Sequence[Finding]) -> None:
    assert findings
    for finding in findings:
        text = f"{finding.path}: {finding.problem}: {finding.fix}"
        assert finding.path, text
        assert finding.problem, text
        assert finding.fix, text
        assert text.isprintable(), text
        assert "sk-live-0" not in text


@pytest.mark.parametrize("target", STACKS)
@pytest.mark.parametrize("stack", [STACKS, MINIMAL])
def test_what_is_broken_below_was_whole(stack: dict[str, Any], target: str) -> None:
    assert planned(stack[target], "us-east-1")


@QUICK
@given(broken("local"))
def test_broken_local_stacks(raw: dict[str, Any]) -> None:
    planned(raw, None)


@FEW
@given(broken("aws"), st.sampled_from(REGIONS))
def test_broken_stacks_of_aws(raw: dict[str, Any], region: str | None) -> None:
    planned(raw, region)


@QUICK
@given(broken("kubernetes"))
def test_broken_stacks_of_kubernetes(raw: dict[str, Any]) -> None:
    planned(raw, None)


# Anything at all.

PARTS: tuple[Path, ...] = ((), ("models", "m"), ("models", "m", "traffic"), ("pools", "p"), ("slo",), ("gateway",))
KEY = st.sampled_from(sorted({key for part in PARTS for key in keys(type_at(part))})) | st.text(max_size=5)
TREE = st.recursive(
    SINGLE,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEY | st.integers() | st.binary(max_size=2), inner, max_size=4)
    ),
    max_leaves=12,
)


@QUICK
@given(st.dictionaries(KEY, TREE, max_size=5), st.sampled_from(list(STACKS)))
def test_anything_at_all(raw: dict[Any, Any], target: str) -> None:
    planned({"target": target, **raw}, "us-east-1")


@QUICK
@given(st.dictionaries(st.sampled_from(["chat", "B", "c d"]), st.dictionaries(KEY, TREE, max_size=5), min_size=1))
def test_models_of_anything(models: dict[Any, Any]) -> None:
    planned({"target": "aws", "models": models, "pools": {"p": {"instance": "g6.xlarge"}}}, "us-east-1")
