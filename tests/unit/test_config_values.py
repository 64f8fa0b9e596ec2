"""Every key of a stack file: what it takes, and what is said of what it does not take."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from infra.config import Rung, parse

GPUS: dict[str, Any] = {"target": "aws", "models": {"m": {}}, "pools": {"p": {}}}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """A stack of AWS with one value."""
    raw = copy.deepcopy(GPUS)
    *parents, key = path.split("/")
    holder = raw
    for part in parents:
        holder = holder.setdefault(part, {})
    holder[key] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "read"),
    [
        ("models/m/quantization", "auto", "auto"),
        ("models/m/pool", "p", "p"),
        ("models/m/tensor-parallel-size", 4, 4),
        ("models/m/kv-cache-dtype", "fp8", "fp8"),
        ("models/m/gpu-memory-utilization", 0.5, 0.5),
        ("models/m/max-num-batched-tokens", 4096, 4096),
        ("models/m/enforce-eager", True, True),
        ("models/m/sleep", True, True),
        ("models/m/traffic/requests-per-month", 1_000_000, 1_000_000),
        ("models/m/traffic/prompt-tokens", 800, 800),
        ("models/m/traffic/answer-tokens", 200, 200),
        ("pools/p/gpu", "h100-80gb", "h100-80gb"),
        ("pools/p/instance", "p5.48xlarge", "p5.48xlarge"),
        ("pools/p/nodes", "auto", "auto"),
        ("pools/p/nodes", 1000, 1000),
        ("pools/p/capacity", ["spot"], [Rung(kind="spot")]),
        ("pools/p/zones", 6, 6),
        ("pools/p/disk", "1TB", 10**12),
        ("gateway/hosts", 3, 3),
        ("gateway/hostname", "llm.example.com", "llm.example.com"),
        ("gateway/hostname", "gateway", "gateway"),
        ("slo/tpot_p95", "60ms", 0.06),
        ("slo/availability", 99.9, 99.9),
        ("slo/availability", 99, 99),
        ("budget/usd_per_hour", 120, 120),
        ("budget/usd_per_month", 0.5, 0.5),
        ("prices/instances", {"p5.48xlarge": 50}, {"p5.48xlarge": 50}),
    ],
)
def test_a_value_is_read(path: str, value: Any, read: Any) -> None:
    config = parse(with_value(path, value))
    assert config.findings == ()
    found: Any = config
    for part in path.split("/"):
        found = found[part] if isinstance(found, dict) else getattr(found, part.replace("-", "_"))
    assert found == read


@pytest.mark.parametrize(
    ("path", "value", "problem", "fix"),
    [
        ("models/m/quantization", "gptq", "cannot be `gptq`", "write `4bit`"),
        ("models/m/pool", 7, "must be text, not 7", "in quotes"),
        ("models/m/tensor-parallel-size", 65, "is too large", "at most 64"),
        ("models/m/tensor-parallel-size", True, "must be a whole number, not true", "digits alone"),
        ("models/m/kv-cache-dtype", "fp16", "cannot be `fp16`", "one of: auto, fp8"),
        ("models/m/gpu-memory-utilization", "0.9", "must be a number, not `0.9`", "write 0.9"),
        ("models/m/gpu-memory-utilization", True, "must be a number, not true", "digits"),
        ("models/m/max-num-batched-tokens", "8k", "must be a whole number, not `8k`", "write 8192"),
        ("models/m/enforce-eager", "no", "must be true or false, not `no`", "write false"),
        ("models/m/sleep", 1, "must be true or false, not 1", "write true"),
        ("models/m/traffic", 100_000, "must be a mapping, not a number", "keys: requests-per-month, prompt-tokens"),
        ("models/m/traffic/requests-per-month", 0, "is too small", "at least 1"),
        ("models/m/traffic/prompt-token", 9, "unknown key", "did you mean `prompt-tokens`?"),
        ("models/m/traffic/answer-tokens", 1.5, "must be a whole number, not 1.5", "digits alone"),
        ("pools/p", "h100-80gb", "must be a mapping, not text", "write `p: {gpu: h100-80gb}`"),
        ("pools/p/gpu", ["h100-80gb"], "must be text, not a list", "one name"),
        ("pools/p/instance", 5, "must be text, not 5", "in quotes"),
        ("pools/p/nodes", "atuo", "cannot be `atuo`", "did you mean `auto`?"),
        ("pools/p/nodes", "4", "must be a whole number or `auto`, not `4`", "write 4"),
        ("pools/p/nodes", 0, "is too small", "at least 1"),
        ("pools/p/nodes", 1001, "is too large", "at most 1000"),
        ("pools/p/nodes", True, "must be a whole number or `auto`, not true", "1 to 1000"),
        ("pools/p/nodes", [2], "must be a whole number or `auto`, not a list", "1 to 1000"),
        ("pools/p/capacity", "spot", "must be a list, not text", "`[spot]`"),
        ("pools/p/capacity", {"spot": 0.6}, "must be a list, not a mapping", "in brackets"),
        ("pools/p/zones", 7, "is too large", "at most 6"),
        ("pools/p/disk", 500, "500 is not a size", "a whole number and one of B, kB"),
        ("pools/p/disk", "10MB", "is too small", "at least 1GB"),
        ("pools/p/gpus-per-node", 17, "is too large", "at most 16"),
        ("pools/p/usd_per_hour", 0, "is too small", "more than 0"),
        ("pools/p/usd_per_hour", "50 USD", "must be a number, not `50 USD`", "write 50"),
        ("gateway/hosts", 17, "is too large", "at most 16"),
        ("gateway/hostname", "http://a.b/c", "is not the name of a host", "write `a.b`"),
        ("gateway/hostname", "a..b", "is not the name of a host", "a name such as"),
        ("gateway/hostname", "x" * 64, "is not the name of a host", "a name such as"),
        ("gateway/hostname", "1.2.3.4", "is not the name of a host", "a name such as"),
        ("gateway/hostname", 5, "must be text, not 5", "a name such as"),
        ("slo/tpot_p95", 60, "60 is not a duration", "500ms, 30s"),
        ("slo/tpot_p95", "1m", "is too large", "at most 10s"),
        ("slo/availability", "three nines", "must be a number, not `three nines`", "digits"),
        ("slo/availability", 0.99, "is too small", "write 99"),
        ("budget", 120, "must be a mapping, not a number", "keys: usd_per_hour, usd_per_month"),
        ("budget/usd-per-hour", 120, "unknown key", "did you mean `usd_per_hour`?"),
        ("budget/usd_per_hour", float("inf"), "is not finite", "remove the line"),
        ("budget/usd_per_month", -1, "is too small", "more than 0"),
        ("prices/instances", ["p5.48xlarge"], "must be a mapping, not a list", "`NAME: …` lines"),
        ("prices/instances/p5.48xlarge", "free", "must be a number, not `free`", "digits"),
        ("prices/hosted/a", 5, "must be a mapping, not a number", "keys: input_usd_per_mtok"),
        ("regions", "us-east-1", "unknown key", "one of: target, models"),
        ("region", "us-east-1", "unknown key", "write `aws:region: …`"),
    ],
)
def test_a_value_is_refused(path: str, value: Any, problem: str, fix: str) -> None:
    (finding,) = parse(with_value(path, value)).findings
    assert finding.path == path.replace("/", ".")
    assert problem in finding.problem
    assert fix in finding.fix


RESERVATION = "cr-0123456789abcdef0"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("on-demand", Rung(kind="on-demand")),
        ("spot", Rung(kind="spot")),
        ({"spot": 1}, Rung.model_validate({"kind": "spot", "max-share": 1.0})),
        ({"spot": 0.6}, Rung.model_validate({"kind": "spot", "max-share": 0.6})),
        ({"reservation": RESERVATION}, Rung(kind="reservation", id=RESERVATION)),
        ({"capacity-block": RESERVATION}, Rung(kind="capacity-block", id=RESERVATION)),
        ({"capacity-block": True}, Rung(kind="capacity-block")),
    ],
)
def test_ways_to_get_nodes(written: Any, read: Rung) -> None:
    assert parse(with_value("pools/p/capacity", [written])).pools["p"].capacity == [read]


@pytest.mark.parametrize(
    ("rung", "fix"),
    [
        (None, "write `on-demand`"),
        ([], "write `on-demand`"),
        ({}, "write `on-demand`"),
        (0.6, "write `on-demand`"),
        ("Spot", "did you mean `spot`?"),
        ({"sport": 0.6}, "did you mean `spot`?"),
        ({"spot": True}, "a part of the on-demand price"),
        ({"spot": float("nan")}, "a part of the on-demand price"),
        ({"spot": -0.1}, "a part of the on-demand price"),
        ({"spot": 75}, "did you mean `{spot: 0.75}`?"),
        ({"spot": "75%"}, "write `{spot: 0.75}`"),
        ({"reservation": True}, "`cr-` and hex digits"),
        ({"reservation": "cr-XYZ"}, "`cr-` and hex digits"),
        ({"capacity-block": "cb-0"}, "once bought it is a reservation"),
        ({"capacity-block": False}, "`cr-` and hex digits"),
        ({"on-demand": True, "spot": 0.6}, "an item of the list for each"),
    ],
)
def test_no_ways_to_get_nodes(rung: Any, fix: str) -> None:
    config = parse(with_value("pools/p/capacity", ["spot", rung]))
    (finding,) = config.findings
    assert finding.path == "pools.p.capacity.1"
    assert fix in finding.fix
    assert config.pools["p"].capacity == [Rung(kind="on-demand")]  # a ladder without one rung is another ladder


def test_what_was_misspelt_beyond_doubt_is_checked_as_what_was_meant() -> None:
    raw = {"target": "aws", "models": {"Chat": {"wieghts": 7, "pool": "H100"}}, "pools": {"H100": {"zone": 9}}}
    config = parse(raw)
    assert [(finding.path, finding.problem) for finding in config.findings] == [
        ("models.Chat", "cannot be a name"),
        ("models.Chat.wieghts", "must be text, not 7"),
        ("models.Chat.wieghts", "unknown key"),
        ("pools.H100", "cannot be a name"),
        ("pools.H100.zone", "is too large"),
        ("pools.H100.zone", "unknown key"),
    ]
    assert config.models["chat"].pool == "h100"


def test_a_name_that_is_there_is_not_taken_by_a_misspelt_one() -> None:
    config = parse({"target": "local", "models": {"small": {"context": 1024, "contxt": 2048}}})
    assert [finding.path for finding in config.findings] == ["models.small.contxt"]
    assert config.models["small"].context == 1024


@pytest.mark.parametrize(
    ("target", "stands_in"), [("k8s", "kubernetes"), ("AWS", "aws"), ("loca", "local"), (7, "aws")]
)
def test_a_target_that_is_none_has_a_stand_in(target: Any, stands_in: str) -> None:
    config = parse(GPUS | {"target": target})
    assert [finding.path for finding in config.findings] == ["target"]
    assert config.target == stands_in


def test_a_pool_is_used_by_the_model_that_names_none() -> None:
    two = {"target": "aws", "models": {"m": {"pool": "p"}}, "pools": {"p": {}, "q": {}}}
    assert [finding.path for finding in parse(two).findings] == ["pools.q"]
    assert parse(two | {"models": {"m": {"pool": "p"}, "n": {}}}).findings == ()
    assert parse(two | {"models": {"m": {"pool": "r"}}}).findings == ()  # a pool that is not there: the plan says it


def test_credentials_are_found_wherever_they_are() -> None:
    token = "hf_" + "a1" * 17
    raw = copy.deepcopy(GPUS) | {"slo": {"ttft_p95": [f"Bearer {token}"], token: 1}, token: {}}
    config = parse(raw)
    assert len(config.findings) == 3
    assert token not in str(config.findings)
    assert all("plain text" in finding.problem for finding in config.findings)


def test_what_is_encrypted_is_not_in_plain_text() -> None:
    config = parse(copy.deepcopy(GPUS) | {"hf-token": {"secure": "v1:abc"}})
    assert [(finding.path, finding.problem) for finding in config.findings] == [("hf-token", "unknown key")]


def test_a_key_that_looks_like_pydantic_s_mark_is_a_key() -> None:
    config = parse({"target": "local", "models": {"small": {"[key]": 1}, "[key]": {}}, "[key]": []})
    assert [(finding.path, finding.problem) for finding in config.findings] == [
        ("[key]", "unknown key"),
        ("models.[key]", "cannot be a name"),
        ("models.small.[key]", "unknown key"),
    ]
