#!/usr/bin/python3
"""Get what this machine runs from S3, verify it, and let systemd go on from there. Needs python3 and boto3.

boot.py              at every boot: what the pointer says; installs the bundle's units and starts fleet.target
boot.py get DIGEST   store one bundle and print its folder
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

NODE = Path("/etc/fleet/node.json")
ROOT = Path("/var/lib/fleet/machine")
UNITS = Path("/etc/systemd/system")
PYTHON = Path("/opt/fleet/venv/bin/python")
INSTALLED = Path("/opt/fleet/installed")
"""There once everything was installed that the image lacks."""
INSTANCE = Path("/var/lib/cloud/data/instance-id")
SERVICES = "services.json"
"""Model to the id of its service in Cloud Map; of the pointer, for fleet-node."""
BOOT_LIMIT_S = 600
"""After so long a machine that does not even get its bundle is given up."""
REFUSED = 78
"""EX_CONFIG of sysexits.h: systemd does not try again."""
PAUSE_S = 3
CLOCK = {"RequestTimeTooSkewed", "RequestExpired", "SignatureDoesNotMatch", "InvalidSignatureException", "AuthFailure"}

Files = dict[str, str]
"""Path to text."""


class Refused(Exception):  # noqa: N818 - as elsewhere
    """Trying again gives the same."""


class Node:
    """This machine, as its user data has it."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = json.loads(NODE.read_text())

    def client(self, service: str) -> Any:
        """A client of boto3's."""
        import boto3  # noqa: PLC0415 - see `main`
        from botocore.config import Config  # noqa: PLC0415

        patience = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 4})
        return boto3.client(service, region_name=self.facts["region"], config=patience)

    def pointer(self) -> dict[str, Any]:
        """What machines of this kind run."""
        name = f"/vllm-fleet/{self.facts['stack']}/{self.facts['machine']}"
        found: dict[str, Any] = json.loads(self.client("ssm").get_parameter(Name=name)["Parameter"]["Value"])
        return found

    @staticmethod
    def keep(pointer: dict[str, Any]) -> None:
        """Note what the pointer says beside the bundle."""
        fresh = ROOT / f".{SERVICES}"
        fresh.write_text(json.dumps(pointer.get("services") or {}), encoding="utf-8")
        fresh.replace(ROOT / SERVICES)

    def objects(self, key: str) -> Files:
        """The files in an object of the bucket."""
        body = self.client("s3").get_object(Bucket=self.facts["bucket"], Key=key)["Body"].read()
        try:
            files: Files = json.loads(body)["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"s3://{self.facts['bucket']}/{key} is not what `pulumi up` puts there: {error!r}") from error
        return files

    def bundle(self, digest: str, secrets: Iterable[str]) -> Path:
        """The folder of a bundle on this machine; one that is there and whole is not fetched again."""
        final = ROOT / "bundles" / digest
        if not damage(read(final), digest):
            return final
        files = self.objects(f"bundles/{digest}.json")
        for arn in secrets:
            files.update(json.loads(self.client("secretsmanager").get_secret_value(SecretId=arn)["SecretString"]))
        wrong = damage(files, digest)
        if wrong:
            raise Refused(
                f"bundle {digest[:12]} is not what its digest says: {'; '.join(wrong[:5])}. Delete "
                f"s3://{self.facts['bucket']}/bundles/{digest}.json and run `pulumi up`, which puts it there anew"
            )
        partial = final.with_name(f".{digest}")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial, files)
        if final.exists():  # edited by hand: programs run from it, so it is mended file by file
            for path in files:
                (final / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).replace(final / path)
            shutil.rmtree(partial)
        else:
            partial.rename(final)
        return final

    def runtime(self, digest: str | None) -> None:
        """Install what an image of one's own has already."""
        folder = Path("/opt/fleet/install")
        if not digest or INSTALLED.exists() or (PYTHON.exists() and not folder.exists()):
            return
        write(folder, self.objects(f"runtime/{digest}.json"))
        say("installing what the image lacks: an image of images/ saves this at every first boot")
        subprocess.run(["/bin/bash", f"install-{self.facts['role']}.sh"], cwd=folder, check=True)
        INSTALLED.touch()

    def abandon(self, why: str) -> None:
        """Let the group end this machine and try another one; later than its launch that does nothing."""
        group, hook = self.facts["group"], self.facts["launch_hook"]
        if group and hook and not (ROOT / "current").exists():
            say(f"ABANDON: {why}")
            self.client("autoscaling").complete_lifecycle_action(
                AutoScalingGroupName=group,
                LifecycleHookName=hook,
                InstanceId=INSTANCE.read_text().strip(),
                LifecycleActionResult="ABANDON",
            )


def say(text: object) -> None:
    """To the journal."""
    print(text, flush=True)  # noqa: T201


def write(folder: Path, files: Files) -> None:
    """Write files below a folder."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def read(folder: Path) -> Files:
    """A bundle's files, as far as they are there."""
    try:
        manifest = (folder / "manifest.json").read_text(encoding="utf-8")
        there = {path: folder / path for path in json.loads(manifest)["files"] if (folder / path).is_file()}
        return {"manifest.json": manifest, **{path: file.read_text(encoding="utf-8") for path, file in there.items()}}
    except (OSError, ValueError, KeyError):
        return {}


def damage(files: Files, digest: str) -> list[str]:
    """What differs between files and a bundle's digest, in words."""
    manifest = files.get("manifest.json", "")
    if hashlib.sha256(manifest.encode()).hexdigest() != digest:
        return ["manifest.json has another SHA-256"]
    wanted = json.loads(manifest)["files"]
    return [
        f"{path} {'is missing' if path not in files else 'has another SHA-256'}"
        for path, sha256 in sorted(wanted.items())
        if path not in files or hashlib.sha256(files[path].encode()).hexdigest() != sha256
    ]


def link(folder: Path) -> None:
    """Point to the bundle that this machine is to run."""
    fresh = ROOT / ".wanted"
    if fresh.is_symlink():
        fresh.unlink()
    fresh.symlink_to(folder)
    fresh.replace(ROOT / "wanted")


def units(folder: Path) -> None:
    """Install the bundle's units; systemd reads them again if one changed."""
    changed = False
    for unit in sorted((folder / "node/units").iterdir()):
        target = UNITS / unit.name
        if not target.exists() or target.read_text() != unit.read_text():
            target.write_text(unit.read_text())
            changed = True
    if changed:
        subprocess.run(["systemctl", "daemon-reload"], check=True)


def until_booted() -> None:
    """Try until it works or the time for a boot is over. What ran before runs on, whatever cannot be reached."""
    node, began = Node(), time.monotonic()
    while True:
        try:
            pointer = node.pointer()
            folder = node.bundle(pointer["bundle"], pointer.get("secrets") or ())
            node.keep(pointer)
            node.runtime(pointer.get("runtime"))
        except Refused as error:
            why, final = str(error), True
        except Exception as error:  # noqa: BLE001 - whatever it is, another try or another machine is the answer
            why, final = explain(error), time.monotonic() - began > BOOT_LIMIT_S
        else:
            link(folder)
            say(f"bundle {pointer['bundle'][:12]} is here")
            return
        if (ROOT / "wanted").exists():
            say(f"{why}: going on with the bundle that is here")
            return
        say(f"{why}{'' if final else ': trying again'}")
        if final:
            node.abandon(why)
            sys.exit(REFUSED)
        time.sleep(PAUSE_S)


def explain(error: Exception) -> str:
    """What went wrong, and what to look at."""
    text = f"{type(error).__name__}: {error}"
    if getattr(error, "response", {}).get("Error", {}).get("Code", "") in CLOCK:
        return f"{text}: is the clock right? it says {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC"
    return text


def main() -> None:
    """See the module's docstring."""
    os.umask(0o077)  # a bundle may hold hashes of keys
    if importlib.util.find_spec("boto3") is None:  # a public image without it
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(["apt-get", "install", "-qy", "python3-boto3", "python3-venv"], check=True)
    if sys.argv[1:2] == ["get"]:
        try:
            node = Node()
            pointer = node.pointer()
            folder = node.bundle(sys.argv[2], pointer.get("secrets") or ())
            node.keep(pointer)
            say(folder)
        except Exception as error:  # noqa: BLE001 - boto3's, of many kinds
            sys.exit(explain(error))
        return
    until_booted()
    units((ROOT / "wanted").resolve())
    subprocess.run(["systemctl", "start", "--no-block", "fleet.target"], check=True)


if __name__ == "__main__":
    main()
