from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """Garbage is collected after every stage of a run: without a look at all that was imported, in half the time."""
    gc.collect()
    gc.freeze()
