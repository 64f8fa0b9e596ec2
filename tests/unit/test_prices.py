"""`fleet prices refresh`, through the real boto3."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra import cli, prices
from infra.catalog import FOLDER
from infra.catalog.check import check
from infra.catalog.instances import Instance
from infra.catalog.strict import rows
from infra.findings import ConfigError
from infra.prices import FILES, Change, refresh
from tests.unit.pricing import Pricing, product

TODAY = date(2027, 3, 9)
INSTANCES = """\
# Types.
instances:
  # The large one.
  p5.48xlarge:
    gpu: h100-80gb
    gpus: 8
    vcpus: 192
    memory_bytes: 2199023255552 # 2 TiB
    nvme_bytes: 30400000000000
    network_gbit_s: 3200
    efa: true
    gpus_per_domain: 8
    offers: [reservation, capacity-block, on-demand, spot]
    usd_per_hour: {us-east-1: 55.04, us-east-2: 55.04}
    zones: {us-east-1: [use1-az1], us-east-2: [use2-az1]}
    source: "specs: EC2 API; prices: by hand"
    date: 2026-07
  p5e.48xlarge:
    gpu: h200-141gb
    gpus: 8
    vcpus: 192
    memory_bytes: 2199023255552
    nvme_bytes: 30400000000000
    network_gbit_s: 3200
    efa: true
    gpus_per_domain: 8
    offers: [reservation, capacity-block]
    usd_per_hour: {}
    zones: {us-east-2: [use2-az1]}
    source: "specs: EC2 API; prices: none"
    date: 2026-07
"""
SERVICES = """\
services:
  c7i.large:
    use: gateway
    usd_per_hour: {us-east-1: 0.08925}
    source: from a table
    date: 2026-11
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "aws-instances.yaml").write_text(INSTANCES)
    (tmp_path / "aws-services.yaml").write_text(SERVICES)
    return tmp_path


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_PRICING", "AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-real-secret")
    return monkeypatch


@pytest.fixture
def aws(environment: pytest.MonkeyPatch) -> Iterator[Pricing]:
    with Pricing() as pricing:
        environment.setenv("AWS_ENDPOINT_URL", pricing.url)
        pricing.prices = {
            ("p5.48xlarge", "us-east-1"): "55.0400000000",
            ("p5.48xlarge", "us-east-2"): "55.0400000000",
            ("c7i.large", "us-east-1"): "0.0892500000",
        }
        yield pricing


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FILES}


def test_changed_prices_are_written_and_nothing_else(aws: Pricing, folder: Path) -> None:
    aws.prices["p5.48xlarge", "us-east-1"] = "49.5360000000"
    aws.prices["c7i.large", "us-east-1"] = "0.1000000000"
    done = refresh(TODAY, folder=folder)
    assert done.changes == [
        Change("p5.48xlarge", "us-east-1", 55.04, 49.536),
        Change("c7i.large", "us-east-1", 0.08925, 0.1),
    ]
    assert (done.confirmed, done.kept) == (1, [])
    p5 = INSTANCES.replace("us-east-1: 55.04", "us-east-1: 49.536").replace("by hand", "AWS price list")
    assert texts(folder) == {
        "aws-instances.yaml": p5.replace("2026-07", "2027-03", 1),
        "aws-services.yaml": SERVICES.replace("0.08925", "0.1")
        .replace("from a table", "AWS price list")
        .replace("2026-11", "2027-03"),
    }


def test_a_second_time_changes_nothing(aws: Pricing, folder: Path) -> None:
    aws.prices["p5.48xlarge", "us-east-1"] = "49.5360000000"
    refresh(TODAY, folder=folder)
    before = texts(folder)
    done = refresh(TODAY, folder=folder)
    assert (done.changes, done.confirmed) == ([], 3)
    assert texts(folder) == before


def test_what_is_asked_for(aws: Pricing, folder: Path) -> None:
    said: list[str] = []
    refresh(TODAY, say=said.append, folder=folder)
    assert [(asked["instanceType"], asked["regionCode"]) for asked in aws.asked] == [
        ("p5.48xlarge", "us-east-1"),
        ("p5.48xlarge", "us-east-2"),
        ("c7i.large", "us-east-1"),
    ]
    assert {key: value for key, value in aws.asked[0].items() if key not in {"instanceType", "regionCode"}} == {
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
        "marketoption": "OnDemand",
    }
    assert said == ["asking for p5.48xlarge (1 of 3)", "asking for c7i.large (3 of 3)"]


def test_one_region(aws: Pricing, folder: Path) -> None:
    aws.prices["p5.48xlarge", "us-east-1"] = "1"
    aws.prices["p5.48xlarge", "us-east-2"] = "2"
    done = refresh(TODAY, ["us-east-2"], folder=folder)
    assert done.changes == [Change("p5.48xlarge", "us-east-2", 55.04, 2.0)]
    # The price of us-east-1 is as old as it was, and so is the row.
    assert texts(folder)["aws-instances.yaml"] == INSTANCES.replace("us-east-2: 55.04", "us-east-2: 2.0")


def test_a_region_that_the_catalog_lacks(aws: Pricing, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--region us-east-3: is not in.*did you mean `us-east-2`.*zones"):
        refresh(TODAY, ["us-east-1", "us-east-3"], folder=folder)
    assert aws.asked == []


def test_a_region_of_which_the_zones_were_added(aws: Pricing, folder: Path) -> None:
    file = folder / "aws-instances.yaml"
    file.write_text(INSTANCES.replace("zones: {us-east-1", "zones: {us-west-2: [usw2-az1], us-east-1"))
    aws.prices["p5.48xlarge", "us-west-2"] = "55.04"
    done = refresh(TODAY, ["us-west-2"], folder=folder)
    assert done.changes == [Change("p5.48xlarge", "us-west-2", None, 55.04)]
    assert rows(Instance, file, "instances")["p5.48xlarge"].usd_per_hour["us-west-2"] == 55.04


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [product("0.0000000000", instanceType="p5.48xlarge", regionCode="us-east-1")],
        [product("31.464", instanceType="p5.48xlarge", marketoption="CapacityBlock")],
        [product("60", instanceType="p5.48xlarge", operatingSystem="Windows")],
        [product("60", unit="Quantity", instanceType="p5.48xlarge")],
        [product("not a price", instanceType="p5.48xlarge")],
        [product("60", instanceType="p5.48xlarge"), product("61", instanceType="p5.48xlarge")],
    ],
    ids=["nothing", "free", "capacity block", "Windows", "another unit", "no number", "two prices"],
)
def test_a_price_that_is_not_to_be_had_stays(aws: Pricing, folder: Path, answers: list[dict[str, object]]) -> None:
    aws.more["p5.48xlarge"] = answers
    del aws.prices["p5.48xlarge", "us-east-1"], aws.prices["p5.48xlarge", "us-east-2"]
    done = refresh(TODAY, ["us-east-1"], folder=folder)
    assert [str(kept).splitlines()[0] for kept in done.kept] == [
        "p5.48xlarge in us-east-1: AWS has no on-demand price, 55.04 stays"
    ]
    assert texts(folder)["aws-instances.yaml"] == INSTANCES


def test_a_price_on_a_later_page_and_said_twice(aws: Pricing, folder: Path) -> None:
    right = product("50", instanceType="p5.48xlarge", regionCode="us-east-1")
    aws.more["p5.48xlarge"] = [product("1", marketoption="CapacityBlock")] * 4 + [right, right]
    del aws.prices["p5.48xlarge", "us-east-1"]
    assert refresh(TODAY, ["us-east-1"], folder=folder).changes == [Change("p5.48xlarge", "us-east-1", 55.04, 50.0)]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "AccessDeniedException", "does not let.*pricing:GetProducts"),
        (400, "ExpiredTokenException", "does not take these credentials.*aws sso login"),
        (400, "UnrecognizedClientException", "does not take these credentials"),
        (400, "InternalErrorException", "did not answer.*nothing was changed"),
    ],
)
def test_aws_refuses(aws: Pricing, folder: Path, status: int, code: str, words: str) -> None:
    aws.fail = (status, code)
    with pytest.raises(ConfigError, match=rf"(?s)AWS: .*{words}"):
        refresh(TODAY, folder=folder)
    assert texts(folder) == {"aws-instances.yaml": INSTANCES, "aws-services.yaml": SERVICES}


def test_nobody_is_logged_in(aws: Pricing, environment: pytest.MonkeyPatch, folder: Path) -> None:
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match=r"(?s)has to know who asks.*aws sso login.*AWS_ACCESS_KEY_ID"):
        refresh(TODAY, folder=folder)
    assert aws.asked == []


def test_a_profile_that_does_not_exist(environment: pytest.MonkeyPatch, folder: Path) -> None:
    environment.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match=r"(?s)has to know who asks.*nobody.*AWS_PROFILE"):
        refresh(TODAY, folder=folder)


def test_no_connection(environment: pytest.MonkeyPatch, folder: Path) -> None:
    with Pricing() as gone:
        environment.setenv("AWS_ENDPOINT_URL", gone.url)
    environment.setattr("time.sleep", lambda _seconds: None)  # between botocore's attempts
    with pytest.raises(ConfigError, match=r"(?s)cannot be reached.*HTTPS_PROXY"):
        refresh(TODAY, folder=folder)


def test_boto3_is_asked_for_only_here(environment: pytest.MonkeyPatch, folder: Path) -> None:
    environment.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(ConfigError, match=r"(?s)needs boto3, which is not installed.*uv pip install"):
        refresh(TODAY, folder=folder)


@pytest.mark.parametrize("broken", [INSTANCES.replace("gpus: 8", "gpus: eight"), INSTANCES + INSTANCES[9:], "{"])
def test_a_broken_catalog_is_not_touched(aws: Pricing, folder: Path, broken: str) -> None:
    (folder / "aws-instances.yaml").write_text(broken)
    with pytest.raises(ConfigError, match=r"(?s)aws-instances.yaml: cannot be used.*fleet catalog check"):
        refresh(TODAY, folder=folder)
    assert (folder / "aws-instances.yaml").read_text() == broken
    assert aws.asked == []


def test_a_folder_that_cannot_be_written_to(aws: Pricing, environment: pytest.MonkeyPatch, folder: Path) -> None:
    aws.prices["p5.48xlarge", "us-east-1"] = "1"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    environment.setattr("ruamel.yaml.YAML.dump", full)
    with pytest.raises(ConfigError, match=r"aws-instances.yaml: cannot be written: No space left on device"):
        refresh(TODAY, folder=folder)
    assert texts(folder)["aws-instances.yaml"] == INSTANCES
    assert sorted(file.name for file in folder.iterdir()) == ["aws-instances.yaml", "aws-services.yaml"]


def test_the_command(aws: Pricing, environment: pytest.MonkeyPatch, folder: Path) -> None:
    aws.prices["p5.48xlarge", "us-east-1"] = "49.5360000000"
    del aws.prices["p5.48xlarge", "us-east-2"]
    environment.setattr(prices, "refresh", lambda _today, regions, say: refresh(TODAY, regions, say, folder))
    result = CliRunner().invoke(cli.app, ["prices", "refresh", "--region", "us-east-1", "--region", "us-east-2"])
    assert result.exit_code == 0
    assert result.stdout == "p5.48xlarge in us-east-1: 55.04 -> 49.536 USD per hour\n"
    assert "asking for p5.48xlarge (1 of 3)" in result.stderr
    assert "warning: p5.48xlarge in us-east-2: AWS has no on-demand price, 55.04 stays" in result.stderr
    assert result.stderr.endswith("prices changed: 1, as they were: 1, not known to AWS: 1\n")


def test_the_catalog_itself(aws: Pricing, tmp_path: Path) -> None:
    for file in FOLDER.glob("*.yaml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    types = rows(Instance, FOLDER / "aws-instances.yaml", "instances")
    aws.prices = {(name, region): str(usd) for name, row in types.items() for region, usd in row.usd_per_hour.items()}
    done = refresh(TODAY, folder=tmp_path)
    assert done.changes == []
    assert done.confirmed == len(aws.prices) > 80
    after = rows(Instance, tmp_path / "aws-instances.yaml", "instances")
    assert {row.date for row in after.values() if row.usd_per_hour} == {"2027-03"}
    dated = re.compile(r"(prices: .*|date: .*)")
    before = (FOLDER / "aws-instances.yaml").read_text().splitlines()
    written = (tmp_path / "aws-instances.yaml").read_text().splitlines()
    assert [dated.sub("", line) for line in written] == [dated.sub("", line) for line in before]
    assert check(TODAY, tmp_path)[0] == ()
