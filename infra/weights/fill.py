"""Fill a stack's weights cache: the command that the stack's build job runs.

    python -m infra.weights.fill --bucket NAME --region R --request fill/<sha256>.json [--discard]

The token for the hub is the hub client's business (HF_TOKEN), and never an argument.
"""

from __future__ import annotations

import argparse
import sys

from botocore.exceptions import BotoCoreError, ClientError

from infra.findings import ConfigError
from infra.weights.lock import load
from infra.weights.upload import Target, fill


def main() -> int:
    """Exit code 0: all is in the bucket. 1: something is not, and the text on standard error says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--region", required=True)
    parser.add_argument("--request", required=True, help="key of the request in the bucket")
    parser.add_argument("--discard", action="store_true", help="remove from this disk what is in the bucket")
    args = parser.parse_args()

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    try:
        fill(Target.of(args.bucket, args.region), args.request, load(), say, discard=args.discard)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except (BotoCoreError, ClientError) as error:
        fix = "check the job's role; the next run goes on where this one ended"
        sys.stderr.write(f"s3://{args.bucket}: {error}\n    {fix}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
