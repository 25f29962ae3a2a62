"""A device without memory shows, without a GPU, that nothing mixes devices and how often an update waits for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^(?P<name>\S.*?) {2,}(?P<how>runs|FAILED) +(?P<waits>\d+) +(?P<copies>\d+) ", re.MULTILINE)

TOLD = """
import torch
from fake_cuda import rows
from fake_device import Watch, register
from rlpost.devices import moved, true_at
from rlpost.policy.segment_attention import SegmentAttention
from rlpost.policy.tiles import Segment

class Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, grad):
        return grad * torch.ones(3)

def refused(work):
    try:
        work()
    except RuntimeError as error:
        return "same device" in str(error)
    return False

device = register()
with Watch(device) as watch:
    x = moved(torch.ones(3), device).requires_grad_()
    assert refused(lambda: x + torch.ones(3))
    assert refused(lambda: Mixed.apply(x).sum().backward())
    x.sum().backward()
    assert x.grad.device == device and not watch.waits and not watch.copies

    def counts(work):
        watch.clear()
        work()
        return watch.waits.total(), watch.copies.total()

    assert counts(lambda: float(x.sum())) == (1, 0)
    assert counts(lambda: bool(x.isfinite().all())) == (1, 0)
    assert counts(lambda: x.detach().tolist()) == (1, 0)
    assert counts(lambda: x.detach().cpu()) == (1, 0)
    assert counts(lambda: x[x > 0]) == (1, 0)
    assert counts(lambda: x.nonzero()) == (1, 0)
    assert counts(lambda: torch.ones(3).to(device)) == (0, 1)
    assert counts(lambda: torch.tensor([1.0], device=device)) == (0, 1)
    assert counts(lambda: moved(torch.ones(3), device)) == (0, 0)
    assert counts(lambda: x[true_at(torch.ones(3) > 0, device)]) == (0, 0)
    assert counts(lambda: SegmentAttention([Segment(0, 200), Segment(200, 4, 0, 200)], 204, device).mask(5)) == (0, 0)

    rows(watch, ["grpo token_mean"], learns=True)
"""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: what is registered with PyTorch stays."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def rows(*words: str) -> dict[str, tuple[str, int, int]]:
    found = python(*words)
    assert found.returncode == 0, found.stdout + found.stderr
    return {m["name"]: (m["how"], int(m["waits"]), int(m["copies"])) for m in ROW.finditer(found.stdout)}


@pytest.mark.slow
def test_an_update_waits_twice_in_one_part_and_in_many():
    """On a device that refuses to be mixed with the CPU, and counts what reads it."""
    found = rows("-c", TOLD)
    assert found == {f"grpo token_mean, {how}": ("runs", 2, 0) for how in ("shared", "apart")}


@pytest.mark.slow  # two minutes
@pytest.mark.timeout(900)
def test_no_stage_mixes_devices_or_waits_more_often():
    found = rows(str(ROOT / "scripts" / "fake_cuda.py"))
    assert len(found) > 60
    updates = {name: row for name, row in found.items() if not name.startswith("sample")}
    assert set(updates.values()) == {("runs", 2, 0)}
    assert all(how == "runs" and waits <= 6 for how, waits, _ in found.values())
