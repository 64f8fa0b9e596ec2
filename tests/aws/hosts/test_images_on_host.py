"""The components of images on booted hosts: build, validate, reboot, validate again.

The stand-in for AWS refuses Image Builder, so a small program runs the steps. What they cannot have there: a GPU (a
program answers for nvidia-smi, a unit for the DCGM exporter), the Internet (packages are in the image, wheels and
archives in folders), vLLM's wheels of 8 GB and the monitor's programs (small ones that say their version). The rest is
real: Debian, systemd, apt, pip with hashes, the agent's Python, node exporter, HAProxy, nginx. Needs what test_hosts.py
needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import pytest

from infra.catalog import bakes
from tests.aws.hosts.baking import LIMIT_S


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("role", sorted(bakes.images()))
def test_the_components_of_an_image_build_and_validate_on_a_booted_host_and_after_its_reboot(
    role: str, baked: Mapping[str, Future[str]]
) -> None:
    said = baked[role].result()
    print(said)  # noqa: T201 - with its figures
    assert "validated after a reboot" in said
    assert "a wrong digest is refused" in said
