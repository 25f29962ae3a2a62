"""Tests that need a CUDA device: `make test-gpu` runs them, and they are skipped where there is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# cuBLAS repeats itself bit for bit only with a workspace of its own; it is read when the first product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

sys.path.append(str(Path(__file__).parents[1] / "policy"))  # the folders with tiny models


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def deterministic():
    """PyTorch's kernels that give the same bits each time, where it has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
