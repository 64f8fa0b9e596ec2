"""Command line of the agent package: what runs on a machine.

python -m fleet_agent apply BUNDLE [--root DIR]   take the machine to a bundle
python -m fleet_agent boot [--root DIR]           start the process manager, and with it every program
python -m fleet_agent halt [--root DIR]           stop everything
python -m fleet_agent start FILE                  become the engine that FILE describes (run by the process manager)
python -m fleet_agent serve FILE                  be the agent that FILE describes (run by the process manager)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fleet_agent.machine import AgentError, Bundle, Machine

HALT_S = 120


def main() -> int:
    """Exit code 0: done. 1: could not, and the text on standard error says why."""
    parser = argparse.ArgumentParser(
        prog="fleet_agent", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, argument in (("apply", "bundle"), ("boot", ""), ("halt", ""), ("start", "file"), ("serve", "file")):
        sub = commands.add_parser(name)
        if argument:
            sub.add_argument(argument, type=Path)
        sub.add_argument("--root", type=Path, default=Path.cwd(), help="the machine's folder (default: where you are)")
    args = parser.parse_args()
    try:
        _run(args)
    except AgentError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    # Imported where used: an engine that starts needs none of the agent's libraries.
    if args.command == "start":
        from fleet_agent.start import start  # noqa: PLC0415

        start(args.file)
    if args.command == "serve":
        from fleet_agent.serve import serve  # noqa: PLC0415

        serve(args.file)
    from fleet_agent.apply import apply  # noqa: PLC0415
    from fleet_agent.supervise import Supervisor  # noqa: PLC0415

    machine = Machine(args.root)

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    if args.command == "apply":
        apply(machine, Bundle(args.bundle), say)
    elif args.command == "boot":
        Supervisor(machine).boot(say)
    else:
        Supervisor(machine).halt(HALT_S, say)


if __name__ == "__main__":
    sys.exit(main())
