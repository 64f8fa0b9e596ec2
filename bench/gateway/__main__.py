"""The gateway beside direct access and vllm-router, on loopback, in one run.

    toolchain/run python -m bench.gateway [--quick] [--json FILE] [--only cost,skew]

Exit code 1 if a target is missed or could not be measured. docs/gateway-bench.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from bench.gateway.gateways import Cores, end_in_order
from bench.gateway.measure import PARTS, QUICK, SKEW_LOAD, Lab, Size, everything
from bench.gateway.report import machine, targets, text


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some minutes; the figures are rough")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything there too; `-` instead of the tables"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; other targets do not count")
    parser.add_argument("--skew-load", type=float, default=SKEW_LOAD, help="of what the engines can do together")
    args = parser.parse_args()
    end_in_order()
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    facts = machine() | {"date": time.strftime("%Y-%m-%d"), "run": "quick" if args.quick else "full"}
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
        size = QUICK if args.quick else Size()
        lab = Lab(Cores.of_this_machine(), Path(folder), size, skew_load=args.skew_load)
        found = everything(lab, wanted)
    judged = [one for one in targets(found) if one.binding and (one.part in wanted)]
    everything_said = json.dumps(
        {
            "machine": facts,
            "found": found,
            "skipped": lab.skipped,
            "targets": [
                {"what": one.what, "measured": one.measured, "limit": one.limit, "met": one.met, "binding": one.binding}
                for one in targets(found)
            ],
        },
        indent=1,
    )
    if args.json and str(args.json) != "-":
        args.json.write_text(everything_said + "\n", encoding="utf-8")
    print(everything_said if str(args.json) == "-" else text(found, lab.skipped, facts))
    return int(not all(one.met for one in judged))


if __name__ == "__main__":
    sys.exit(main())
