"""Public images of AWS that machines can boot from."""

from __future__ import annotations

from functools import cache
from typing import Literal

from infra.catalog.strict import FOLDER, Month, Source, Strict, parse, read

IMAGES = FOLDER / "aws-images.yaml"


class PublicImage(Strict):
    """One kind of public image."""

    use: tuple[Literal["engine", "gateway", "monitor"], ...]
    """Roles of machines."""
    name: str
    """With `*` where its versions differ."""
    owner: str
    """Account that publishes it."""
    source: Source
    date: Month


@cache
def public_images(role: str) -> tuple[PublicImage, ...]:
    """Those of a role, the preferred one first."""
    found = (parse(PublicImage, row) for row in read(IMAGES)["images"].values())
    return tuple(image for image in found if role in image.use)
