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
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from infra.findings import ConfigError, Finding
from infra.paths import ROOT, stacks_dir

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from infra.status import Status

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
app.add_typer(lock, name="lock")
app.add_typer(keys, name="keys")


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
    explain: Annotated[bool, typer.Option("--explain", help="Where each value comes from.")] = False,
) -> None:
    """What the stack's config becomes, and whether this machine can hold it. Changes nothing.

    Exit code 0: it can be, notices included. 1: it cannot; every finding is on standard error.
    """
    from infra import weights
    from infra.keys import for_plan
    from infra.plan import make_plan
    from infra.stack_file import load_stack_file, stack_file
    from infra.targets.local.host import read_host

    config = load_stack_file(stack_file(stack))
    made = make_plan(stack, config, weights.load(), read_host(), for_plan(stack, config))
    if as_json:
        typer.echo(made.model_dump_json(indent=1))
        return
    from infra import show

    _show(show.plan(made, explain=explain))


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
    """How the stack runs: engines, gateway, monitoring.

    Exit code 0: every engine is ready and in rotation, every server is up. 1: something is not.
    2: the stack is not deployed on this machine.
    """
    from infra import status as states
    from infra.deployed import Deployed

    if watch:
        found = _watch(Deployed(stack), as_json=as_json)
    else:
        found = states.status(Deployed(stack))
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=1))
        else:
            from infra import show

            _show(show.status(found))
    raise typer.Exit(1 if found.problems else 0)


def _watch(deployed: Any, *, as_json: bool) -> Status:
    """Show each state as it comes; one line of JSON each for programs. Returns the last one."""
    from rich.live import Live

    from infra import show
    from infra import status as states

    console = _console()
    found = None
    with Live(console=console, auto_refresh=False) as live:
        try:
            for found in states.watch(deployed):
                if as_json:
                    typer.echo(json.dumps(found.as_json()))
                elif console.is_terminal:
                    live.update(show.status(found), refresh=True)
                else:
                    console.print(show.status(found))
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
    """The log of any program of any machine of the stack."""
    from infra.deployed import Deployed

    deployed = Deployed(stack)
    deployed.require()
    file = deployed.log(program)
    # -F goes on after the log was rotated.
    tail = subprocess.run(["tail", "-n", str(lines), *(["-F"] if follow else []), str(file)], check=False)
    raise typer.Exit(tail.returncode)


@app.command()
def drain(
    engine: Annotated[str, typer.Argument(help="As `fleet status` calls it.")],
    stack: Stack = DEFAULT_STACK,
    *,
    undo: Annotated[bool, typer.Option("--undo", help="Put it back.")] = False,
    wait: Annotated[bool, typer.Option(help="Until nothing is in flight.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Even if no other engine serves its model.")] = False,
) -> None:
    """Let an engine have no new requests; those that it has are finished. A restart of the engine ends the drain."""
    from infra import drain as draining
    from infra.deployed import Deployed

    deployed = Deployed(stack)
    deployed.require()
    if undo:
        draining.undo(deployed, engine, _say)
    else:
        draining.drain(deployed, engine, _say, wait=wait, force=force)


# Models.


@lock.command("list")
def lock_list() -> None:
    """Every entry, and whether this machine has it."""
    from infra import show, weights

    _show(show.weights(weights.load()))


@lock.command("check")
def lock_check() -> None:
    """Compare what this machine has of the models with the lock, every byte. Exit code 1 if a file differs."""
    from infra import weights

    if findings := weights.check(weights.load(), _say):
        raise ConfigError(findings)


@lock.command("add")
def lock_add(
    source: Annotated[str, typer.Argument(help="hf://org/name, hf://org/name@revision or file:///folder")],
    name: Annotated[str | None, typer.Option("--name", help="Default: the repository's or folder's own.")] = None,
) -> None:
    """Lock a model: its commit, and size and SHA-256 of every file. Replaces an entry of the same name."""
    from infra import weights

    name, entry = weights.add(source, name, say=_say)
    typer.echo(f"{name}: {entry.format}, {len(entry.files)} files, licence {entry.licence}")


# Keys.


@keys.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose it is: a name for logs and for `revoke`.")],
    stack: Stack = DEFAULT_STACK,
) -> None:
    """Make an API key, print it once, and write its SHA-256 into the stack file."""
    from infra import keys as api_keys
    from infra.stack_file import load_stack_file, stack_file

    first = not load_stack_file(stack_file(stack)).api_keys
    typer.echo(api_keys.add(stack, name))
    _say(f"This is the only time that it is shown: {stack_file(stack)} has its hash alone.")
    _say(f"`pulumi up -s {stack}` makes it work.")
    if first:
        _say("With the first key in the stack file, the key that the stack made for itself stops working.")


@keys.command("list")
def keys_list(stack: Stack = DEFAULT_STACK) -> None:
    """The keys' names, and how their hashes begin."""
    from infra.stack_file import load_stack_file, stack_file
    from infra.targets.local.host import default_key_file

    config = load_stack_file(stack_file(stack))
    for name, digest in config.api_keys.items():
        typer.echo(f"{name}  {digest if digest.startswith('(') else digest[:8]}")
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


def main() -> None:
    """The entry point."""
    app(prog_name="fleet")


if __name__ == "__main__":
    main()
