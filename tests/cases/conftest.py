"""Inputs that must come out right or be refused in one line: counted by kind, shown at the end of the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Tally = Callable[..., None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working directory too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """`tally("math answers", right=3, refused=1)`: what this test has just found, for the table at the end."""

    def count(kind: str, *, right: int = 0, refused: int = 0, wrong: int = 0) -> None:
        record_property("cases", (kind, right, refused, wrong))

    return count


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything beside this file is a case: `make torture` runs them all."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.case)
