"""Set-up's order of work: look for everything at once, then install what is missing, side by side."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from infra.paths import toolchain_dir
from toolchain import places, sources
from toolchain.catalogue import Tool, Version, ask_version, catalogue, format_version, look, parse_version
from toolchain.engines import ENGINES, Engine, EngineError, present
from toolchain.engines import install as install_engine
from toolchain.progress import Screen, Step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


INTERRUPTED = 130  # what a shell reports for Ctrl-C


class ToolError(RuntimeError):
    """No source could give a tool; the text has every source's reason."""


def install_all(purpose: str, only: Sequence[str] | None) -> int:
    """Have every tool and engine ready that a purpose wants.

    Args:
        purpose: `up` or `test`.
        only: just these, whatever they are for.

    Returns:
        The exit code: 0 if everything required is there. Everything that is not is reported, not the first only.
    """
    tools = [t for t in catalogue().values() if (t.name in only if only else purpose in t.wanted_for)]
    engines = [e for e in ENGINES.values() if (e.name in only if only else e.name == "vllm")]
    with Screen() as screen, ThreadPoolExecutor(max_workers=len(tools) + len(engines)) as pool:
        work = {t.name: pool.submit(_tool, t, screen) for t in tools} | {
            e.name: pool.submit(_engine, e, screen) for e in engines
        }
        try:
            problems = {name: error for name, job in work.items() if (error := job.exception())}
        except KeyboardInterrupt:
            screen.stop()
            screen.say("", "stopped; what is complete is kept")
            return INTERRUPTED
        if not problems:
            sources.drop_go_caches(screen)
    for name, error in problems.items():
        if not isinstance(error, (ToolError, EngineError)):
            raise error
        screen.console.print(f"\n{name} is missing. {error}", style="red", markup=False)
    return 1 if problems else 0


def _engine(engine: Engine, screen: Screen) -> None:
    if known := present(engine):
        screen.say(engine.name, known)
        return
    with screen.step(engine.name) as step:
        install_engine(engine, step)


def _tool(tool: Tool, screen: Screen) -> None:
    found, on_path = look(tool, places.users_path())
    if found:
        _refresh(tool)
        screen.say(tool.name, on_path)
        return
    if tool.optional:
        screen.say(tool.name, f"left out: {on_path}. {tool.by_hand}")
        return
    if not (folder := _installed(tool)):
        with screen.step(tool.name) as step, places.one_at_a_time(tool.name):
            folder = _installed(tool) or _install(tool, on_path, step)
    _refresh(tool)
    _put_on_path(tool, folder)
    screen.say(tool.name, f"{folder.name.rpartition('-')[2]} in {folder}")


def _installed(tool: Tool) -> Path | None:
    """The folder of the newest usable version that set-up has installed."""
    minimum = parse_version(tool.minimum) or ()
    versions = [
        (version, folder)
        for folder in toolchain_dir().glob(f"{tool.name}-*")
        if (version := parse_version(folder.name)) and version >= minimum and (folder / tool.commands[0]).exists()
    ]
    return max(versions)[1] if versions else None


def _install(tool: Tool, on_path: str, step: Step) -> Path:
    """Try each source in order.

    Raises:
        ToolError: none gave it.
    """
    started = time.monotonic()
    failures = [f"PATH: {on_path}"]
    for source in tool.sources:
        step.say(f"{failures[-1].splitlines()[0]}; trying {sources.describe(tool, source)}")
        try:
            with places.new_folder(toolchain_dir() / tool.folder) as building:
                sources.install(tool, source, building, step)
                version = _working_version(tool, building)
        except sources.SourceError as error:
            failures.append(f"{sources.describe(tool, source)}: {error}")
            if step.stopping:
                break
            continue
        step.say(f"{format_version(version)} installed in {time.monotonic() - started:.0f} s")
        folder = toolchain_dir() / tool.folder
        final = folder.with_name(f"{tool.name}-{format_version(version)}")
        if final != folder:
            shutil.rmtree(final, ignore_errors=True)
            folder.rename(final)
        return final
    tried = "\n".join(f"  - {failure}" for failure in failures)
    raise ToolError(f"Tried:\n{tried}\n  Install {tool.name} {tool.minimum} or newer by hand: {tool.by_hand}")


def _working_version(tool: Tool, folder: Path) -> Version:
    """The version of what a source gave.

    Raises:
        SourceError: it does not run on this machine, or is too old.
    """
    version, said = ask_version(folder / tool.commands[0], tool.version_args)
    if version is None:
        raise sources.SourceError(f"it does not run here: {said}")
    if version < (parse_version(tool.minimum) or ()):
        raise sources.SourceError(f"it is {format_version(version)}, older than {tool.minimum}")
    return version


def _put_on_path(tool: Tool, folder: Path) -> None:
    """Link a tool's commands: last on PATH, or first where PATH has a namesake that will not do."""
    for command in tool.commands:
        shadowed = shutil.which(command, path=places.users_path())
        place = places.first_on_path() if shadowed else places.last_on_path()
        link, target = place / command, os.path.relpath(folder / command, place)
        if link.is_symlink() and os.readlink(link) == target:  # noqa: PTH115 - as written, not resolved
            continue
        place.mkdir(parents=True, exist_ok=True)
        partial = place / f".{command}.{os.getpid()}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target)
        partial.replace(link)


def _refresh(tool: Tool) -> None:
    """Bring what this checkout brings for a tool up to date."""
    if tool.name == "pulumi":
        for folder in toolchain_dir().glob("pulumi-*"):
            if (folder / "language_host.py").exists():
                sources.refresh_language_host(folder)
