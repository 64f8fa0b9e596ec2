"""The worked example: hosted models against a 70B on an H100 and an 8B on an A100."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from infra import cli, show_cost, weights
from infra.catalog import gpus, hosted_prices, instances
from infra.compare import REGION, REQUESTS, Comparison, SetupBill, cheapest, compare
from infra.findings import ConfigError
from infra.plan.hosted import hosted
from infra.plan.traffic import ANSWER_TOKENS, PROMPT_TOKENS
from infra.weights.lock import WeightsLock
from tests.unit.costs import text
from tests.unit.inputs import a_lock, entry

LLAMA_70B = entry(
    "fp8",
    layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    attention_heads=64,
    kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_positions=131072,
    tied_embeddings=False,
    parameters=70_553_706_496,
    weights_bytes=72_680_000_000,
)
LLAMA_8B = entry(
    layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    attention_heads=32,
    kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_positions=131072,
    tied_embeddings=False,
    parameters=8_030_261_248,
    weights_bytes=16_060_522_496,
)


def llamas() -> WeightsLock:
    return a_lock(**{"llama-3.3-70b-instruct-fp8": LLAMA_70B, "llama-3.1-8b-instruct": LLAMA_8B})


@pytest.fixture(scope="module")
def example() -> Comparison:
    return compare(llamas())


def setup(result: Comparison, name: str) -> SetupBill:
    return next(bill for bill in result.setups if name in bill.name)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_hosted_models_cost_their_tokens(example: Comparison) -> None:
    assert (example.requests, example.region) == (100_000, "us-east-1")
    for bill in example.hosted:
        row = hosted_prices()[bill.name]
        # 100,000 x 1,155 = 115.5 Mtok of prompts, 100,000 x 211 = 21.1 Mtok of answers
        month = 115.5 * row.input_usd_per_mtok + 21.1 * row.output_usd_per_mtok
        assert bill.usd_per_month == pytest.approx(month)
        assert row.date in bill.price
    assert {bill.size for bill in example.hosted} == {"small", "large"}


def test_a_70b_rents_one_h100(example: Comparison) -> None:
    bill = setup(example, "70B")
    row = instances()[bill.instance]
    assert (bill.format, bill.gpu, row.gpu) == ("fp8", gpus()["h100-80gb"].product, "h100-80gb")
    assert (bill.instances, bill.rent.engines) == (1, 1)
    assert bill.rent.usd_per_month == pytest.approx(row.usd_per_hour["us-east-1"] * 730)
    assert bill.share.usd_per_month == pytest.approx(row.usd_per_hour["us-east-1"] * 730 / row.gpus)
    # 79 GiB x 0.92 less 68 GiB of weights is not much: a request of 1,366 tokens takes 1,366 x 320 KiB = 0.42 GiB.
    assert 1 <= bill.concurrency <= 16


def test_an_8b_must_rent_eight_a100(example: Comparison) -> None:
    bill = setup(example, "8B")
    assert (bill.instance, bill.gpus, bill.format) == ("p4d.24xlarge", 8, "bf16")
    assert bill.rent.usd_per_month == pytest.approx(8 * bill.share.usd_per_month)
    assert bill.rent.capacity_requests_per_month == bill.share.capacity_requests_per_month
    assert bill.concurrency == 64


def test_each_pair_has_its_break_even(example: Comparison) -> None:
    for bill in example.setups:
        for cost in (bill.rent, bill.share):
            for row in cost.hosted:
                if row.break_even_requests is None:
                    continue
                nodes = row.break_even_engines or 0
                if cost is bill.rent:
                    nodes = math.ceil(nodes / bill.gpus)
                    each = bill.usd_per_hour * 730
                else:
                    each = bill.usd_per_hour * 730 / bill.gpus
                # What it costs here and what it costs there, up to one request.
                assert row.break_even_requests * row.usd_per_request == pytest.approx(
                    nodes * each, abs=row.usd_per_request
                )


def test_a_small_hosted_model_is_far_cheaper_at_this_traffic(example: Comparison) -> None:
    """The point of the example: hosted is cheap as long as a GPU is idle nearly all of the time."""
    small = max(bill.usd_per_month for bill in example.hosted if bill.size == "small")
    for bill in example.setups:
        assert bill.share.usd_per_month > small
        assert bill.rent.utilisation < 0.2


def test_prices_of_the_same_traffic_come_from_one_function(example: Comparison) -> None:
    names = [other.name for other in hosted(hosted_prices(), {})]
    assert [bill.name for bill in example.hosted] == names
    for bill in example.setups:
        assert [row.name for row in bill.rent.hosted] == [row.name for row in bill.share.hosted] == names
        for row, api in zip(bill.rent.hosted, example.hosted, strict=True):
            assert row.usd_per_month == api.usd_per_month


def test_more_traffic_needs_more_gpus() -> None:
    capacity = setup(compare(llamas()), "8B").rent.capacity_requests_per_month
    many = setup(compare(llamas(), requests=9 * capacity + 9), "8B")
    assert (many.rent.engines, many.instances, many.share.engines) == (10, 2, 10)
    assert many.rent.usd_per_month == pytest.approx(2 * many.usd_per_hour * 730)
    assert many.share.usd_per_month == pytest.approx(10 / 8 * many.usd_per_hour * 730)
    assert 0.9 <= many.rent.utilisation <= 1


@settings(max_examples=20)
@given(st.integers(1, 10**9), st.integers(1, 4000), st.integers(1, 2000))
def test_any_traffic_that_fits_is_served(requests: int, prompt: int, answer: int) -> None:
    result = compare(llamas(), requests, prompt, answer)
    for bill in result.setups:
        assert bill.rent.utilisation <= 1 + 1e-9
        assert bill.rent.usd_per_month >= bill.share.usd_per_month - 1e-6


def test_requests_that_no_gpu_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--prompt-tokens: Llama 3.3 70B in fp8 does not fit on one NVIDIA H100"):
        compare(llamas(), prompt_tokens=100_000)


def test_a_region_without_such_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--region: us-esat-1 offers no h100-80gb\n    did you mean `us-east-1`"):
        compare(llamas(), region="us-esat-1")


def test_a_lock_without_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"models\.lock\.yaml: models\.llama-3\.3-70b-instruct-fp8: is missing"):
        compare(a_lock())


def test_the_cheapest_instance_is_rented() -> None:
    row = instances()["p4d.24xlarge"]
    dear, cheap = (row.model_copy(update={"usd_per_hour": {"r": price}}) for price in (3.0, 2.0))
    other = row.model_copy(update={"gpu": "l4-24gb", "usd_per_hour": {"r": 1.0}})
    nowhere = row.model_copy(update={"usd_per_hour": {"q": 1.0}})
    catalog = {"a": dear, "b": cheap, "c": other, "d": nowhere}
    assert cheapest(row.gpu, catalog, "r") == ("b", cheap)


# The command


@pytest.fixture
def _lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(weights, "load", llamas)


@pytest.mark.usefixtures("_lock")
def test_one_command_shows_it(example: Comparison) -> None:
    code, output, error = run("compare")
    assert (code, error) == (0, "")
    assert output.strip() == text(show_cost.comparison(example)).strip()
    for words in (
        "100,000 requests a month cost",
        "Llama 3.3 70B",
        "Llama 3.1 8B",
        "1/8 p4d.24xlarge",
        "1,155 tokens of prompt and 211 of answer",
        "Azure's conversation trace",
        "730 hours",
        "the least that can be rented is a p4d.24xlarge, of whose GPUs 7 are idle",
        "where prices are from",
        "on demand",
        "estimate ±",
    ):
        assert words in output
    for name, row in hosted_prices().items():
        assert name in output
        assert row.date in output


@pytest.mark.usefixtures("_lock")
def test_as_json_with_other_traffic() -> None:
    options = ("--requests", "5000", "--prompt-tokens", "100", "--answer-tokens", "50", "--region", "us-east-1")
    code, output, error = run("compare", *options, "--json")
    assert (code, error) == (0, "")
    assert Comparison.model_validate_json(output) == compare(llamas(), 5000, 100, 50)
    found: dict[str, Any] = json.loads(output)
    assert not any("Azure" in line for line in found["assumptions"])


@pytest.mark.usefixtures("_lock")
def test_the_commands_defaults_are_the_examples() -> None:
    assert run("compare", "--json") == run(
        "compare",
        "--json",
        *("--requests", str(REQUESTS), "--region", REGION),
        *("--prompt-tokens", str(PROMPT_TOKENS), "--answer-tokens", str(ANSWER_TOKENS)),
    )


@pytest.mark.usefixtures("_lock")
def test_failures_are_findings() -> None:
    code, output, error = run("compare", "--region", "us-esat-1")
    assert (code, output) == (1, "")
    assert "did you mean `us-east-1`" in error
    assert run("compare", "--requests", "0")[0] == 2
