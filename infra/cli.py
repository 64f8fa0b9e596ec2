"""The `fleet` command: look at a stack, and what is too small for `pulumi up`.

Exit codes: 0 done, and all is well; 1 it could not be, or all is not well: standard error says what to do; 2 wrong
usage, or the stack is not deployed; 130 interrupted. What a command needs is imported when it runs, so that `--help`
is fast and planning does not wait for what only other commands need.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from infra.findings import ConfigError, Finding
from infra.paths import ROOT, stacks_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, RenderableType

    from infra.aws_reads import Aws
    from infra.plan.model import FleetPlan
    from infra.weights.lock import LockEntry

DEFAULT_STACK = "local"
PIPED_WIDTH = 200
"""Columns of a table that is not written to a terminal: nothing is cut."""
INTERRUPTED = 130


class _Fleet(TyperGroup):
    """Failures that were foreseen end a command with their own words."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _group(about: str) -> typer.Typer:
    return typer.Typer(
        cls=_Fleet,
        help=about,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app = _group("Look at a stack: what its config becomes, and how it runs. `pulumi up` changes it.")
lock = _group("The models that stacks can name: stacks/models.lock.yaml.")
keys = _group("The API keys of a stack.")
catalog = _group("What plans rest on: GPUs, instance types, prices (infra/catalog).")
prices = _group("The prices in the catalog.")
app.add_typer(lock, name="lock")
app.add_typer(keys, name="keys")
app.add_typer(catalog, name="catalog")
app.add_typer(prices, name="prices")


def _stack_name(name: str) -> str:
    """The last part of what Pulumi calls `organisation/project/stack`."""
    name = name.rpartition("/")[2] or DEFAULT_STACK
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise typer.BadParameter("letters, digits and . _ - only")
    return name


Stack = Annotated[
    str,
    typer.Option(
        "-s",
        "--stack",
        envvar="PULUMI_STACK",
        callback=_stack_name,
        help="Which stack.",
        show_envvar=True,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def _version(value: bool) -> None:  # noqa: FBT001 - typer calls it
    if value:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        typer.echo(f"{project['name']} {project['version']}")
        raise typer.Exit


@app.callback()
def _fleet(
    *,
    _: Annotated[bool, typer.Option("--version", help="Show it and end.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def _console() -> Console:
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPED_WIDTH if wide else None, markup=False, highlight=False)


def _show(view: RenderableType) -> None:
    _console().print(view)


def _say(text: str) -> None:
    """Progress and advice; standard output is for results."""
    typer.echo(text, err=True)


# What it will be.


@app.command()
def plan(
    stack: Stack = DEFAULT_STACK,
    *,
    as_json: Json = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="What else was looked at, and where each value comes from.")
    ] = False,
    against: Annotated[
        typer.FileText | None,
        typer.Option(
            help="What is deployed: the file, or - for standard input, with `pulumi stack output plan --json`."
        ),
    ] = None,
) -> None:
    """What the stack's config becomes: does it fit, on what, with which flags, at what price. Changes nothing.

    Exit code 0: it can be, notices included. 1: it cannot; every finding is on standard error.
    """
    from infra import weights
    from infra.planning import plan_stack_file

    lock = weights.load()
    made = plan_stack_file(stack, lock)
    old = _deployed_plan(against) if against else None
    if as_json:
        typer.echo(made.model_dump_json(indent=1))
        return
    from infra import show_plan

    _show(show_plan.plan(made, explain=explain))
    if old is not None:
        from infra import show_cost
        from infra.planning import changes

        _show(show_cost.changes(changes(old, made, lock)))


def _deployed_plan(file: typer.FileText) -> dict[str, Any]:
    try:
        plan = json.load(file)
    except ValueError as error:
        plan = str(error)
    if not isinstance(plan, dict):
        fix = "`pulumi stack output plan --json` writes it"
        raise ConfigError([Finding("--against", f"is no plan: {plan}", fix)])
    return plan


@app.command()
def fit(
    source: Annotated[Path, typer.Option("--csv", help="Table of engines, as they stand in vLLM's start-up logs.")],
    target: Annotated[Path, typer.Option("--out", help="Where the same table goes, with predictions.")],
    configs: Annotated[
        Path | None,
        typer.Option("--configs", help="Folder of config.json files, org__name.json, of models that the lock lacks."),
    ] = None,
) -> None:
    """Predict for many engines at once whether they fit, and how many tokens their KV cache holds.

    Adds the columns predicted_outcome, predicted_kv_tokens, predicted_max_concurrency and others. A row that does not
    say enough has the reason in predicted_note.
    """
    from infra import weights
    from infra.fit_csv import predict_file

    rows, predicted = predict_file(source, target, configs, weights.load())
    _say(f"{predicted} of {rows} rows predicted, in {target}")


@app.command()
def compare(
    requests: Annotated[int, typer.Option(min=1, help="In a month.")] = 100_000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of one request.")] = 1155,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of one request.")] = 211,
    region: Annotated[str, typer.Option(help="Of AWS.")] = "us-east-1",
    *,
    as_json: Json = False,
) -> None:
    """What a month's requests cost: hosted models, a 70B on an H100, an 8B on an A100; and what all that assumes.

    Exit code 1: the region has no such GPU, or the requests are too long for it.
    """
    from infra import compare as example
    from infra import weights

    found = example.compare(weights.load(), requests, prompt_tokens, answer_tokens, region)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    from infra import show_cost

    _show(show_cost.comparison(found))


@app.command()
def schema() -> None:
    """Write stacks/stack.schema.json, by which editors check stack files."""
    from infra import config

    file = stacks_dir() / "stack.schema.json"
    try:
        file.write_text(json.dumps(config.schema(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError([Finding(str(file), f"cannot be written: {error.strerror}")]) from None
    _say(f"wrote {file}")


# How it is.


@app.command()
def status(
    stack: Stack = DEFAULT_STACK,
    *,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C.")] = False,
) -> None:
    """How the stack runs: engines, gateway, monitoring; on AWS what there is of what the plan wants.

    Exit code 0: every engine is ready and in rotation, every server is up; on AWS all is as planned. 1: something is
    not. 2: the stack is not deployed on this machine, or in this account and region.
    """
    from infra.deployed import Deployed

    looks: Iterator[Any]
    view: Any
    if plan := _aws_plan(stack):
        aws = _aws(plan)
        from infra import show_aws, weights
        from infra.aws_reads import looks as aws_looks

        looks, view = aws_looks(aws, plan, weights.load(), _say), show_aws.status
    else:
        from infra import show
        from infra import status as states

        deployed = Deployed(stack)
        looks = states.watch(deployed) if watch else iter(lambda: states.status(deployed), None)
        view = show.status
    if watch:
        found = _watch(looks, view, as_json=as_json)
    else:
        found = next(looks)
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=1))
        else:
            _show(view(found))
    raise typer.Exit(1 if found.problems else 0)


def _aws_plan(stack: str) -> FleetPlan | None:
    """The plan of a stack on AWS; None: the stack is on this machine, or nowhere."""
    from infra.deployed import Deployed
    from infra.planning import plan_stack_file
    from infra.stack_file import load_stack_file, stack_file

    file = stack_file(stack)
    if Deployed(stack).machines.exists() or not file.exists() or load_stack_file(file).target != "aws":
        return None
    from infra import weights

    return plan_stack_file(stack, weights.load())


def _aws(plan: FleetPlan) -> Aws:
    """AWS where a stack is."""
    try:
        from infra.aws_reads import Aws
    except ModuleNotFoundError as error:
        if error.name not in {"boto3", "botocore"}:
            raise
        fix = f"`make setup STACK={plan.stack}` installs it; by hand: `uv pip sync requirements/aws.txt`"
        raise ConfigError([Finding("target", "aws: the package boto3 is not installed", fix)]) from None
    return Aws(plan.stack, plan.region or "")


def _watch(looks: Iterator[Any], view: Callable[[Any], RenderableType], *, as_json: bool) -> Any:
    """Show each state as it comes; one line of JSON each for programs. Returns the last one."""
    from rich.live import Live

    console = _console()
    found = None
    with Live(console=console, auto_refresh=False) as live:
        try:
            for found in looks:
                if as_json:
                    typer.echo(json.dumps(found.as_json()))
                elif console.is_terminal:
                    live.update(view(found), refresh=True)
                else:
                    console.print(view(found))
        except KeyboardInterrupt:
            if found is None:
                raise
    assert found is not None  # noqa: S101 - it ends by an exception only
    return found


@app.command()
def logs(
    program: Annotated[str, typer.Argument(help="An engine, agent, haproxy, prometheus …")],
    stack: Stack = DEFAULT_STACK,
    *,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines.")] = 50,
) -> None:
    """The log of any program of any machine of the stack, on this machine."""
    from infra.deployed import Deployed

    deployed = Deployed(stack)
    if plan := _aws_plan(stack):
        fix = (
            f"`aws ssm start-session --region {plan.region} --target i-…` (`fleet status` has the machines), then "
            f"`sudo tail -F /var/lib/fleet/machine/log/{program}.log`"
        )
        raise ConfigError([Finding(program, "its log is on the stack's machines, on AWS", fix)])
    deployed.require()
    file = deployed.log(program)
    # -F goes on after the log was rotated.
    tail = subprocess.run(["tail", "-n", str(lines), *(["-F"] if follow else []), str(file)], check=False)
    raise typer.Exit(tail.returncode)


@app.command()
def drain(
    engine: Annotated[str, typer.Argument(help="As `fleet status` calls it; on AWS a node does as well.")],
    stack: Stack = DEFAULT_STACK,
    *,
    undo: Annotated[bool, typer.Option("--undo", help="Put it back.")] = False,
    wait: Annotated[bool, typer.Option(help="Until nothing is in flight.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Even if no other engine serves its model.")] = False,
) -> None:
    """Let an engine have no new requests; those that it has are finished. A restart of the engine ends the drain."""
    from infra import drain as draining
    from infra.deployed import Deployed

    if plan := _aws_plan(stack):
        aws = _aws(plan)
        from infra import aws_drain

        aws_drain.order(aws, plan, engine, _say, undo=undo, wait=wait, force=force)
        return
    deployed = Deployed(stack)
    deployed.require()
    if undo:
        draining.undo(deployed, engine, _say)
    else:
        draining.drain(deployed, [engine], _say, wait=wait, force=force)


# Models.


@lock.command("list")
def lock_list() -> None:
    """Every entry, and whether this machine has it."""
    from infra import show, weights

    _show(show.weights(weights.load()))


@lock.command("check")
def lock_check() -> None:
    """Compare what this machine has of the models with the lock, every byte. Exit code 1 if a file differs.

    Names the entries that have no digests yet; that is no difference.
    """
    from infra import weights

    if findings := weights.check(weights.load(), _say):
        raise ConfigError(findings)


@lock.command("add")
def lock_add(
    source: Annotated[
        str, typer.Argument(help="hf://org/name, hf://org/name@revision, s3://bucket/prefix or file:///folder")
    ],
    name: Annotated[str | None, typer.Option("--name", help="Default: the last part of the source.")] = None,
    variant_of: Annotated[
        str | None, typer.Option("--variant-of", help="The entry that it is a quantised edition of.")
    ] = None,
) -> None:
    """Lock a model: its commit, and size and SHA-256 of every file. Replaces an entry of the same name."""
    from infra import weights

    _say_locked(*weights.add(source, name, variant_of=variant_of, say=_say))


@lock.command("fill")
def lock_fill(name: Annotated[str, typer.Argument(help="An entry with `digests: unknown`.")]) -> None:
    """Ask an entry's own source for the digests that the lock lacks. Until then it can be planned with only."""
    from infra import weights

    _say_locked(*weights.fill(name, say=_say))


def _say_locked(name: str, entry: LockEntry) -> None:
    typer.echo(f"{name}: {entry.format}, {len(entry.files)} files, licence {entry.licence}")


# Keys.


@keys.command("add")
def keys_add(  # noqa: PLR0913, PLR0917 - its limits
    name: Annotated[str, typer.Argument(help="Whose it is: a name for logs and for `revoke`.")],
    stack: Stack = DEFAULT_STACK,
    models: Annotated[str | None, typer.Option(help="Models that it may use, with commas between; else all.")] = None,
    rpm: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Requests that it may begin in a minute.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Requests that it may have open at once.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="The last day on which it is good, in UTC.")
    ] = None,
) -> None:
    """Make an API key, print it once, and write its SHA-256 and its limits into the stack file."""
    from infra import keys as api_keys
    from infra.stack_file import load_stack_file, stack_file

    first = not load_stack_file(stack_file(stack)).api_keys
    named = None if models is None else tuple(filter(None, (model.strip() for model in models.split(","))))
    typer.echo(api_keys.add(stack, name, api_keys.Limits(named, rpm, concurrency, expires)))
    _say(f"This is the only time that it is shown: {stack_file(stack)} has its hash alone.")
    _say(f"`pulumi up -s {stack}` makes it work.")
    if first:
        _say("With the first key in the stack file, the key that the stack made for itself stops working.")


@keys.command("list")
def keys_list(stack: Stack = DEFAULT_STACK) -> None:
    """The keys' names, how their hashes begin, and their limits."""
    from infra import keys as api_keys
    from infra.stack_file import load_stack_file, stack_file
    from infra.targets.local.host import default_key_file

    config = load_stack_file(stack_file(stack))
    for name, key in config.api_keys.items():
        hash_ = key.hash if key.hash.startswith("(") else key.hash[:8]
        typer.echo("  ".join(filter(None, (name, hash_, api_keys.terms(key)))))
    if not config.api_keys:
        file = default_key_file(stack)
        _say(f"None is configured: the stack's own key is in {file}" + ("" if file.exists() else ", after `pulumi up`"))
    if wrong := [finding for finding in config.findings if finding.path.startswith("api-keys")]:
        raise ConfigError(wrong)


@keys.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="As `fleet keys list` shows it.")],
    stack: Stack = DEFAULT_STACK,
) -> None:
    """Take a key out of the stack file."""
    from infra import keys as api_keys
    from infra.stack_file import load_stack_file, stack_file

    api_keys.revoke(stack, name)
    _say(f"{name} is out of {stack_file(stack)}; the key works until `pulumi up -s {stack}`.")
    if not load_stack_file(stack_file(stack)).api_keys:
        _say("It was the last one: from then on the stack's own key works again (`fleet keys list`).")


# The catalog.


@catalog.command("check")
def catalog_check() -> None:
    """Everything that is wrong with the catalog's files, at once. Exit code 1 if something is; old prices are none."""
    from datetime import UTC, datetime

    from infra.catalog.check import check, summary

    findings, warnings = check(datetime.now(UTC).date())
    for warning in warnings:
        _say(f"warning: {warning}")
    if findings:
        raise ConfigError(findings)
    from rich.table import Table

    table = Table(*("file", "facts", "oldest", "newest"), title="the catalog is in order", title_justify="left")
    for name, count, oldest, newest in summary():
        table.add_row(name, str(count), oldest, newest)
    _show(table)


@prices.command("refresh")
def prices_refresh(
    regions: Annotated[
        list[str] | None, typer.Option("--region", help="Only this one; can be given several times. [default: all]")
    ] = None,
) -> None:
    """Ask AWS what the catalog's instance types cost on demand, and write what has changed into the catalog."""
    from datetime import UTC, datetime

    from infra.prices import refresh

    done = refresh(datetime.now(UTC).date(), regions or (), _say)
    for change in done.changes:
        old = "none" if change.old is None else change.old
        typer.echo(f"{change.name} in {change.region}: {old} -> {change.new} USD per hour")
    for kept in done.kept:
        _say(f"warning: {kept}")
    _say(f"prices changed: {len(done.changes)}, as they were: {done.confirmed}, not known to AWS: {len(done.kept)}")


def main() -> None:
    """The entry point."""
    app(prog_name="fleet")


if __name__ == "__main__":
    main()
