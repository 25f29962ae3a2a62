"""A dpo stage whose reference follows the policy (TR-DPO)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from moved import assert_only_the_policy_moved, assert_same_result, fail_after
from safetensors.torch import load_file
from tiny_recipes import DPO, LORA, PREFERENCES, SFT, base, group, metrics, policy, run, weights
from torch import Tensor

from rlpost.policy.moving_reference import MovingReference
from rlpost.policy.score import logprobs
from rlpost.stages import dpo as stage

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
ALL = {**DPO, "batch_size": len(PREFERENCES), "learning_rate": 1e-2}


@pytest.fixture
def followings(monkeypatch) -> list[MovingReference]:
    """The references that stages made."""
    kept: list[MovingReference] = []

    def record(*args) -> MovingReference:
        kept.append(MovingReference(*args))
        return kept[-1]

    monkeypatch.setattr(stage, "MovingReference", record)
    return kept


def products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """B·A of every adapted layer."""
    halves = [name for name in state if "lora_A" in name]
    return {name: state[name.replace("lora_A", "lora_B")] @ state[name] for name in halves}


def mean_logratios(now: Path, then: Path) -> list[float]:
    """Mean log-ratio of the chosen and of the rejected answers."""
    one, other = policy(now), policy(then)
    groups = [[group(one, r["prompt"], r[side]) for r in PREFERENCES] for side in ("chosen", "rejected")]
    return [float((logprobs(one, some) - logprobs(other, some)).sum()) / len(PREFERENCES) for some in groups]


@LORA_OR_NOT
def test_a_whole_refresh_makes_the_reference_the_policy(tmp_path, lora):
    run(tmp_path, {"sft": SFT, "dpo": {**ALL, "steps": 5, "refresh": {"every": 2, "share": 1.0}}}, *lora)
    lines = metrics(tmp_path, "dpo")
    at_reference = [line["loss"] == pytest.approx(math.log(2), abs=1e-4) for line in lines]
    assert at_reference == [True, False, True, False, True]
    for line, fresh in zip(lines, at_reference, strict=True):
        assert (abs(line["margin"]) < 1e-3) == fresh
    assert [("cut_off" in line) for line in lines] == [False, True, False, True, False]
    assert all(line.get("cut_off", 0.0) < 1e-5 for line in lines)


@LORA_OR_NOT
def test_half_a_refresh_is_halfway(tmp_path, lora, followings):
    """With LoRA halfway between what the adapters do; halfway between their factors would be elsewhere."""
    final = run(tmp_path, {"sft": SFT, "dpo": {**ALL, "steps": 1, "refresh": {"every": 1, "share": 0.5}}}, *lora)
    (following,) = followings
    now, then = load_file(next(final.glob("*.safetensors"))), weights(tmp_path / "runs/run/sft/final")
    found = following.weights()
    if lora:
        now, then, found = products(now), products(then), products(found)
        naive = {n: (a + weights(final)[n]) / 2 for n, a in weights(tmp_path / "runs/run/sft/final").items()}
        assert not all(torch.allclose(x, found[n], atol=1e-5) for n, x in products(naive).items())
    else:
        found = {name.removeprefix("model."): x for name, x in found.items()}  # of the policy, around the model
    assert found.keys() == now.keys()
    for name, x in found.items():
        assert torch.allclose(x, (now[name] + then[name]) / 2, atol=1e-6), name
        assert not torch.allclose(x, then[name], atol=1e-6), name


@LORA_OR_NOT
def test_it_begins_as_the_reference_that_the_recipe_names(tmp_path, lora):
    folders = {"base": "base", "sft": "sft/final", "start": "first/final"}
    follows = {**ALL, "start": "first", "steps": 1, "refresh": {"every": 9}}
    stages = {f"from_{name}": {**follows, "reference": name} for name in folders}
    run(tmp_path, {"sft": SFT, "first": {**ALL, "steps": 2}, **stages}, *lora)
    runs = tmp_path / "runs/run"
    for name, folder in folders.items():
        chosen, rejected = mean_logratios(runs / "first/final", runs / folder)
        (line,) = metrics(tmp_path, f"from_{name}")
        assert line["chosen_logratio"] == pytest.approx(chosen, abs=1e-4)
        assert line["rejected_logratio"] == pytest.approx(rejected, abs=1e-4)
        assert (abs(line["chosen_logratio"]) > 0.1) == (name != "start")


def test_it_follows_a_policy_into_which_an_adapter_was_merged(tmp_path):
    adapter = run(tmp_path, {"sft": SFT}, LORA)
    model = {"path": str(adapter), "precision": "float32"}
    settings = {**ALL, "steps": 2, "refresh": {"every": 1, "share": 1.0}}
    run(tmp_path, {"dpo": settings}, "run=merged", model=model)
    for line in metrics(tmp_path, "dpo", "merged"):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-4)


@LORA_OR_NOT
def test_it_learns_and_moves_nothing_but_the_policy(tmp_path, lora):
    run(tmp_path, {"dpo": {**ALL, "steps": 15, "refresh": {"every": 3, "share": 0.5}}}, *lora)
    lines = metrics(tmp_path, "dpo")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # Against a reference that comes after it the policy's lead is short, but the policy goes on.
    chosen, rejected = mean_logratios(tmp_path / "runs/run/dpo/final", base(tmp_path))
    assert chosen - rejected > 5
    assert lines[-1]["margin"] < chosen - rejected - 2
    assert_only_the_policy_moved(tmp_path, "dpo", bool(lora))


def test_what_did_not_fit_into_the_references_adapter_is_said(tmp_path):
    """It has room for four times the policy's rank: a policy that turns every time fills it up."""
    settings = {**ALL, "steps": 8, "learning_rate": 3e-2, "schedule": "constant"}
    run(tmp_path, {"dpo": {**settings, "refresh": {"every": 1, "share": 0.5}}}, "model.lora={r: 1, alpha: 2}")
    cut_off = [line["cut_off"] for line in metrics(tmp_path, "dpo")]
    assert all(x < 1e-5 for x in cut_off[:4])
    assert 1e-5 < max(cut_off[4:]) < 0.5


@LORA_OR_NOT
def test_killed_between_two_refreshes_it_ends_as_if_it_had_gone_through(tmp_path, lora, monkeypatch):
    """After step 3, from which it goes on, the reference is that of step 2: neither the start nor the policy."""
    refresh = {"every": 2, "share": 0.6}
    stages = {"dpo": {**ALL, "batch_size": 4, "steps": 6, "checkpoint_every": 3, "refresh": refresh}}
    run(tmp_path, stages, *lora, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(5, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages, *lora)
    run(tmp_path, stages, *lora)
    assert_same_result(tmp_path, "dpo", lora=bool(lora))


def test_rankings_and_coupled_losses_have_a_reference_that_follows_too(tmp_path):
    settings = {**ALL, "steps": 3, "refresh": {"every": 1, "share": 1.0}}
    run(tmp_path, {loss: {**settings, "loss": {"fn": loss}} for loss in ("dpo_plackett_luce", "aot")}, LORA)
    for line in [*metrics(tmp_path, "dpo_plackett_luce"), *metrics(tmp_path, "aot")]:
        assert line["preference_loss"] == pytest.approx(math.log(2), abs=1e-4)
