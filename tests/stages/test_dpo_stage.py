"""Preference optimisation: above all, what it is measured against."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tiny_recipes import DPO, LORA, PREFERENCES, SFT, base, group, lora_policy, metrics, policy, run, weights
from torch import Tensor

from rlpost.objectives.preference import PairBatch, dpo_plackett_luce
from rlpost.policy.logprobs import PolicyOutput
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.stages import dpo as stage
from rlpost.stages import pairwise
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
ALL = {**DPO, "batch_size": len(PREFERENCES)}
"""Every update holds all pairs, so that numbers do not depend on their order."""


def sums(model: Policy) -> Tensor:
    """[P, 2] log-probabilities of the chosen and the rejected completions."""
    rows = [(r["prompt"], r["chosen"], r["rejected"]) for r in PREFERENCES]
    return torch.stack([torch.stack([logprobs(model, [group(model, p, c)]).sum() for c in both]) for p, *both in rows])


@LORA_OR_NOT
def test_it_starts_at_log_2_and_learns_what_is_preferred(tmp_path, lora):
    final = run(tmp_path, {"dpo": {**ALL, "steps": 25, "learning_rate": 1e-2}}, *lora)
    first, *_, last = metrics(tmp_path, "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert first["chosen_logratio"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.4
    assert last["margin"] > 5
    assert last["accuracy"] == 1.0
    after, before = sums(policy(final)), sums(policy(base(tmp_path)))
    margin_P = (after - before)[:, 0] - (after - before)[:, 1]
    assert float(margin_P.min()) > 0
    assert float(margin_P.mean()) > 5


@LORA_OR_NOT
def test_after_another_stage_the_reference_is_where_this_one_starts(tmp_path, lora):
    """With LoRA, switching the adapter off would give the base model instead: far from where the stage starts."""
    run(tmp_path, {"sft": SFT, "dpo": ALL}, *lora)
    first = metrics(tmp_path, "dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert first["rejected_logratio"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "folder", "lora"),
    [
        pytest.param(name, folder, lora, id=f"{name}-{way}", marks=[] if way == quick else pytest.mark.slow)
        for name, folder, quick in [("base", "base", "lora"), ("sft", "sft/final", "full"), ("start", "dpo/final", "")]
        for way, lora in [("full", ()), ("lora", (LORA,))]
    ],
)
def test_the_reference_can_be_the_base_or_an_earlier_stage(tmp_path, lora, name, folder):
    run(tmp_path, {"sft": SFT, "dpo": {**ALL, "learning_rate": 1e-2}, "again": {**ALL, "reference": name}}, *lora)
    runs = tmp_path / "runs/run"
    delta_P2 = sums(policy(runs / "dpo/final")) - sums(policy(runs / folder))
    first = metrics(tmp_path, "again")[0]
    assert first["chosen_logratio"] == pytest.approx(float(delta_P2[:, 0].mean()), abs=1e-4)
    assert first["rejected_logratio"] == pytest.approx(float(delta_P2[:, 1].mean()), abs=1e-4)
    if name != "start":
        assert abs(first["margin"]) > 0.1


@LORA_OR_NOT
def test_neither_the_reference_nor_the_base_moves(tmp_path, lora, monkeypatch):
    kept = {}
    reference_logprobs = stage.ReferenceLogprobs

    def record(reference, data, draws):
        kept["reference"] = reference
        return reference_logprobs(reference, data, draws)

    monkeypatch.setattr(stage, "ReferenceLogprobs", record)
    run(tmp_path, {"sft": SFT, "dpo": {**ALL, "learning_rate": 1e-2}}, *lora)
    start = policy(tmp_path / "runs/run/sft/final")
    pairs = [group(start, r["prompt"], r["chosen"], r["rejected"]) for r in PREFERENCES]
    assert torch.allclose(kept["reference"].logprobs(pairs), logprobs(start, pairs), atol=1e-6)
    moved = logprobs(policy(tmp_path / "runs/run/dpo/final"), pairs) - logprobs(start, pairs)
    assert float(moved.abs().mean()) > 0.05
    if lora:
        trained = dict(lora_policy(tmp_path / "runs/run/dpo/final").causal_lm.named_parameters())
        for name, w in policy(base(tmp_path)).causal_lm.named_parameters():
            assert torch.equal(trained[name.replace("_proj.", "_proj.base_layer.")], w), name


def test_the_nll_term_is_a_token_mean_over_the_chosen_ones(tmp_path):
    run(tmp_path, {"dpo": {**ALL, "steps": 1, "nll_coef": 0.5, "max_tokens_per_microbatch": 1}})
    model = policy(base(tmp_path))
    chosen_N = -logprobs(model, [group(model, r["prompt"], r["chosen"]) for r in PREFERENCES])
    (line,) = metrics(tmp_path, "dpo")
    assert line["loss"] == pytest.approx(math.log(2) + 0.5 * float(chosen_N.mean()), rel=1e-5)
    assert line["preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["chosen_nll"] == pytest.approx(float(chosen_N.mean()), rel=1e-5)  # all chosen ones are as long


def test_what_is_logged(tmp_path):
    run(tmp_path, {"dpo": DPO})
    names = {
        *("step", "loss", "preference_loss", "accuracy", "margin", "chosen_logratio", "rejected_logratio"),
        *("chosen_nll", "grad_norm", "learning_rate"),
    }
    assert [set(line) for line in metrics(tmp_path, "dpo")] == 4 * [names]


def test_reference_scores_are_the_same_computed_beforehand_or_as_pairs_come(tmp_path):
    """Beforehand where pairs come more than once; two epochs and one start with the same pairs."""
    settings = {**DPO, "batch_size": 3, "steps": None, "schedule": "constant"}
    for name, epochs in (("once", 1), ("twice", 2)):
        run(tmp_path, {"dpo": {**settings, "epochs": epochs, "reference": "base"}}, f"run={name}")
    once, twice = (metrics(tmp_path, "dpo", name) for name in ("once", "twice"))
    assert (len(once), len(twice)) == (3, 6)
    for one, other in zip(once, twice, strict=False):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_another_loss_is_named_in_the_recipe(tmp_path):
    run(tmp_path, {"dpo": {**ALL, "steps": 1, "loss": {"fn": "ipo", "args": {"beta": 0.25}}}})
    assert metrics(tmp_path, "dpo")[0]["loss"] == pytest.approx(4.0, rel=1e-4)  # (0 - 1 / (2 * 0.25))²


def test_only_the_policys_adapter_is_kept(tmp_path):
    final = run(tmp_path, {"sft": SFT, "dpo": ALL}, LORA)
    assert sorted(weights(final)) == sorted(weights(tmp_path / "runs/run/sft/final"))
    assert sorted(f.name for f in final.glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_a_margin_of_nothing_is_no_win():
    """Before its first step a policy is its reference, and prefers neither."""
    logp_P2 = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.5]])
    reference_P2 = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.0]])
    found = pairwise._metrics(PairBatch(logp_P2, reference_P2, torch.ones(3, 2)), {})
    assert found["accuracy"].tolist() == [0.0, 0.0, 1.0]


def test_ranked_groups_of_unlike_sizes_by_hand():
    """An absent completion is no rival, and every group has its own weight."""
    rows = ([0.5, 2.0], [3.0, None, 1.0])
    groups = tuple(Group((1,), [Completion((5,), (True,), score=score) for score in scores]) for scores in rows)
    delta_N = torch.tensor([0.3, -0.4, 1.0, 7.0, 0.2])
    part = Experience(groups).with_actions(reference=torch.full((5,), -1.0))
    part = part.with_groups(pair_weight=torch.tensor([1.0, 10.0]))
    total, line = stage.ranking_loss(partial(dpo_plackett_luce, beta=2.0))(PolicyOutput(delta_N - 1), part)
    rivals = [math.log1p(math.exp(2 * 0.7)), math.log1p(math.exp(-2 * 0.8))]
    assert float(total) == pytest.approx(rivals[0] + 10 * rivals[1])
    assert line["preference_loss"].tolist() == pytest.approx(rivals)
    assert line["accuracy"].tolist() == [0.0, 1.0]


def test_scores_of_a_reference_are_kept_by_prompt_and_completions():
    pairs = [Group((1,), (Completion((5,), (True,)), Completion((k,), (True,)))) for k in (6, 7)]
    assert stage._key(pairs[0]) != stage._key(pairs[1])
    assert stage._key(pairs[0]) == stage._key(Group((1,), pairs[0].completions, {"another": "row"}))
