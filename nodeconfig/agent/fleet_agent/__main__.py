"""Command line of the agent package: what runs on a machine.

python -m fleet_agent apply BUNDLE [--root DIR]   take the machine to a bundle
python -m fleet_agent boot [--root DIR]           start the process manager, and with it every program
python -m fleet_agent halt [--root DIR]           stop everything
python -m fleet_agent start FILE                  become the engine that FILE describes (run by the process manager)
python -m fleet_agent serve FILE                  be the agent that FILE describes (run by the process manager)
python -m fleet_agent names FILE                  tell HAProxy which engines there are (run by the process manager)
python -m fleet_agent peers FILE                  find the other gateways (run by the process manager)
python -m fleet_agent sweep FILE                  strike out engines that died (run by the process manager)
python -m fleet_agent ladder FILE                 ask the next rung for what one cannot get (run by the process manager)
python -m fleet_agent fetch FILE --bucket NAME --region R [--wait-s N]   bring the weights that FILE names from S3
python -m fleet_agent move BUNDLE                 the same as apply, on a machine of a cloud: weights and units too
python -m fleet_agent watch FILE                  stand between the machine that FILE describes and its cloud
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from fleet_agent.machine import AgentError, Bundle, Machine

HALT_S = 120
LASTING = ("start", "serve", "names", "peers", "sweep", "ladder")
"""Each is a function of the module of its name."""


def main() -> int:
    """Exit code 0: done. 1, or what the error says: could not, and the text on standard error says why."""
    parser = argparse.ArgumentParser(
        prog="fleet_agent", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    arguments = {"apply": "bundle", "move": "bundle", "boot": "", "halt": ""}
    arguments |= dict.fromkeys((*LASTING, "fetch", "watch"), "file")
    for name, argument in arguments.items():
        sub = commands.add_parser(name)
        if argument:
            sub.add_argument(argument, type=Path)
        if name == "fetch":
            sub.add_argument("--bucket", required=True)
            sub.add_argument("--region", required=True)
            sub.add_argument("--wait-s", type=float, help="give up when nothing came for so long (default: never)")
        sub.add_argument("--root", type=Path, default=Path.cwd(), help="the machine's folder (default: where you are)")
    args = parser.parse_args()
    try:
        _run(args)
    except AgentError as error:
        sys.stderr.write(f"{error}\n")
        return int(getattr(error, "code", 1))
    return 0


def _run(args: argparse.Namespace) -> None:
    # Imported where used: an engine that starts needs none of the agent's libraries.
    if args.command in LASTING:
        getattr(import_module(f"fleet_agent.{args.command}"), args.command)(args.file)
        return
    if args.command == "fetch":
        from fleet_agent.fetch import Patience, fetch  # noqa: PLC0415

        fetch(args.file, args.bucket, args.region, root=args.root, patience=Patience(limit_s=args.wait_s))
        return
    if args.command == "watch":
        from fleet_agent.watch import watch  # noqa: PLC0415

        watch(args.file, args.root)
        return
    from fleet_agent.apply import apply  # noqa: PLC0415
    from fleet_agent.supervise import Supervisor  # noqa: PLC0415

    machine = Machine(args.root)

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    if args.command == "move":
        from fleet_agent.move import move  # noqa: PLC0415

        move(machine, Bundle(args.bundle), say)
    elif args.command == "apply":
        apply(machine, Bundle(args.bundle), say)
    elif args.command == "boot":
        Supervisor(machine).boot(say)
    else:
        Supervisor(machine).halt(HALT_S, say)


if __name__ == "__main__":
    sys.exit(main())
