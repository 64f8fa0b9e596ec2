"""What every tier uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fleet", deadline=None)  # a busy machine is no failure
settings.load_profile("fleet")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write expected outputs anew; read the diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compare a text with a file of expected output, or write that file."""

    def compare(file: Path, text: str) -> None:
        if request.config.getoption("--update-goldens"):
            file.write_text(text, encoding="utf-8")
        assert text == file.read_text(encoding="utf-8"), "wanted? then: pytest --update-goldens"

    return compare
