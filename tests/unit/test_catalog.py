"""The catalog: its facts agree with each other, and `fleet catalog check` finds what does not."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from infra import catalog, cli
from infra.catalog import FOLDER, check, gpus, hosted_prices, instances, strict
from infra.catalog.gpus import Gpu
from infra.catalog.strict import read, rows
from infra.findings import ConfigError
from infra.weights.lock import Format

BROKEN = Path(__file__).parent / "catalog" / "broken"
TODAY = date(2026, 11, 24)
ALL_FILES = sorted(file.name for file in FOLDER.glob("*.yaml"))
TB = 10**12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The catalog, to be broken."""
    for name in ALL_FILES:
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def findings(folder: Path, today: date = TODAY) -> list[str]:
    return [str(finding) for finding in check.check(today, folder)[0]]


# What is in it


def test_the_catalog_is_in_order() -> None:
    assert check.check(TODAY) == ((), ())


def test_every_file_is_checked() -> None:
    assert sorted([*check.ROWS, *check.WHOLE]) == ALL_FILES
    assert [name for name, *_ in check.summary()] == [*check.ROWS, *check.WHOLE]


@pytest.mark.parametrize("name", ALL_FILES)
def test_both_readers_of_yaml_see_the_same(name: str) -> None:
    """What is planned with is read as YAML 1.1, what is edited as YAML 1.2: `no`, `1e9` or `012` would differ."""
    assert read(FOLDER / name) == YAML(typ="safe", pure=True).load(FOLDER / name)


def test_the_gpus_that_there_have_to_be() -> None:
    names = ["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "l4-24gb", "l40s-48gb", "a10g-24gb"]
    assert list(gpus()) == names
    for name, gpu in gpus().items():
        sold_as = int(name.rpartition("-")[2].removesuffix("gb")) * 1e9
        # In GB on the box, in GiB in the chip, less what ECC and the driver keep.
        assert 0.91 * sold_as < gpu.memory_bytes < 1.08 * sold_as, name
        assert gpu.flops["int8"] == pytest.approx(2 * gpu.flops["bf16"], rel=0.03), name
        assert (gpu.nvlink_bytes_s is None) == (gpu.bandwidth_bytes_s < TB), name


def test_a_format_runs_as_the_compute_capability_lets_it() -> None:
    for name, gpu in gpus().items():
        fp8 = "native" if gpu.compute_capability >= (8, 9) else "weight-only"
        four_bits = dict.fromkeys(("w4a16", "awq", "gptq"), "weight-only")
        eight_bits = {"w8a8-int8": "native", "fp8": fp8}
        assert gpu.formats == {"bf16": "native", "fp16": "native", **eight_bits, **four_bits}, name
        assert set(gpu.formats) == set(get_args(Format)) - {"fp32"}


def test_the_instance_types_that_there_have_to_be() -> None:
    sizes = ["xlarge", "2xlarge", "4xlarge", "8xlarge", "12xlarge", "16xlarge", "24xlarge", "48xlarge"]
    accelerated = ["p4d.24xlarge", "p4de.24xlarge", "p5.4xlarge", "p5.48xlarge", "p5e.48xlarge", "p5en.48xlarge"]
    assert set(instances()) == {*accelerated, *(f"{family}.{size}" for family in ("g5", "g6", "g6e") for size in sizes)}


def test_instance_types_are_of_one_kind() -> None:
    for name, row in instances().items():
        family, size = name.split(".")
        assert row.vcpus == int(size.removesuffix("xlarge") or 1) * 4, name
        eight = family.startswith("p") or row.vcpus == 192
        assert row.gpus == (8 if eight and name != "p5.4xlarge" else 4 if size in {"12xlarge", "24xlarge"} else 1), name
        assert row.gpus_per_domain == (4 if row.gpus == 8 and family.startswith("g") else row.gpus), name
        assert row.nvme_bytes >= 250e9
        assert ("capacity-block" in row.offers) == family.startswith("p"), name
        assert ("on-demand" in row.offers) == ("spot" in row.offers) == (family != "p5e"), name


@pytest.mark.parametrize(
    ("name", "region", "usd"),
    [
        ("p4d.24xlarge", "us-east-1", 21.957642),
        ("p4d.24xlarge", "eu-west-1", 23.71569),
        ("p4de.24xlarge", "us-east-1", 27.44705),
        ("p5.48xlarge", "us-east-1", 55.04),
        ("p5en.48xlarge", "us-east-1", 63.296),
        ("g5.xlarge", "us-east-1", 1.006),
        ("g5.xlarge", "eu-west-1", 1.123),
        ("g6.48xlarge", "us-east-1", 13.3504),
        ("g6e.xlarge", "us-east-1", 1.861),
    ],
)
def test_prices(name: str, region: str, usd: float) -> None:
    assert instances()[name].usd_per_hour[region] == usd


def test_prices_grow_with_what_one_gets() -> None:
    types = instances()
    for name, row in types.items():
        for region, usd in row.usd_per_hour.items():
            if "eu-" in region:
                assert 1.05 < usd / row.usd_per_hour["us-east-1"] < 1.2, name
            else:
                assert usd == row.usd_per_hour["us-east-1"], name
    h100 = types["p5.4xlarge"].usd_per_hour["us-east-1"]
    assert types["p5.48xlarge"].usd_per_hour["us-east-1"] == pytest.approx(8 * h100)


def test_zones_are_ids_and_of_their_region() -> None:
    prefixes = {"us-east-1": "use1-az", "us-east-2": "use2-az", "us-west-2": "usw2-az", "eu-west-1": "euw1-az"}
    for name, row in instances().items():
        assert row.zones, name
        for region, zones in row.zones.items():
            assert zones, name
            assert all(zone.startswith(prefixes[region]) for zone in zones), name
    assert instances()["p4de.24xlarge"].zones["us-east-1"] == ("use1-az4", "use1-az6")


def test_every_provider_has_a_small_model_and_a_large_one() -> None:
    sizes: dict[str, set[str]] = {}
    for row in hosted_prices().values():
        sizes.setdefault(row.provider, set()).add(row.size)
    assert sizes == {name: {"small", "large"} for name in ("openai", "anthropic", "google", "together", "fireworks")}


def test_facts_are_read_once() -> None:
    assert instances() is instances()
    assert gpus() is gpus()
    assert hosted_prices() is hosted_prices()
    assert catalog.vllm_cpu() is catalog.vllm_cpu()


# What is found


def test_everything_is_found_at_once(folder: Path) -> None:
    for file in BROKEN.glob("*.yaml"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert "\n".join(findings(folder)) + "\n" == (BROKEN / "findings.txt").read_text()


@pytest.mark.parametrize(
    ("today", "count"),
    [(date(2027, 7, 31), 0), (date(2027, 8, 1), 30), (date(2027, 11, 30), 30), (date(2027, 12, 1), 30 + 2 + 14 + 18)],
)
def test_prices_older_than_a_year_are_stale(today: date, count: int) -> None:
    found, warnings = check.check(today)
    assert found == ()
    assert len(warnings) == count


def test_what_to_do_about_stale_prices() -> None:
    warnings = [str(warning) for warning in check.check(date(2028, 1, 5))[1]]
    assert warnings[18] == (
        "aws-instances.yaml: g5.12xlarge.date: the price is 18 months old\n    `fleet prices refresh`"
    )
    assert warnings[-1].endswith("the price is 14 months old\n    look the price up again")


def test_an_instance_with_a_gpu_of_a_broken_row(folder: Path) -> None:
    """The row is there, so its instances are not to blame."""
    edit(folder / "gpus.yaml", "bandwidth_bytes_s: 3350000000000", "bandwidth_bytes_s: fast")
    assert findings(folder) == [
        "gpus.yaml: h100-80gb.bandwidth_bytes_s: is text, not a whole number\n    see the other rows"
    ]


def test_a_region_without_zones_or_prices(folder: Path) -> None:
    file = folder / "aws-instances.yaml"
    edit(file, "usd_per_hour: {us-east-1: 55.04,", "usd_per_hour: {ca-central-1: 63.3,")
    found = findings(folder)
    assert [line.splitlines()[0] for line in found] == [
        "aws-instances.yaml: p5.48xlarge.usd_per_hour: has no us-east-1, where the type is offered on demand",
        "aws-instances.yaml: p5.48xlarge.zones: has no ca-central-1, where the type has a price",
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "gpus", "gpus:", "gpus: []", "gpus: {}", "{", "gpus: {1: {2: 3}}", "\0", "a: *b", "gpus: {a: !x b}"],
)
def test_a_file_that_is_none(folder: Path, text: str) -> None:
    (folder / "gpus.yaml").write_text(text)
    assert any(line.startswith("gpus.yaml") for line in findings(folder))


def test_a_file_that_is_not_text(folder: Path) -> None:
    (folder / "gpus.yaml").write_bytes(b"\xff\xfe\xff")
    assert [line.partition(": is not YAML")[0] for line in findings(folder)] == ["gpus.yaml"]


@pytest.mark.parametrize("text", [None, "", "gpus: []", "gpus: {a: {}}", "{"])
def test_a_broken_catalog_is_refused_when_it_is_needed(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "gpus.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)gpus.yaml: cannot be used.*fleet catalog check"):
        rows(Gpu, file, "gpus")


# The command


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    of = check.check
    monkeypatch.setattr(check, "check", lambda _today: of(TODAY))
    code, output, error = run("catalog", "check")
    assert (code, error) == (0, "")
    for words in ("in order", *ALL_FILES, "2026-07"):
        assert words in output


def test_the_command_with_old_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    of = check.check
    monkeypatch.setattr(check, "check", lambda _today: of(date(2027, 8, 1)))
    code, output, error = run("catalog", "check")
    assert code == 0
    assert error.count("warning: aws-instances.yaml: ") == 30
    assert "in order" in output


def test_the_command_with_findings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    of = check.check
    edit(folder / "gpus.yaml", "product: NVIDIA L4\n", "prodct: NVIDIA L4\n")
    monkeypatch.setattr(check, "check", lambda today: of(today, folder))
    code, output, error = run("catalog", "check")
    assert (code, output) == (1, "")
    assert "gpus.yaml: l4-24gb.prodct: is not a key of the catalog\n    did you mean `product`?" in error
    assert "gpus.yaml: l4-24gb.product: is missing" in error


def test_libyaml_is_there() -> None:
    """Without it a plan takes a third of a second more."""
    assert strict.LOADER.__name__ == "CSafeLoader"
