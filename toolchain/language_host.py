"""The Pulumi engine's host for Python programs, for the CLI that is built from the Go module proxy.

The vendor's own host, a Go program, is in no package registry. This one speaks the same protocol over the SDK's
protocol buffers: it starts the program through `pulumi-language-python-exec` (from the SDK's module, beside this file)
and reports how it ended. It is copied next to the CLI, so it imports nothing of this project. Not here: the debugger,
the type checker option, the code generators, and tool chains other than a virtual environment.

Usage, by the engine only: language_host.py [FLAG…] ENGINE_ADDRESS; the first line on standard output is the port.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
from pulumi.runtime.proto import language_pb2 as pb
from pulumi.runtime.proto import language_pb2_grpc, plugin_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped]

HERE = Path(__file__).resolve().parent
BAIL = 32  # the program has shown its error to the user itself
MAX_MESSAGE_BYTES = 400 << 20  # the engine's own limit

# Run with the program's interpreter, which knows what is installed there.
_LIST_PACKAGES = """
import importlib.metadata as m, json
print(json.dumps(sorted((d.name, d.version) for d in m.distributions())))
"""
_LIST_PLUGINS = """
import glob, json, sys
print(json.dumps([json.load(open(f)) for p in sys.path for f in glob.glob(p + "/pulumi_*/pulumi-plugin.json")]))
"""


class NoInterpreterError(RuntimeError):
    """The program's virtual environment cannot be used; the text says what to do."""


def interpreter(info: pb.ProgramInfo) -> str:
    """The Python that runs the program: its `virtualenv` option's, else the caller's choice.

    Raises:
        NoInterpreterError: the virtual environment is missing or broken.
    """
    option = info.options.fields["virtualenv"].string_value if "virtualenv" in info.options.fields else ""
    if not option:
        return os.environ.get("PULUMI_PYTHON_CMD") or "python3"
    venv = Path(info.root_directory, option)
    python = venv / "bin" / "python"
    try:
        subprocess.run([python, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        state = "is broken" if venv.is_dir() else "does not exist"
        raise NoInterpreterError(
            f"the virtual environment {venv} (option `virtualenv` in Pulumi.yaml) {state}: "
            f"make it with toolchain/bootstrap, in {info.root_directory}"
        ) from None
    return str(python)


def ask(info: pb.ProgramInfo, script: str) -> Any:
    """What `script`, run by the program's interpreter in the program's folder, prints as JSON."""
    answer = subprocess.run(
        [interpreter(info), "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=info.program_directory or None,
    )
    return json.loads(answer.stdout)


class Host(language_pb2_grpc.LanguageRuntimeServicer):
    """One engine's language host.

    Args:
        engine: the engine's gRPC address, handed on to programs.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self._programs: set[subprocess.Popen[bytes]] = set()

    def stop_programs(self) -> None:
        """Ask every program that still runs to end: its engine has gone."""
        for program in list(self._programs):
            program.terminate()

    def Handshake(self, request: pb.LanguageHandshakeRequest, _: Any) -> pb.LanguageHandshakeResponse:  # noqa: N802
        """Learn the engine's address, where it was not on the command line."""
        self.engine = request.engine_address or self.engine
        return pb.LanguageHandshakeResponse()

    def GetPluginInfo(self, _request: Empty, _: Any) -> plugin_pb2.PluginInfo:  # noqa: N802
        """This host's version: the CLI's, which is in the name of the folder that both are in."""
        return plugin_pb2.PluginInfo(version=HERE.name.rpartition("-")[2])

    def GetRequiredPackages(  # noqa: N802
        self, request: pb.GetRequiredPackagesRequest, context: grpc.ServicerContext
    ) -> pb.GetRequiredPackagesResponse:
        """The provider plugins of every installed provider package."""
        try:
            plugins = ask(request.info, _LIST_PLUGINS)
        except NoInterpreterError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.GetRequiredPackagesResponse(
            packages=[
                plugin_pb2.PackageDependency(
                    name=plugin["name"],
                    kind="resource",
                    version=plugin.get("version", ""),
                    server=plugin.get("server", ""),
                )
                for plugin in plugins
                if plugin.get("resource")
            ]
        )

    def GetRequiredPlugins(  # noqa: N802
        self, _request: pb.GetRequiredPluginsRequest, _: Any
    ) -> pb.GetRequiredPluginsResponse:
        """Superseded by GetRequiredPackages."""
        return pb.GetRequiredPluginsResponse()

    def RuntimeOptionsPrompts(self, _request: pb.RuntimeOptionsRequest, _: Any) -> pb.RuntimeOptionsResponse:  # noqa: N802
        """Nothing to ask in `pulumi new`."""
        return pb.RuntimeOptionsResponse()

    def About(self, request: pb.AboutRequest, context: grpc.ServicerContext) -> pb.AboutResponse:  # noqa: N802
        """The interpreter and its version, for `pulumi about`."""
        try:
            executable, version = ask(
                request.info, "import json, sys; print(json.dumps([sys.executable, sys.version.split()[0]]))"
            )
        except NoInterpreterError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.AboutResponse(executable=executable, version=version)

    def GetProgramDependencies(  # noqa: N802
        self, request: pb.GetProgramDependenciesRequest, context: grpc.ServicerContext
    ) -> pb.GetProgramDependenciesResponse:
        """Every distribution that the program's interpreter sees."""
        try:
            packages = ask(request.info, _LIST_PACKAGES)
        except NoInterpreterError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.GetProgramDependenciesResponse(
            dependencies=[pb.DependencyInfo(name=name, version=version) for name, version in packages]
        )

    def InstallDependencies(  # noqa: N802
        self, request: pb.InstallDependenciesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.InstallDependenciesResponse]:
        """`pulumi install`: the project's own toolchain/bootstrap, which knows the lock files."""
        script = Path(request.info.root_directory, "toolchain", "bootstrap")
        if not script.is_file():
            context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"no {script}: install the program's requirements into its virtual environment yourself",
            )
        with subprocess.Popen([script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            for line in process.stdout or ():
                yield pb.InstallDependenciesResponse(stdout=line)
        if process.returncode:
            context.abort(grpc.StatusCode.INTERNAL, f"{script} ended with exit code {process.returncode}")

    def Run(self, request: pb.RunRequest, context: grpc.ServicerContext) -> pb.RunResponse:  # noqa: N802
        """Run the program to its end."""
        try:
            python = interpreter(request.info)
        except NoInterpreterError as error:
            return pb.RunResponse(error=str(error))
        flags = {
            "monitor": request.monitor_address,
            "engine": self.engine,
            "project": request.project,
            "stack": request.stack,
            "organization": request.organization,
            "root_directory": request.info.root_directory,
            "pwd": request.pwd,
            "dry_run": str(request.dryRun).lower(),
            "parallel": str(request.parallel),
        }
        # The engine may hold secrets in config: they go by the environment, never by argv.
        environment = os.environ | {
            "PULUMI_CONFIG": json.dumps(dict(request.config)),
            "PULUMI_CONFIG_SECRET_KEYS": json.dumps(list(request.configSecretKeys)),
            "PYTHONUNBUFFERED": "1",
        }
        program = subprocess.Popen(
            [
                python,
                HERE / "pulumi-language-python-exec",
                *(part for flag, value in flags.items() if value for part in (f"--{flag}", value)),
                Path(request.info.program_directory, request.info.entry_point),
                *request.args,
            ],
            env=environment,
            cwd=request.pwd or None,
        )
        self._programs.add(program)
        # Called when the engine cancels, and, harmlessly, when this call returns.
        context.add_callback(program.terminate)
        code = program.wait()
        self._programs.discard(program)
        if code == BAIL:
            return pb.RunResponse(bail=True)
        return pb.RunResponse(error=f"the program ended with exit code {code}" if code else "")

    def RunPlugin(  # noqa: N802
        self, request: pb.RunPluginRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.RunPluginResponse]:
        """Run a plugin that is written in Python, such as a policy pack, and pass on what it says."""
        try:
            python = interpreter(request.info)
        except NoInterpreterError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        process = subprocess.Popen(
            [python, request.info.program_directory, *request.args],
            stdout=subprocess.PIPE,
            env=os.environ | dict(it.split("=", 1) for it in request.env) | {"PYTHONUNBUFFERED": "1"},
            cwd=request.pwd or None,
        )
        self._programs.add(process)
        context.add_callback(process.terminate)
        assert process.stdout is not None  # noqa: S101 - it was asked for
        # As it comes: the engine waits for the first line, the plugin's port.
        while said := os.read(process.stdout.fileno(), 65536):
            yield pb.RunPluginResponse(stdout=said)
        code = process.wait()
        self._programs.discard(process)
        yield pb.RunPluginResponse(exitcode=code)


def main() -> None:
    """Serve until told to stop, or until the engine has gone without telling."""
    parent = os.getppid()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    host = Host(engine=sys.argv[-1])
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=8),
        options=[(f"grpc.max_{way}_message_length", MAX_MESSAGE_BYTES) for way in ("receive", "send")],
    )
    language_pb2_grpc.add_LanguageRuntimeServicer_to_server(host, server)  # type: ignore[no-untyped-call,unused-ignore]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)  # noqa: T201 - the protocol
    while not stop.wait(timeout=1) and os.getppid() == parent:
        pass
    host.stop_programs()
    server.stop(grace=2).wait()


if __name__ == "__main__":
    main()
