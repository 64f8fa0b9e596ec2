"""Commands of set-up. Run them from .venv, which toolchain/bootstrap makes: `toolchain/run python -m toolchain …`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from infra.paths import stacks_dir
from toolchain.catalogue import catalogue
from toolchain.engines import ENGINES


def main() -> int:
    """Read the command line and do it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m toolchain", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="install every tool that is missing or too old")
    install.add_argument(
        "--for", dest="purpose", choices=["up", "test"], default="up", help="what the tools are for (default: up)"
    )
    install.add_argument(
        "--only",
        action="append",
        choices=[*catalogue(), *ENGINES],
        help="just this one; can be repeated. quantize is never installed unasked",
    )
    heal = commands.add_parser("heal", help="clear away what stops the next pulumi")
    heal.add_argument("--stack", default="local")
    arguments = parser.parse_args()
    if arguments.command == "install":
        from toolchain.install import install_all  # noqa: PLC0415 - not needed to heal

        # As Ctrl-C: what was started is ended too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return install_all(arguments.purpose, arguments.only)
    from toolchain.heal import heal as heal_stack  # noqa: PLC0415 - not needed to install

    config = stacks_dir() / f"Pulumi.{arguments.stack}.yaml"
    for sentence in heal_stack(os.environ.get("PULUMI_BACKEND_URL", ""), arguments.stack, config):
        print(sentence, file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
