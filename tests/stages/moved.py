"""What the tests of preference stages share: which weights moved, and what a stage was measured against."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_recipes import base, policy, sha256

from rlpost.policy.reference import Reference
from rlpost.stages.context import Context
from rlpost.train.learner import Learner


def assert_only_the_policy_moved(folder: Path, stage: str, lora: bool) -> None:
    """All weights, or with LoRA the adapter alone, against the run's base model, which every stage began from."""
    final = folder / "runs/run" / stage / "final"
    assert [f.name for f in final.glob("*.safetensors")] == [("adapter_model" if lora else "model") + ".safetensors"]
    before = dict(policy(base(folder)).causal_lm.named_parameters())
    after = dict(policy(final).causal_lm.named_parameters())
    if lora:
        rises = [p for n, p in after.items() if "lora_B" in n]
        assert rises
        assert all(bool(p.any()) for p in rises)
        after = {n.replace(".base_layer", ""): p for n, p in after.items() if "lora_" not in n}
    assert after.keys() == before.keys()
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert same == (set(before) if lora else set())


def keep_references(monkeypatch: pytest.MonkeyPatch) -> list[Reference]:
    """The references that stages are given from now on."""
    kept: list[Reference] = []
    make = Context.reference

    def record(self: Context, *args) -> Reference:
        kept.append(make(self, *args))
        return kept[-1]

    monkeypatch.setattr(Context, "reference", record)
    return kept


def fail_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a run stops when so many updates are done."""
    update = Learner.update

    def failing(self: Learner, *args, **options) -> dict[str, float]:
        if self.updates == updates:
            raise KeyboardInterrupt
        return update(self, *args, **options)

    monkeypatch.setattr(Learner, "update", failing)


def assert_same_result(folder: Path, stage: str, *, lora: bool) -> None:
    """The runs called `run` and `whole` left the same weights and the same log, bit for bit."""
    weights = ("adapter_model" if lora else "model") + ".safetensors"
    for file in (f"final/{weights}", "metrics.jsonl"):
        one, other = (folder / "runs" / name / stage / file for name in ("run", "whole"))
        assert sha256(one) == sha256(other), file
