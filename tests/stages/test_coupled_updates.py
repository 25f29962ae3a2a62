"""What a grpo stage does with a loss that compares the completions of a group."""

from __future__ import annotations

from math import log
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_recipes import GRPO, PPO, metrics, prepared, run

from rlpost.errors import RecipeError
from rlpost.objectives import target_policy
from rlpost.policy.logprobs import PolicyOutput
from rlpost.recipe.specs.grpo import Grpo
from rlpost.stages.coupling import coupling, loss_of
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group

TARGET = {
    **GRPO,
    "steps": 1,
    "prompts_per_step": 6,
    "learning_rate": 1e-3,
    "loss": {"fn": "target_policy"},
    "weight": "sequence_mean",
}


def test_a_group_is_compared_whole_however_the_update_is_cut(tmp_path):
    """That the gradient is the same to the last digit, over processes too: test_invariance.py."""
    for budget in (4096, 8):
        run(tmp_path, {"grpo": {**TARGET, "max_tokens_per_microbatch": budget}}, f"run=r{budget}")
    whole, cut = (metrics(tmp_path, "grpo", f"r{budget}")[0] for budget in (4096, 8))
    assert whole["grad_norm"] > 0
    assert whole["grad_norm"] == pytest.approx(cut["grad_norm"], rel=1e-4)
    assert whole["loss"] == pytest.approx(cut["loss"], rel=1e-5)


def test_equal_rewards_leave_the_policy_that_sampled_them(tmp_path):
    run(tmp_path, {"grpo": {**TARGET, "rewards": [{"fn": "rewards.py:always"}]}})
    assert metrics(tmp_path, "grpo")[0]["grad_norm"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**TARGET, "weight": "token_mean"}, "weight: target_policy is one value a completion - use sequence_mean"),
        ({**PPO, "loss": {"fn": "target_policy"}}, "loss.fn: target_policy compares a group's completions"),
        ({**TARGET, "focus": {"fn": "top_entropy"}}, "focus: target_policy learns from an action whose advantage"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, stage, message):
    with pytest.raises(RecipeError, match=f"stages.rl.{message}"):
        prepared(tmp_path, {"rl": stage})


def test_a_group_of_one_is_warned_of(tmp_path):
    alone = {**TARGET, "group_size": 1, "advantage": {"fn": "reward"}}
    (warning,) = prepared(tmp_path, {"rl": alone}).warnings
    assert "rl.group_size: target_policy compares the completions of a group" in warning
    assert not prepared(tmp_path, {"rl": {**alone, "loss": {"fn": "clipped_surrogate"}}}).warnings
    (other,) = prepared(tmp_path, {"rl": {**TARGET, "group_size": 1}}).warnings
    assert "has no baseline" in other


def test_the_correction_weighs_the_loss_and_its_slope():
    """Of an update of one group of two completions, of which the second counts twice."""
    group = Group((1,), tuple(Completion((5,), (True,)) for _ in range(2)))
    update = Experience((group,), needed_S=(True, False)).with_actions(
        old_logp=torch.tensor([-1.0, -2.0]), advantage=torch.tensor([1.0, -1.0]), weight=torch.full((2,), 0.5)
    )
    corrected = update.with_actions(correction=torch.tensor([1.0, 2.0]))
    logp_N = torch.tensor([-1.5, -1.5])

    def coupled(experience: Experience) -> Experience:
        def evaluate_no_grad(read, whole, _):
            assert whole.needed_S is None, "all members of a group are asked for"
            return read(PolicyOutput(logp_N), whole)

        learner = SimpleNamespace(evaluate_no_grad=evaluate_no_grad)
        return coupling(target_policy, Grpo(learning_rate=1.0), learner)(experience)

    def slope(experience: Experience) -> list[float]:
        """Of the weighted loss, by each action's log-probability, as a stage's loss has it."""
        moving_N = logp_N.clone().requires_grad_()
        part = coupled(experience)
        loss_N = loss_of(target_policy, moving_N, part, part.rows)
        return torch.autograd.grad((loss_N * part["weight"]).sum(), moving_N)[0].tolist()

    # p = ½ each, and q the softmax of (−1 + 1, −2 − 1); corrected, the second's −q·log p counts twice.
    q = torch.tensor([0.0, -3.0]).softmax(0).tolist()
    assert slope(update) == pytest.approx([0.5 - q[0], 0.5 - q[1]])
    assert slope(corrected) == pytest.approx([0.5 * (q[0] + 2 * q[1]) - q[0], 0.5 * (q[0] + 2 * q[1]) - 2 * q[1]])
    assert coupled(corrected)["value"].tolist() == pytest.approx([-2 * q[0] * log(0.5), -4 * q[1] * log(0.5)])
