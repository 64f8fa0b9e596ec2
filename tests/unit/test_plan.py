"""The plan of a local stack: what is served, does it fit, which flags, which ports."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.catalog import vllm_cpu
from infra.findings import ConfigError
from infra.paths import ROOT
from infra.plan.memory import kv_bytes_per_token, kv_cache_bytes, weights_bytes
from infra.plan.model import EnginePlan, FleetPlan, MemoryPlan
from infra.plan.ports import base_port
from infra.weights.lock import Format
from tests.unit.inputs import AVX512, GIB, a_host, a_lock, entry, facts, plan


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        plan(*args, **options)
    return str(error.value)


def memory(made: FleetPlan) -> MemoryPlan:
    """Of the machine of a local stack."""
    assert made.memory is not None
    return made.memory


def flag(engine: EnginePlan, name: str) -> str:
    return engine.flags[engine.flags.index(name) + 1]


# Purity.


def test_the_plan_does_no_io_and_knows_no_pulumi() -> None:
    allowed = {"infra", "bisect", "dataclasses", "hashlib", "ipaddress", "json", "math", "pydantic", "re", "typing"}
    allowed |= {"__future__", "collections", "functools", "itertools", "zlib"}
    forbidden = {"infra.paths", "infra.render", "infra.targets", "infra.stack_file", "infra.status", "infra.cli"}
    forbidden |= {"infra.planning", "infra.prices", "infra.program"}
    for file in (ROOT / "infra" / "plan").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.partition(".")[0] in allowed, f"{file.name} imports {name}"
                assert not any(name == one or name.startswith(f"{one}.") for one in forbidden), f"{file.name}: {name}"


def test_planning_imports_no_pulumi() -> None:
    code = "import sys, infra.plan, infra.stack_file, infra.weights.lock; sys.exit('pulumi' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_same_inputs_give_the_same_plan() -> None:
    assert plan() == plan()
    assert plan().digest == plan().digest != plan({"chat": {"weights": "small", "context": 1024}}).digest


def test_the_plan_survives_json() -> None:
    made = plan({"chat": {"weights": "small", "engines": 1}})
    assert FleetPlan.model_validate_json(made.model_dump_json()) == made


# Memory. Hand-computed from the published configurations.


@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "dtype", "expected"),
    [
        (30, 3, 64, "float32", 46_080),  # SmolLM2-135M
        (32, 8, 128, "bfloat16", 131_072),  # Llama 3.1 8B: 128 KiB
        (80, 8, 128, "bfloat16", 327_680),  # Llama 3.3 70B: 320 KiB
        (28, 4, 128, "bfloat16", 57_344),  # Qwen2.5 7B: 56 KiB
    ],
)
def test_kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: str, expected: int) -> None:
    assert kv_bytes_per_token(facts(layers=layers, kv_heads=kv_heads, head_dim=head_dim), dtype) == expected


def test_a_kv_cache_is_whole_blocks_and_one_that_stays_empty() -> None:
    assert kv_cache_bytes(facts(), "float32", 8192, vllm_cpu()) == 65 * 128 * 46_080
    assert kv_cache_bytes(facts(), "float32", 8193, vllm_cpu()) == 66 * 128 * 46_080


def test_weights_grow_to_the_type_that_is_computed_in() -> None:
    assert weights_bytes(entry(), "bfloat16") == 269_030_016
    assert weights_bytes(entry(), "float32") == 538_060_032
    table = 49_152 * 576
    quantised = entry("w8a8-int8", "small", weights_bytes=163_000_000)
    assert weights_bytes(quantised, "bfloat16") == 163_000_000
    assert weights_bytes(quantised, "float32") == 163_000_000 + 2 * table


def test_the_default_stack_is_what_was_measured_and_stays_within_seven_gigabytes() -> None:
    made = plan()
    (model,) = made.models
    assert (len(made.engines), model.context, model.concurrency) == (2, 2048, 8)
    assert 2.7 * GIB < model.engine_memory_bytes < 3.0 * GIB  # 3.1 GiB with twice the KV cache, Pss, 2026-11
    assert memory(made).total < 7e9
    assert memory(made).total == memory(made).services + memory(made).engines
    assert memory(made).engines == 2 * model.engine_memory_bytes


def test_eight_gib_hold_the_default_stack_and_four_hold_one_engine() -> None:
    plan(host=a_host(8))
    assert "2 engines of 2.8 GiB do not fit" in (problem := refused(host=a_host(4.5)))
    assert "`engines: 1`" in problem
    plan({"chat": {"weights": "small", "engines": 1}}, host=a_host(4.5))


@pytest.mark.parametrize("key", ["engines", "context", "concurrency"])
def test_what_is_said_to_fit_fits_and_more_does_not(key: str) -> None:
    wanted = {"weights": "small", "engines": 3, "context": 8192, "concurrency": 64, "typical-tokens": 128}
    del wanted["typical-tokens"]
    host = a_host(24)
    problem = refused({"chat": wanted}, host=host)
    largest = int(problem.partition(f"`{key}: ")[2].partition("`")[0])
    plan({"chat": wanted | {key: largest}}, host=host)
    step = 128 if key == "context" else 1
    assert "do not fit" in refused({"chat": wanted | {key: largest + step}}, host=host)


@given(
    engines=st.integers(1, 29),
    context=st.integers(128, 8192),
    concurrency=st.integers(1, 256),
    typical=st.none() | st.integers(16, 128),
    gib=st.integers(1, 512),
)
def test_nothing_is_planned_that_ram_cannot_hold(
    engines: int, context: int, concurrency: int, typical: int | None, gib: int
) -> None:
    wanted: dict[str, Any] = {"engines": engines, "context": context, "concurrency": concurrency, "weights": "small"}
    if typical:
        wanted["typical-tokens"] = typical
    try:
        made = plan({"chat": wanted}, host=a_host(gib))
    except ConfigError as error:
        assert "do not fit" in str(error)  # noqa: PT017 - either way is right
    else:
        assert memory(made).total <= gib * GIB - max(GIB, gib * GIB // 10)
        per_token = kv_bytes_per_token(facts(), "float32")
        assert made.models[0].kv_cache_bytes >= per_token * max(context, concurrency * (typical or context // 2))


def test_no_memory_at_all_still_gives_a_finding() -> None:
    assert "a smaller model, fewer models, or more memory" in refused(host=a_host(0.1))


# Weights and types.


def test_8bit_takes_what_was_made_from_the_weights() -> None:
    (model,) = plan({"chat": {"weights": "small", "quantization": "8bit"}}).models
    assert (model.weights, model.base_weights, model.quantization) == ("small-w8a8", "small", "8bit")
    assert model.format == "w8a8-int8"


def test_an_entry_that_is_8bit_may_be_named_either_way() -> None:
    for wanted in ({"weights": "small-w8a8"}, {"weights": "small-w8a8", "quantization": "8bit"}):
        (model,) = plan({"chat": wanted}).models
        assert (model.weights, model.quantization) == ("small-w8a8", "8bit")


def test_4bit_needs_avx512() -> None:
    wanted = {"chat": {"weights": "small", "quantization": "4bit"}}
    assert "dies at its first request" in refused(wanted)
    assert plan(wanted, host=a_host(flags=AVX512)).models[0].weights == "small-w4a16"


def test_dtype_follows_the_cpu() -> None:
    for flags, dtype in ((AVX512, "bfloat16"), (frozenset[str](), "float32")):
        made = plan(host=a_host(flags=flags))
        assert made.models[0].dtype == flag(made.engines[0], "--dtype") == dtype


def test_the_catalog_knows_every_format_of_the_lock() -> None:
    assert set(get_args(Format)) == set(vllm_cpu().formats)


def test_context_defaults_to_what_the_model_can_take() -> None:
    made = plan({"tiny": {}}, lock=a_lock(tiny=entry(max_positions=512)))
    assert made.models[0].context == 512


# Engines.


def test_flags_and_environment() -> None:
    made = plan({"chat": {"weights": "small", "engines": 3, "concurrency": 4}}, host=a_host(cores=8))
    (model,), (engine, *others) = made.models, made.engines
    assert [engine.name, *(other.name for other in others)] == ["chat-1", "chat-2", "chat-3"]
    assert flag(engine, "--host") == "127.0.0.1"
    assert flag(engine, "--port") == str(engine.port)
    assert flag(engine, "--served-model-name") == "chat"
    assert flag(engine, "--kv-cache-memory-bytes") == str(model.kv_cache_bytes)
    assert flag(engine, "--max-num-seqs") == "4"
    assert flag(engine, "--max-num-queued-reqs") == str(4 + model.queued)  # vLLM counts what runs as well
    assert flag(engine, "--shutdown-timeout") == str(made.timings.shutdown_s)
    assert {"--enforce-eager", "--enable-request-id-headers"} <= set(engine.flags)
    assert "--override-generation-config" not in engine.flags
    assert "--enable-auto-tool-choice" not in engine.flags
    environment = dict(engine.environment)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"


def test_more_engines_than_cores_have_a_thread_each() -> None:
    made = plan({"chat": {"weights": "small", "engines": 4}}, host=a_host(cores=2))
    assert {dict(engine.environment)["OMP_NUM_THREADS"] for engine in made.engines} == {"1"}


def test_longest_answer_and_tool_calls() -> None:
    (engine, _) = plan({"chat": {"weights": "small", "max-answer": 100, "tool-calls": "hermes"}}).engines
    assert flag(engine, "--override-generation-config") == '{"max_new_tokens": 100}'
    assert flag(engine, "--tool-call-parser") == "hermes"
    assert "--enable-auto-tool-choice" in engine.flags


def test_a_step_has_room_for_every_running_request() -> None:
    (engine, _) = plan({"chat": {"weights": "small", "concurrency": 600, "typical-tokens": 16}}).engines
    assert flag(engine, "--max-num-batched-tokens") == "600"


def test_one_engine_means_downtime_and_the_plan_says_so() -> None:
    assert plan().notices == ()
    (notice,) = plan({"chat": {"weights": "small", "engines": 1}}).notices
    assert notice.path == "models.chat.engines"
    assert "down for about 100 s" in notice.message


# Ports.


def ports(made: FleetPlan) -> list[int]:
    return [
        made.gateway.port,
        made.gateway.stats_port,
        made.agent.port,
        made.monitor.prometheus_port,
        made.monitor.alertmanager_port,
        made.monitor.grafana_port,
        *(engine.port for engine in made.engines),
    ]


@given(st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True), st.integers(1, 14))
def test_ports_are_distinct_and_not_those_of_outgoing_connections(stack: str, engines: int) -> None:
    both = {name: {"weights": "small", "engines": engines, "concurrency": 1} for name in ("chat", "code")}
    try:
        made = plan(both, stack=stack, host=a_host(256))
    except ConfigError as error:
        assert "cannot be called" in str(error)  # noqa: PT017 - names of shared folders
        return
    used = ports(made)
    assert len(set(used)) == len(used)
    assert all(18000 <= port < 32768 for port in used)


def test_the_stack_local_has_the_documented_ports() -> None:
    made = plan()
    assert (made.gateway.port, made.agent.port, made.monitor.prometheus_port) == (18080, 18090, 18091)
    assert [engine.port for engine in made.engines] == [18001, 18002]


def test_stacks_have_blocks_of_their_own() -> None:
    assert len({base_port(stack) for stack in ("local", "dev", "prod", "test")}) == 4
    assert set(ports(plan(stack="dev"))).isdisjoint(ports(plan()))


def test_ports_can_be_chosen() -> None:
    made = plan(local={"base-port": 20000, "ports": {"gateway": 8080}})
    assert (made.gateway.port, made.gateway.stats_port, made.engines[0].port) == (8080, 20081, 20001)


@pytest.mark.parametrize("stack", ["weights", "state", "", "../x", "x" * 41, "a/b"])
def test_names_that_no_stack_can_have(stack: str) -> None:
    assert "cannot be called" in refused(stack=stack)


# Gateway.


def test_the_gateway_keeps_the_queue_and_refuses_before_it_is_full() -> None:
    made = plan({"chat": {"weights": "small", "concurrency": 4}, "code": {"weights": "small"}})
    assert made.gateway.server_maxconn == (("chat", 4), ("code", 8))
    slots = 2 * 4 + 2 * 8
    assert made.gateway.maxconn > slots + 2 * made.gateway.queue
    assert made.monitor.thresholds.queue_waiting == 8
    for name, at_once in made.gateway.server_maxconn:
        model = made.model(name)
        assert at_once <= model.concurrency
        assert model.concurrency + model.queued >= 2 * at_once  # during a reload two gateways send


def test_a_body_that_must_be_read_fits_the_buffer() -> None:
    one = plan().gateway
    two = plan({"chat": {"weights": "small"}, "code": {"weights": "small"}}).gateway
    assert (one.route_by_body, two.route_by_body) == (False, True)
    assert one.buffer_bytes < two.max_body_bytes < two.buffer_bytes
    assert two.queue * two.buffer_bytes <= 128 << 20


def test_a_long_context_gets_a_larger_body() -> None:
    lock = a_lock(long=entry(max_positions=131_072))
    made = plan({"long": {"context": 131_072, "engines": 1, "concurrency": 1}}, lock=lock, host=a_host(64))
    assert made.gateway.max_body_bytes == 4 << 20


# Explaining.


def test_every_decision_says_where_it_came_from() -> None:
    made = plan({"chat": {"weights": "small", "context": 1024}})
    because = {origin.path: origin for origin in made.origins}
    assert len(because) == len(made.origins)
    assert because["models.chat.context"].because == "written in the stack file"
    assert because["models.chat.engines"].value == "2"
    assert {f"timings.{name}" for name in type(made.timings).model_fields} <= set(because)
    assert all(origin.value and origin.because for origin in made.origins)


def test_catalog_has_source_and_date() -> None:
    for part in (vllm_cpu().memory, vllm_cpu().speed):
        for _, fact in part:
            assert fact.source
            assert fact.date.startswith("20")
