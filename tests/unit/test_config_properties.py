"""Reading a config, whatever it is: the same from a file and from Pulumi, nothing changed, no secret shown."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from infra.config import NAMESPACE, from_pulumi, parse
from infra.findings import ConfigError, Finding
from infra.paths import ROOT
from infra.stack_file import load_stack_file
from tests.unit.inputs import plan_of

REGION = "us-east-1"
LOCAL: dict[str, Any] = {
    "target": "local",
    "models": {"chat": {"weights": "small", "quantization": "8bit", "context": 1024, "engines": 1}, "small": {}},
    "gateway": {"proxy": "haproxy", "routing": "round-robin", "max-body": "1MiB"},
    "api-keys": {"team-a": f"sha256:{'a' * 64}", "team-b": {"secure": "v1:xyz"}},
    "slo": {"ttft_p95": "1.5s"},
    "local": {"base-port": 20000, "ports": {"gateway": 20500, "gateway-stats": 20501}},
}
AWS: dict[str, Any] = {
    "target": "aws",
    "models": {
        "chat": {
            "weights": "llama-3.1-8b-instruct",
            "quantization": "8bit",
            "context": 16384,
            "max-answer": 4096,
            "concurrency": 32,
            "typical-tokens": 2048,
            "engines": 4,
            "tool-calls": "llama3_json",
            "pool": "h100",
            "tensor-parallel-size": 1,
            "kv-cache-dtype": "fp8",
            "gpu-memory-utilization": 0.9,
            "max-num-batched-tokens": 8192,
            "enforce-eager": False,
            "sleep": False,
            "traffic": {"requests-per-month": 1_000_000, "prompt-tokens": 1000, "answer-tokens": 200},
        },
        "code": {"weights": "qwen2.5-7b-instruct", "pool": "a100"},
    },
    "pools": {
        "h100": {
            "gpu": "h100-80gb",
            "instance": "p5.48xlarge",
            "nodes": "auto",
            "capacity": [{"reservation": "cr-0123456789abcdef0"}, "on-demand", {"spot": 0.6}],
            "zones": 2,
            "disk": "500GB",
        },
        "a100": {"gpu": "a100-80gb", "nodes": 2},
    },
    "gateway": {"hosts": 2, "hostname": "llm.example.com"},
    "slo": {"ttft_p95": "1s", "tpot_p95": "60ms", "availability": 99.9},
    "budget": {"usd_per_hour": 500},
    "prices": {
        "hosted": {"ours/large": {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2}},
        "instances": {"p5.48xlarge": 50.5},
    },
}
KUBERNETES: dict[str, Any] = {
    "target": "kubernetes",
    "models": {"chat": {"weights": "llama-3.1-8b-instruct", "pool": "gpus"}},
    "pools": {"gpus": {"gpu": "h100-80gb", "nodes": 3, "gpus-per-node": 8, "usd_per_hour": 20.5, "disk": "1TB"}},
}
VALID = {"local": LOCAL, "aws": AWS, "kubernetes": KUBERNETES}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 20)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["auto", "8bit", "16k", "80GB", "30s", "on-demand", "h100-80gb", "cr-0123456789abcdef0", "99.9%"])
    | st.dates()
    | st.binary(max_size=3)
)
NAMES = st.sampled_from(
    sorted({key for stack in VALID.values() for key in stack} | set(AWS["models"]["chat"]) | {"h100"})
)
KEYS = NAMES | st.text(max_size=12) | st.integers(0, 9) | st.none() | st.booleans() | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
quick = settings(
    derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def delete(_draw: Callable[..., Any], holder: Any, key: Any) -> None:
    del holder[key]


def replace(draw: Callable[..., Any], holder: Any, key: Any) -> None:
    holder[key] = draw(VALUES)


def rename(draw: Callable[..., Any], holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        text = str(key)
        near = [text[:-1], f"{text}s", text.replace("-", "_"), text.upper(), text[::-1]]
        holder[draw(st.sampled_from(near) | KEYS)] = holder.pop(key)


def double(draw: Callable[..., Any], holder: Any, key: Any) -> None:
    if isinstance(holder, list):
        holder.insert(draw(st.integers(0, len(holder))), copy.deepcopy(holder[key]))
    else:
        holder[f"{key}-2"] = copy.deepcopy(holder[key])


def swap(draw: Callable[..., Any], holder: Any, key: Any) -> None:
    """The value in another type that looks the same."""
    value = holder[key]
    as_json = json.dumps(value) if _in_json(value) else str(value)
    holder[key] = draw(st.sampled_from([as_json, [value], {"value": value}, f"{value}s"]))


def _in_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


@st.composite
def mutated(draw: Callable[..., Any]) -> dict[str, Any]:
    """A valid config with a few changes."""
    stack: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(list(VALID.values()))))
    for _ in range(draw(st.integers(1, 4))):
        paths = list(places(stack))
        if not paths:
            break
        *parents, key = draw(st.sampled_from(paths))
        holder: Any = stack
        for part in parents:
            holder = holder[part]
        draw(st.sampled_from([delete, replace, rename, double, swap]))(draw, holder, key)
    return stack


def readable(findings: tuple[Finding, ...]) -> None:
    assert findings
    for finding in findings:
        assert finding.path, finding
        assert finding.problem, finding
        assert str(finding).replace("\n    ", "").isprintable(), finding


@pytest.mark.parametrize("target", VALID)
def test_what_the_changes_begin_with_is_valid(target: str) -> None:
    config = parse(VALID[target]).in_region(REGION)
    assert config.findings == ()
    plan_of(config)


@quick
@given(mutated())
def test_a_changed_config_is_read_or_refused_and_stays_as_it_is(raw: dict[str, Any]) -> None:
    before = repr(raw)
    with contextlib.suppress(ConfigError):
        for finding in parse(raw).findings:
            readable((finding,))
    assert repr(raw) == before


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack") / "Pulumi.x.yaml"


@settings(quick, max_examples=60)
@given(data=st.data(), stack=st.sampled_from(sorted(ROOT.glob("stacks/Pulumi.*.yaml"))))
def test_a_file_with_a_slip_of_the_hand_is_read_or_refused(file: Path, data: st.DataObject, stack: Path) -> None:
    text = stack.read_text(encoding="utf-8")
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.sampled_from([0, 1, 1, 2, 8]))
        text = text[:start] + data.draw(st.text("\t \n:-{}[]'\"#&*!|>%@,x0é\x00", max_size=2)) + text[end:]
    file.write_text(text, encoding="utf-8")
    try:
        findings = load_stack_file(file).findings
    except ConfigError as error:
        findings = error.findings
    for finding in findings:
        readable((finding,))


JSON = mutated().filter(_in_json)


@settings(quick, max_examples=60)
@given(JSON)
def test_pulumi_and_the_file_agree(file: Path, raw: dict[str, Any]) -> None:
    """But for scalars at the top, which Pulumi hands on as text."""
    if any(isinstance(item, bool | int | float | None) or item == "" for item in raw.values()):
        return
    with file.open("w", encoding="utf-8") as stream:
        YAML(typ="safe").dump({"config": {f"{NAMESPACE}:{key}": item for key, item in raw.items()}}, stream)
    texts = {f"{NAMESPACE}:{key}": item if isinstance(item, str) else json.dumps(item) for key, item in raw.items()}
    assert outcome(lambda: from_pulumi(texts)) == outcome(lambda: load_stack_file(file))


def test_json_in_a_text_is_what_pulumi_config_set_writes(file: Path) -> None:
    models = '{"small": {"context": 1024}}'
    file.write_text(f"config:\n  {NAMESPACE}:target: local\n  {NAMESPACE}:models: '{models}'\n")
    config = load_stack_file(file)
    assert config.findings == ()
    assert config == from_pulumi({f"{NAMESPACE}:target": "local", f"{NAMESPACE}:models": models})


def outcome(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ConfigError as error:
        return error.findings


SECRETS = {
    "hub": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "key": "sk-" + "fleet-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "github": "ghp_" + "0123456789abcdefghijABCDEFGHIJ012345",
}


@quick
@given(st.data(), st.sampled_from(list(VALID.values())), st.sampled_from(sorted(SECRETS)))
def test_a_secret_is_refused_wherever_it_is_and_never_shown(
    data: st.DataObject, stack: dict[str, Any], of: str
) -> None:
    raw, secret = copy.deepcopy(stack), SECRETS[of]
    *parents, key = data.draw(st.sampled_from(list(places(raw))))
    holder: Any = raw
    for part in parents:
        holder = holder[part]
    if isinstance(holder, dict) and data.draw(st.booleans()):
        holder[secret] = holder.pop(key)
    else:
        holder[key] = secret
    findings = outcome(lambda: parse(raw).findings)
    assert any("plain text" in finding.problem for finding in findings)
    assert all(secret not in str(finding) for finding in findings)
