"""Inside a world: one machine becomes an image. Run by test_images_on_host.py: on_host_images.py ROLE TREE GIVEN."""

# ruff: noqa: T201 - what it prints is what the test sees
from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from hosts.host import Host, HostError
from hosts.instance import Instance

from infra.catalog import bakes
from infra.paths import ROOT

EXPORTER = """[Unit]
Description=stands in for the DCGM exporter of the parent image
[Service]
ExecStart=/usr/bin/python3 -m http.server 9400 --directory /srv/gpu
[Install]
WantedBy=multi-user.target
"""
OFFLINE = ("env", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/given/wheels")
BOOT_S = 120
STEP_S = 300


def main(role: str, tree: str, given: Path) -> None:
    fakes = Path(sys.modules["hosts"].__path__[0]) / "fakes"
    binds = {str(given): "/given", str(ROOT / "images"): "/images"}
    if role == "engine":
        binds[str(fakes / "nvidia-smi")] = "/usr/bin/nvidia-smi"
    host = Host.boot(Instance(f"i-0{'1' * 16}", "10.0.1.10", b""), Path(tree), binds)
    try:
        host.wait(BOOT_S)
        if role == "engine":
            (host.root / "srv/gpu").mkdir()
            (host.root / "srv/gpu/metrics").write_text("DCGM_FI_DEV_GPU_UTIL 1\n")
            (host.root / "etc/systemd/system/nvidia-dcgm-exporter.service").write_text(EXPORTER)
        digest = (given / "digest").read_text()
        components = bakes.images()[role].components

        try:
            component(host, components[0], "build", "0" * 64)
        except HostError:
            assert not (host.root / "opt/fleet/venv").exists()
            print("a wrong digest is refused before anything is installed")
        began = time.monotonic()
        for name in components:
            component(host, name, "build", digest)
        print(f"built in {time.monotonic() - began:.1f} s")
        validate(host, digest, components)
        host.reboot()
        host.exec("systemctl", "is-system-running", "--wait", check=False, timeout=BOOT_S)
        validate(host, digest, components)
        print("validated after a reboot")
        broken(host, role, digest)
    finally:
        host.destroy()


def component(host: Host, name: str, phase: str, digest: str) -> None:
    """One phase of one component."""
    command = [*OFFLINE, "python3", "/images/run_component.py", f"/images/components/{name}.yaml", phase]
    if name == "fleet":
        command += ["--set", f"Source=s3://bucket/runtime/{(Path(sys.argv[3]) / 'digest').read_text()}.json"]
        command += ["--set", f"Sha256={digest}", "--objects", "/given/objects"]
    print(host.exec(*command, timeout=STEP_S))


def validate(host: Host, digest: str, components: tuple[str, ...]) -> None:
    for name in components:
        component(host, name, "validate", digest)


def broken(host: Host, role: str, digest: str) -> None:
    """What validation is for: it fails where something is not as it should be."""
    spoil = {
        "engine": ["sh", "-c", "head -c 2000000 /dev/zero >/var/lib/fleet/model.safetensors"],
        "gateway": ["systemctl", "enable", "--now", "haproxy.service"],
        "monitor": ["sh", "-c", "echo 0.0.0 >/opt/fleet/prometheus/.version"],
    }
    host.exec(*spoil[role])
    try:
        component(host, role, "validate", digest)
    except HostError as error:
        print(f"a broken {role} is refused: {json.dumps(str(error)[-200:])}")
        return
    raise AssertionError(f"a broken {role} passed")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
