"""How fast weights come from S3: our reader, which compares digests, against `aws s3 sync` and s5cmd, which do not.

    toolchain/run python bench/s3_fetch.py [--gb 8] [--link-mb 156] [--connection-mb 4.25] [--rounds 1] [--to FOLDER]

The link is a token bucket in a server of our own on loopback (s3_server.py), without TLS: moto copies objects in Python
and would be what is measured. By default it is a twentieth of an instance with 25 Gbit/s and of what S3 gives one
connection, 85 MB/s, so that two cores can play both sides; `--connection-mb 0` leaves only the link. Start of the
program, lists and digests are part of the time, and so is a part of 8 MB on a connection of so little, two seconds at
the end: hence 8 GB, seven minutes in all. The three take turns, and of several rounds the median counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infra.paths import NODECONFIG, ROOT, fleet_dir

FILES = 8
PREFIX = "weights/model/0123456789ab"
LOCKED = ROOT / "requirements" / "s3.txt"
SYNC = "aws s3 sync"
OURS = "fleet_agent fetch"
LINK_TARGET = 0.9
SYNC_TARGET = 2.0


def others() -> Path:
    """The folder of `aws` and `s5cmd`, in a virtual environment of their own: made on the first use, then kept."""
    folder = fleet_dir() / "bench" / f"s3-{hashlib.sha256(LOCKED.read_bytes()).hexdigest()[:12]}"
    if not (folder / "complete").exists():
        uv = str(Path(sys.prefix, "bin", "uv"))
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin/python"), "--require-hashes"]
        subprocess.run([*install, "--no-deps", "-r", LOCKED], check=True)
        (folder / "complete").touch()
    return folder / "bin"


def model(folder: Path, total: int) -> dict[str, dict[str, int | str]]:
    """Files of noise below `folder`, and what the lock would have of them."""
    block = os.urandom(16 << 20)
    (folder / PREFIX).mkdir(parents=True)
    names = [f"model-{number + 1:05}-of-{FILES:05}.safetensors" for number in range(FILES)]
    first = folder / PREFIX / names[0]
    digest = hashlib.sha256()
    left = size = total // FILES
    with first.open("wb") as stream:
        while left:
            part = block[:left]
            stream.write(part)
            digest.update(part)
            left -= len(part)
    for name in names[1:]:  # one content under several names: the server's side needs less memory
        first.with_name(name).hardlink_to(first)
    files: dict[str, dict[str, int | str]] = {name: {"size": size, "sha256": digest.hexdigest()} for name in names}
    (folder / PREFIX / ".complete").write_text(json.dumps(files))
    return files


@contextmanager
def served(folder: Path, link: float, connection: float) -> Iterator[str]:
    """The server's address."""
    settings = {"folder": str(folder), "bytes_per_s": link * 1e6, "connection_bytes_per_s": connection * 1e6}
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout  # noqa: S101
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


@dataclass(frozen=True)
class Result:
    """One run."""

    bytes_per_s: float
    cpu_s: float


def run(command: list[str], environment: Mapping[str, str], out: Path, total: int) -> Result:
    """Run one reader into an empty folder, and see that all came."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True)
    took, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    if found != total:
        raise SystemExit(f"{command[0]} brought {found} of {total} bytes")
    return Result(total / took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def commands(url: str, weights: Path, out: Path) -> dict[str, list[str]]:
    """The command line of each reader."""
    tools = others()
    fetch = [sys.executable, "-m", "fleet_agent", "fetch", str(weights), "--bucket", "b", "--region", "us-east-1"]
    return {
        OURS: fetch,
        SYNC: [str(tools / "aws"), "s3", "sync", "--quiet", f"s3://b/{PREFIX}", str(out)],
        "s5cmd cp": [str(tools / "s5cmd"), "--endpoint-url", url, "cp", f"s3://b/{PREFIX}/*", f"{out}/"],
    }


def main() -> int:
    """Exit code 0: both targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="of weights")
    parser.add_argument("--link-mb", type=float, default=156.0, help="MB/s of the link; 0: none")
    parser.add_argument("--connection-mb", type=float, default=4.25, help="MB/s of one connection; 0: the link's")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--to", type=Path, help="where to write: memory if there is enough of it (default: /tmp)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.to) as name:
        folder = Path(name)
        files = model(folder / "s3", int(args.gb * 1e9) // FILES * FILES)
        total = FILES * int(next(iter(files.values()))["size"])
        out = folder / "out"
        entry = {"name": "model", "prefix": PREFIX, "folder": str(out / "model-0123456789ab"), "files": files}
        weights = folder / "weights.json"
        weights.write_text(json.dumps({"entries": [entry]}))
        results: dict[str, list[Result]] = {}
        with served(folder / "s3", args.link_mb, args.connection_mb) as url:
            environment = {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
                "PYTHONPATH": str(NODECONFIG / "agent"),
            }
            for _ in range(args.rounds):
                for reader, command in commands(url, weights, out).items():
                    results.setdefault(reader, []).append(run(command, environment, out, total))
    return report(results, args.link_mb * 1e6, total)


def report(results: Mapping[str, list[Result]], link: float, total: int) -> int:
    """Print the table and say whether the targets are met."""
    rate = {reader: statistics.median(run.bytes_per_s for run in runs) for reader, runs in results.items()}
    print(f"{'reader':<20}{'MB/s':>8}{'of the link':>13}{'of sync':>9}{'CPU s/GB':>10}")
    for reader, runs in results.items():
        of_link = f"{rate[reader] / link:.2f}" if link else "-"
        cpu = statistics.median(run.cpu_s for run in runs) / total * 1e9
        print(f"{reader:<20}{rate[reader] / 1e6:>8.0f}{of_link:>13}{rate[reader] / rate[SYNC]:>8.2f}x{cpu:>10.1f}")
    met = (not link or rate[OURS] >= LINK_TARGET * link) and rate[OURS] >= SYNC_TARGET * rate[SYNC]
    print(f"targets: {LINK_TARGET} of the link, {SYNC_TARGET:.0f}x {SYNC}: {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
