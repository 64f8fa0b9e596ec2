"""What images of machines are made of: components of EC2 Image Builder, and data about them."""

from __future__ import annotations

import json
from functools import cache

from pydantic import PositiveInt

from infra.catalog.strict import Month, Source, Strict, rows
from infra.paths import ROOT

FOLDER = ROOT / "images"
LOCKS = {"node.txt": ROOT / "requirements" / "node.txt", "vllm-cuda.txt": ROOT / "requirements" / "vllm-cuda.txt"}
"""What the components install into virtual environments, by the name that they look for."""


class ImageRow(Strict):
    """One image."""

    parent: str
    """Parameter of SSM with the id of the image that it is made from."""
    root: str
    """Device name of the root volume."""
    volume_gb: PositiveInt
    instances: tuple[str, ...]
    """Types that it may be built on, the preferred one first."""
    components: tuple[str, ...]
    source: Source
    date: Month


class Program(Strict):
    """A program that comes as an archive from its vendor."""

    version: str
    url: str
    sha256: str
    source: Source
    date: Month


@cache
def images() -> dict[str, ImageRow]:
    """Every image by the role of its machines."""
    return rows(ImageRow, FOLDER / "images.yaml", "images")


@cache
def programs() -> dict[str, Program]:
    """The pinned programs by name."""
    return rows(Program, FOLDER / "programs.yaml", "programs")


def component(name: str) -> str:
    """A component document, as it is given to Image Builder."""
    return (FOLDER / "components" / f"{name}.yaml").read_text(encoding="utf-8")


def install_files() -> str:
    """What the component `fleet` unpacks on a machine: locks and pins, as one JSON text."""
    pins = "".join(f"{name} {it.version} {it.sha256} {it.url}\n" for name, it in programs().items())
    files = {name: file.read_text(encoding="utf-8") for name, file in LOCKS.items()}
    return json.dumps({"schema": 1, "files": {**files, "programs.txt": pins}}, sort_keys=True)
