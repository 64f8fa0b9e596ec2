"""What lies beside the repository where the project is developed, and not in a user's clone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from infra.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def shared(path: str) -> Path:
    """A file or folder of `../shared`; skips the test where it is not there."""
    found = ROOT.parent / "shared" / path
    if not found.exists():
        pytest.skip(f"needs ../shared/{path}, which is not in a user's clone")
    return found
