"""The `fleet` command: planning, the lock, and what every command has in common."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from infra import cli, weights
from infra.config import schema
from infra.findings import Finding
from infra.paths import ROOT
from infra.targets.local import host
from infra.weights import lock
from tests.unit.inputs import a_host, a_lock

GOOD = {"target": "local", "models": {"chat": {"weights": "small"}}}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PULUMI_STACK", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("FLEET_STACKS", "FLEET_DIR", "FLEET_SHARED"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(host, "read_host", a_host)
    monkeypatch.setattr(weights, "load", a_lock)
    return tmp_path


def configure(folder: Path, config: dict[str, Any], stack: str = "local") -> None:
    whole = {"config": {f"vllm-fleet:{key}": value for key, value in config.items()}}
    (folder / f"Pulumi.{stack}.yaml").write_text(json.dumps(whole))


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_plan(place: Path) -> None:
    configure(place, GOOD)
    code, output, error = run("plan")
    assert (code, error) == (0, "")
    for words in (
        "chat-1",
        "chat-2",
        "small",
        "float32",
        "18080",
        "this machine can give",
        "http://127.0.0.1:18080/v1",
    ):
        assert words in output
    assert "because" not in output
    assert list(place.iterdir()) == [place / "Pulumi.local.yaml"], "planning writes nothing, not even a key"


def test_plan_of_another_stack(place: Path) -> None:
    configure(place, {**GOOD, "local": {"base-port": 20000}}, "other")
    assert "20080" in run("plan", "-s", "other")[1]
    code, _, error = run("plan")
    assert code == 1
    assert "stacks that have one: other" in error


def test_plan_explains(place: Path) -> None:
    configure(place, GOOD)
    output = run("plan", "--explain")[1]
    assert "where values come from" in output
    line = next(line for line in output.splitlines() if line.startswith("models.chat.context"))
    assert line.split(maxsplit=2)[1:] == ["2048", "default of the target local".ljust(len(line.split(maxsplit=2)[2]))]


def test_plan_for_programs(place: Path) -> None:
    configure(place, GOOD)
    found = json.loads(run("plan", "--json")[1])
    assert found["gateway"]["port"] == 18080
    assert [engine["name"] for engine in found["engines"]] == ["chat-1", "chat-2"]


def test_notices_are_no_failure(place: Path) -> None:
    configure(place, {**GOOD, "models": {"chat": {"weights": "small", "engines": 1}}})
    code, output, _ = run("plan")
    assert code == 0
    assert "an update means that `chat` is down" in output


def test_text_of_the_user_is_not_markup(place: Path) -> None:
    configure(place, {**GOOD, "models": {"chat": {"weights": "[red]x[/nope]"}}})
    code, _, error = run("plan")
    assert code == 1
    assert "[red]x[/nope]" in error


@pytest.mark.parametrize("option", [[], ["--json"], ["--explain"]])
def test_every_finding_at_once(place: Path, option: list[str]) -> None:
    model = {"weights": "smal", "context": "x"}
    configure(place, {"target": "local", "models": {"chat": model}, "gatway": {}, "slo": {"ttft_p95": "10"}})
    code, output, error = run("plan", *option)
    assert (code, output) == (1, "")
    for words in ("did you mean `small`?", "models.chat.context", "did you mean `gateway`?", "slo.ttft_p95"):
        assert words in error
    assert "Traceback" not in error


def test_a_plan_that_does_not_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(place, GOOD)
    monkeypatch.setattr(host, "read_host", lambda: a_host(gib=4))
    code, _, error = run("plan")
    assert code == 1
    assert "do not fit" in error


AWS = {
    "target": "aws",
    "models": {"chat": {"weights": "llama-3.1-8b-instruct"}},
    "pools": {"h100": {"gpu": "h100-80gb"}},
}


def configure_aws(place: Path, **more: object) -> None:
    """A stack on GPUs, with the lock of this repository."""
    whole = {f"vllm-fleet:{key}": value for key, value in {**AWS, **more}.items()}
    (place / "Pulumi.local.yaml").write_text(json.dumps({"config": whole | {"aws:region": "us-east-1"}}))


@pytest.fixture
def own_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of this repository."""
    monkeypatch.setattr(weights, "load", lock.load)


@pytest.mark.usefixtures("own_lock")
def test_a_plan_on_gpus(place: Path) -> None:
    configure_aws(place)
    code, output, error = run("plan")
    assert code == 0, error
    assert "on aws us-east-1" in output
    assert "does it fit" in output
    assert "a month" in output.splitlines()[0]
    assert "choices for chat" not in output


@pytest.mark.usefixtures("own_lock")
def test_a_plan_explained(place: Path) -> None:
    configure_aws(place)
    code, output, _ = run("plan", "--explain")
    assert code == 0
    assert "choices for chat" in output
    assert "chosen" in output
    assert "pools.h100.instance" in output


@pytest.mark.usefixtures("own_lock")
def test_a_plan_for_programs(place: Path) -> None:
    configure_aws(place)
    code, output, _ = run("plan", "--json")
    assert code == 0
    made = json.loads(output)
    assert made["pools"][0]["name"] == "h100"
    assert made["choices"][0]["chosen"]


@pytest.mark.usefixtures("own_lock")
def test_a_plan_over_budget(place: Path) -> None:
    configure_aws(place, budget={"usd_per_hour": 1})
    code, _, error = run("plan")
    assert code == 1
    assert "budget.usd_per_hour: the fleet costs" in error


@pytest.mark.usefixtures("own_lock")
def test_a_plan_against_what_is_deployed(place: Path, tmp_path: Path) -> None:
    configure_aws(place)
    deployed = tmp_path / "deployed.json"
    deployed.write_text(run("plan", "--json")[1])
    assert "no change" in run("plan", "--against", str(deployed))[1]
    configure_aws(place, models={"chat": {"weights": "llama-3.1-8b-instruct", "context": 4096, "engines": 3}})
    output = run("plan", "--against", str(deployed))[1]
    assert "context 8,192 → 4,096" in output
    deployed.write_text("[]")
    code, _, error = run("plan", "--against", str(deployed))
    assert code == 1
    assert "is no plan" in error


@pytest.mark.usefixtures("own_lock")
def test_fit(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("model,gpu\nllama-3.1-8b-instruct,H100\nnobody,H100\n")
    code, _, error = run("fit", "--csv", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out.csv"))
    assert code == 0
    assert "1 of 2 rows predicted" in error
    assert run("fit", "--csv", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out.csv"))[0] == 1


def test_lock_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "load", lock.load)
    code, output, _ = run("lock", "list")
    assert code == 0
    row = next(line for line in output.splitlines() if line.startswith("smollm2-135m-instruct-w8a8"))
    assert "made here from smollm2-135m-instruct" in row
    assert row.split()[1] == "w8a8-int8"


def test_lock_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "load", lock.load)
    assert run("lock", "check")[0] == 0, "of nothing, all is right"
    wrong = [Finding("weights/small/config.json", "is missing", "`pulumi up` mends it")]
    monkeypatch.setattr(weights, "check", lambda *_: wrong)
    code, _, error = run("lock", "check")
    assert code == 1
    assert "weights/small/config.json: is missing" in error


def test_lock_add_refuses_what_is_no_source() -> None:
    code, _, error = run("lock", "add", "https://example.org/model")
    assert code == 1
    assert "hf://org/name" in error


def test_lock_add(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(source: str, name: str | None, *, variant_of: str | None, say: Any) -> tuple[str, Any]:
        say(f"asked for {source}, a variant of {variant_of}")
        return name or "small", a_lock().models["small"]

    monkeypatch.setattr(weights, "add", add)
    code, output, error = run("lock", "add", "hf://org/name", "--name", "mine", "--variant-of", "base")
    assert (code, error) == (0, "asked for hf://org/name, a variant of base\n")
    assert output == "mine: bf16, 1 files, licence Apache-2.0\n"


def test_lock_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "fill", lambda name, *, say: (say("asked"), (name, a_lock().models["small"]))[1])
    assert run("lock", "fill", "mine") == (0, "mine: bf16, 1 files, licence Apache-2.0\n", "asked\n")


def test_schema(place: Path) -> None:
    assert run("schema")[0] == 0
    assert json.loads((place / "stack.schema.json").read_text()) == schema()


def test_schema_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_STACKS", str(place / "nowhere"))
    code, _, error = run("schema")
    assert code == 1
    assert "cannot be written" in error


def test_version() -> None:
    code, output, _ = run("--version")
    assert code == 0
    assert output.split()[0] == "vllm-fleet"


@pytest.mark.parametrize("command", [[], ["plan"], ["status"], ["logs"], ["drain"], ["lock"], ["keys"], ["schema"]])
def test_help(command: list[str]) -> None:
    code, output, _ = run(*command, "--help")
    assert code == 0
    assert "Usage: " in output


def test_planning_needs_neither_pulumi_nor_a_client_of_hubs(place: Path) -> None:
    configure(place, GOOD)
    program = (
        "import sys\n"
        "from infra import cli\n"
        "sys.argv = ['fleet', 'plan', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert 'infra.config' not in sys.modules, 'help needs nothing'\n"
        "from infra import show, weights\n"
        "from infra.targets.local import host\n"
        "from infra.plan import make_plan\n"
        "slow = {'pulumi', 'huggingface_hub', 'httpx', 'aiohttp'} & sys.modules.keys()\n"
        "assert not slow, slow\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_module_runs_as_a_program(place: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "infra.cli", "plan"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "Pulumi.local.yaml: there is no such stack file\n"
    assert list(place.iterdir()) == []
