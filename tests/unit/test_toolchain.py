"""Looking for tools, and getting them from the first source that answers."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.server
import io
import os
import re
import socket
import tarfile
import threading
import tomllib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from toolchain import engines, fetch, install, places, sources
from toolchain.catalogue import Release, Tool, Wheel, catalogue, look, parse_version
from toolchain.progress import CommandError, Screen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def command(folder: Path, name: str, output: str, code: int = 0) -> Path:
    """A program that prints and ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def tool(**changes: Any) -> Tool:
    fields: dict[str, Any] = {
        "name": "thing",
        "commands": ["thing"],
        "version_args": ["-v"],
        "minimum": "2.6.0",
        "pinned": "2.8.1",
        "for": ["up"],
        "by_hand": "ask your administrator",
    }
    return Tool.model_validate(fields | changes)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty shared folder, and a PATH with no tools of ours."""
    monkeypatch.setenv("FLEET_SHARED", str(tmp_path / "shared"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "path"), "/usr/bin", "/bin"]))
    return tmp_path / "shared"


class Vendor(http.server.SimpleHTTPRequestHandler):
    """A vendor's download site."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        body = self.files.get(self.path)
        self.send_response(200 if body is not None else 404)
        self.send_header("content-length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def vendor() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A site on loopback: its address, and its files by path."""
    files: dict[str, bytes] = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Site", (Vendor,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    thread.join()
    server.server_close()


def archive(version: str) -> bytes:
    """A release: one top folder with the program in it."""
    program = f"#!/bin/sh\necho thing {version}\n".encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry = tarfile.TarInfo("thing-release/thing")
        entry.size, entry.mode = len(program), 0o755
        tar.addfile(entry, io.BytesIO(program))
    return buffer.getvalue()


def release(site: str) -> Release:
    return Release(
        kind="release",
        url=site + "/thing-{version}.tar.gz",
        checksums=site + "/sums.txt",
        arch={"x86_64": "x64", "aarch64": "arm64"},
    )


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("v3.259.0", (3, 259, 0)),
        ("HAProxy version 2.8.25-5cf5d0683 2026/06/26 - https://haproxy.org/", (2, 8, 25)),
        ("nginx version: nginx/1.22.1", (1, 22, 1)),
        ("prometheus, version 2.42.0+ds (branch: debian/sid)", (2, 42, 0)),
        ("go version go1.27.3 linux/amd64", (1, 27, 3)),
        ("Version 11.2 (commit: 1)", (11, 2)),
        ("no number here", None),
    ],
)
def test_versions_are_read_from_what_tools_say(said: str, version: tuple[int, ...] | None) -> None:
    assert parse_version(said) == version


@pytest.mark.parametrize(
    ("said", "code", "usable", "why"),
    [
        ("thing 2.6.0", 0, True, "2.6.0 at"),
        ("thing 2.10.0", 0, True, "2.10.0 at"),
        ("thing 2.5.99", 0, False, "older than 2.6.0"),
        ("pyenv: thing: command not found", 127, False, "does not tell its version: pyenv"),
    ],
)
def test_a_tool_on_path_must_run_and_be_new_enough(
    tmp_path: Path,
    said: str,
    code: int,
    usable: bool,  # noqa: FBT001 - a column of the table
    why: str,
) -> None:
    command(tmp_path, "thing", said, code)
    found, sentence = look(tool(), str(tmp_path))
    assert bool(found) is usable
    assert why in sentence


def test_a_tool_must_have_all_its_commands(tmp_path: Path) -> None:
    command(tmp_path, "thing", "thing 3.0.0")
    found, sentence = look(tool(commands=["thing", "thingtool"]), str(tmp_path))
    assert found is None
    assert "thingtool is not" in sentence
    command(tmp_path, "thingtool", "")
    assert look(tool(commands=["thing", "thingtool"]), str(tmp_path))[0]


def test_what_belongs_beside_a_tool_may_be_in_the_folder_that_its_link_points_to(tmp_path: Path) -> None:
    """A vendor's CLI is often linked onto PATH by itself."""
    real = command(tmp_path / "opt", "thing", "thing 3.0.0")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "thing").symlink_to(real)
    wanted = tool(beside=["thing-helper"])
    assert look(wanted, str(tmp_path / "path"))[0] is None
    command(tmp_path / "opt", "thing-helper", "")
    assert look(wanted, str(tmp_path / "path"))[0]


def quiet_screen() -> tuple[Screen, io.StringIO]:
    text = io.StringIO()
    return Screen(Console(file=text, width=200)), text


def test_sources_are_tried_in_order_and_every_reason_is_told(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        first = release(f"http://127.0.0.1:{unused.getsockname()[1]}")
        second = Wheel(kind="wheel", requirements="nothing.txt", folder="bin")
        monkeypatch.setattr(places, "uv", lambda: "/nonexistent/uv")
        screen, text = quiet_screen()
        with screen, pytest.raises(install.ToolError) as error:
            install._tool(tool(sources=[first, second]), screen)
    report = str(error.value)
    order = [
        report.index(part) for part in ("PATH: not on PATH", "127.0.0.1 does not answer", "/nonexistent/uv", "ask your")
    ]
    assert order == sorted(order)
    assert "trying the vendor's release 2.8.1" in text.getvalue()
    assert not [entry for entry in (shared / "toolchain").iterdir() if entry.name != "locks"]


def test_a_release_is_installed_linked_and_found_again(shared: Path, vendor: tuple[str, dict[str, bytes]]) -> None:
    site, files = vendor
    body = archive("2.8.1")
    files["/thing-2.8.1.tar.gz"] = body
    files["/sums.txt"] = f"{'0' * 64}  other\n{hashlib.sha256(body).hexdigest()} *thing-2.8.1.tar.gz\n".encode()
    screen, text = quiet_screen()
    with screen:
        install._tool(tool(sources=[release(site)]), screen)
    link = shared / "toolchain" / "bin" / "thing"
    assert link.resolve() == shared / "toolchain" / "thing-2.8.1" / "thing"
    assert "MB)" in text.getvalue()
    files.clear()
    with screen:
        install._tool(tool(sources=[release(site)]), screen)


def test_a_release_that_differs_from_its_checksum_is_refused(
    shared: Path, vendor: tuple[str, dict[str, bytes]]
) -> None:
    site, files = vendor
    files["/thing-2.8.1.tar.gz"] = archive("2.8.1")
    files["/sums.txt"] = f"{'0' * 64}  thing-2.8.1.tar.gz\n".encode()
    screen, _ = quiet_screen()
    with screen, pytest.raises(install.ToolError, match="refused"):
        install._tool(tool(sources=[release(site)]), screen)
    assert not (shared / "toolchain" / "thing-2.8.1").exists()


def test_a_source_that_gives_too_old_a_version_is_passed_over(
    shared: Path, vendor: tuple[str, dict[str, bytes]]
) -> None:
    site, files = vendor
    body = archive("2.4.0")
    files["/thing-2.8.1.tar.gz"] = body
    files["/sums.txt"] = f"{hashlib.sha256(body).hexdigest()}  thing-2.8.1.tar.gz\n".encode()
    screen, _ = quiet_screen()
    with screen, pytest.raises(install.ToolError, match=re.escape("2.4.0, older than 2.6.0")):
        install._tool(tool(sources=[release(site)]), screen)
    assert not (shared / "toolchain" / "thing-2.8.1").exists()


def test_a_file_missing_from_the_list_of_checksums_is_an_error() -> None:
    with pytest.raises(fetch.FetchError, match=re.escape("no thing.tar.gz")):
        fetch.checksum_of("thing.tar.gz", "abc  thing.tar.gz.sig\n")


def test_an_installed_tool_comes_before_an_old_one_on_path_and_after_a_good_one(shared: Path, tmp_path: Path) -> None:
    command(shared / "toolchain" / "thing-2.8.1", "thing", "thing 2.8.1")
    screen, _ = quiet_screen()
    command(tmp_path / "path", "thing", "thing 2.0.0")
    install._tool(tool(), screen)
    assert (shared / "toolchain" / "override" / "thing").exists()
    (tmp_path / "path" / "thing").unlink()
    install._tool(tool(), screen)
    assert (shared / "toolchain" / "bin" / "thing").exists()


def test_our_own_links_on_path_are_not_taken_for_the_users_tools(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = shared / "toolchain" / "bin"
    command(ours, "thing", "thing 9.9.9")
    monkeypatch.setenv("PATH", f"{ours}{os.pathsep}/usr/bin")
    assert look(tool(), places.users_path())[0] is None


def test_an_optional_tool_is_left_out_aloud(shared: Path) -> None:
    screen, text = quiet_screen()
    install._tool(tool(optional=True), screen)
    assert "left out: not on PATH" in text.getvalue()
    assert not shared.exists()


def test_a_folder_takes_its_place_only_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "engine"
    final.mkdir()
    (final / "old").touch()
    with contextlib.suppress(RuntimeError), places.new_folder(final) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert [entry.name for entry in final.iterdir()] == ["old"]
    # What a killed run leaves behind is not kept either.
    (tmp_path / ".engine.building").mkdir()
    (tmp_path / ".engine.building" / "half").touch()
    with places.new_folder(final) as folder:
        (folder / "new").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["engine"]
    assert [entry.name for entry in final.iterdir()] == ["new"]


def test_a_failed_command_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    failing = command(tmp_path, "fails", "the disk is full", 3)
    screen, _ = quiet_screen()
    with screen.step("x") as step, pytest.raises(CommandError, match=r"exit code 3:\nthe disk is full"):
        step.run([failing])


def test_an_engine_counts_only_with_the_stamp_of_this_recipe(shared: Path) -> None:
    engine = engines.ENGINES["vllm"]
    assert engine.path.is_relative_to(shared)
    python = command(engine.path / "bin", "python", "")
    assert not engines.present(engine), "a half-made environment has no stamp"
    stamp = engine.path / engines.STAMP
    stamp.write_text(f'{{"recipe": "{engines.recipe(engine)}", "torch": "torch 2"}}', encoding="utf-8")
    assert "torch 2" in engines.present(engine)
    stamp.write_text('{"recipe": "another", "torch": "torch 2"}', encoding="utf-8")
    assert not engines.present(engine)
    stamp.write_text(f'{{"recipe": "{engines.recipe(engine)}", "torch": "torch 2"}}', encoding="utf-8")
    python.unlink()
    assert not engines.present(engine), "its Python has gone"


class Recorder:
    """A step that runs nothing: it notes commands, and fails those that have a certain word in them."""

    def __init__(self, failing: str = "") -> None:
        self.commands: list[str] = []
        self.said: list[str] = []
        self.failing = failing
        self.stopping = False

    def run(self, command: list[Any], **_: Any) -> str:
        self.commands.append(" ".join(map(str, command)))
        if self.failing and self.failing in self.commands[-1]:
            raise CommandError("refused")
        if command[1] == "venv":
            (command[-1] / "bin").mkdir()
            (command[-1] / "bin" / "python").touch()
        return "torch 2.13.0"

    def say(self, text: str) -> None:
        self.said.append(text)

    def status(self, text: str) -> None:
        pass


@pytest.mark.parametrize(
    ("index_answers", "failing", "torch_from"),
    [(True, "", "torch-cpu.txt"), (False, "", "torch.txt"), (True, "torch-cpu.txt", "torch.txt")],
)
def test_torch_comes_from_the_vendors_cpu_index_if_that_works(
    shared: Path, monkeypatch: pytest.MonkeyPatch, *, index_answers: bool, failing: str, torch_from: str
) -> None:
    def read_small(url: str) -> str:
        if not index_answers:
            raise fetch.FetchError(f"{url} does not answer")
        return ""

    monkeypatch.setattr(engines, "unsupported", lambda: "")
    monkeypatch.setattr(fetch, "read_small", read_small)
    step = Recorder(failing)
    engines.install(engines.ENGINES["vllm"], step)  # type: ignore[arg-type]
    last = [command for command in step.commands if "torch" in command and "--require-hashes" in command][-1]
    assert last.endswith(torch_from)
    # Nothing but torch may come from an index that has other packages too.
    assert ("--default-index" in last) is (torch_from == "torch-cpu.txt")
    assert ("vllm.txt" in last) is (torch_from == "torch.txt")
    assert engines.present(engines.ENGINES["vllm"])
    assert [entry.name for entry in (shared / "engines").iterdir()] == ["vllm-0.32.0"]


def test_a_full_disk_is_told_before_anything_is_downloaded(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "unsupported", lambda: "")
    monkeypatch.setattr(fetch, "read_small", lambda _: "")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000_000))
    monkeypatch.setattr(places, "uv", lambda: "/nonexistent/uv")
    screen, _ = quiet_screen()
    with screen.step("vllm") as step, pytest.raises(engines.EngineError, match=r"1\.0 GB free.*FLEET_SHARED"):
        engines.install(engines.ENGINES["vllm"], step)
    assert not (shared / "engines" / "vllm-0.32.0").exists()


def test_macos_is_told_at_once_what_to_do_instead(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    screen, _ = quiet_screen()
    with screen.step("vllm") as step, pytest.raises(engines.EngineError, match="Linux container"):
        engines.install(engines.ENGINES["vllm"], step)
    assert not shared.exists()


def test_every_tool_that_is_required_can_be_got_and_says_how_by_hand() -> None:
    for entry in catalogue().values():
        assert entry.by_hand
        assert entry.optional or entry.sources
        if entry.pinned:
            assert (parse_version(entry.pinned) or ()) >= (parse_version(entry.minimum) or ())
        for source in entry.sources:
            if isinstance(source, Wheel):
                assert (places.REQUIREMENTS / source.requirements).is_file()


def test_the_lock_files_agree_with_each_other() -> None:
    pins = {
        file.stem: dict(re.findall(r"^([a-z0-9-]+)==([^ \\\n]+)", file.read_text(encoding="utf-8"), re.MULTILINE))
        for file in places.REQUIREMENTS.glob("*.txt")
    }
    assert pins["torch-cpu"]["torch"] == pins["torch"]["torch"] + "+cpu"
    assert pins["torch-overrides"]["torch"] == pins["torch"]["torch"]
    assert pins["uv"]["uv"] == pins["fleet"]["uv"]
    assert pins["fleet"].items() <= pins["dev"].items(), "dev is fleet and more"
    alias = tomllib.loads((engines.HERE / "vllm-alias" / "pyproject.toml").read_text(encoding="utf-8"))
    assert alias["project"]["version"] == engines.ENGINES["vllm"].version + "+cpu"
    for name in ("fleet", "dev", "vllm", "quantize", "torch", "haproxy", "go", "uv"):
        text = (places.REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
        assert text.count("--hash=sha256:") >= len(pins[name]), f"{name}.txt is not locked by hash"
        assert "://" not in text, "an index's address does not belong in a lock"
    assert not {p for p in pins["vllm"] if p.startswith(("torch", "nvidia-", "cuda-"))}, "those are in torch.txt"


def test_a_wheels_program_is_linked_to_where_its_libraries_are(tmp_path: Path) -> None:
    program = command(tmp_path / "wheel" / "bin", "thing", "thing 2.8.1")
    program.chmod(0o644)
    sources._link(tmp_path, tmp_path / "wheel" / "bin", ["thing"])
    assert (tmp_path / "thing").resolve() == program
    assert os.access(tmp_path / "thing", os.X_OK)


def test_caches_of_go_stay_as_long_as_anything_builds(shared: Path) -> None:
    objects = shared / "cache" / "go-build" / "object"
    objects.mkdir(parents=True)
    screen, _ = quiet_screen()
    with places.one_at_a_time(sources.GO_CACHES, fcntl.LOCK_SH):
        sources.drop_go_caches(screen)
        assert objects.exists()
    sources.drop_go_caches(screen)
    assert not objects.exists()


def test_stopping_ends_what_runs_and_begins_nothing_new(shared: Path, tmp_path: Path) -> None:
    """Ctrl-C must not be taken for a source that failed, and the next one be tried."""
    started = tmp_path / "started"
    os.mkfifo(started)
    slow = command(tmp_path / "slow", "uv", "")
    slow.write_text(f"#!/bin/sh\necho >{started}\nexec sleep 600\n", encoding="utf-8")
    wheel = Wheel(kind="wheel", requirements="haproxy.txt", folder="bin")
    screen, text = quiet_screen()
    errors: list[Exception] = []

    def work() -> None:
        try:
            install._tool(tool(sources=[wheel, wheel]), screen)
        except install.ToolError as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "uv", lambda: str(slow))
        thread = threading.Thread(target=work)
        thread.start()
        started.read_text(encoding="utf-8")  # the first source is at work
        screen.stop()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert errors
    assert text.getvalue().count("trying") == 1
    assert not list((shared / "toolchain").glob("*thing*/*"))
