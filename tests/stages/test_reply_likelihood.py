"""The likelihood of what an environment replied, beside the policy gradient of a stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import EndTokenOnly, tiny
from tiny_recipes import metrics, run, weights

from rlpost.objectives.weights import token_mean
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.load import remove_dropout
from rlpost.policy.policy import Policy
from rlpost.stages import replies
from rlpost.stages.replies import with_replies
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, Term
from rlpost.types import Completion, Group

SHOP = """
class Shop:
    def reset(self, example):
        self.n = 0
        return example["prompt"]
    def step(self, action):
        self.n += 1
        return "+=", float("1" in action), self.n == 3, False, {}
"""
GRPO = {
    "kind": "grpo",
    "data": {"problems": {"task": {"fn": "addition.train"}, "limit": 64}},
    "steps": 3,
    "prompts_per_step": 4,
    "group_size": 4,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "environment": {"fn": "shop.py:Shop"},
    "max_turns": 4,
    "sampling": {"max_new_tokens": 16, "stop": list("+=023456789")},
    "rewards": [{"fn": "environment_reward"}],
    "max_length": 24,
    "table_every": 0,
}


def episodes() -> tuple[Group, ...]:
    """Four completions, the second without a reply, the last without an action."""
    yes, no = True, False
    told = [
        Completion((5, 6, 7, 8), (yes, no, no, yes)),
        Completion((9, 4), (yes, yes)),
        Completion((3, 5, 6, 9, 2), (yes, no, yes, no, yes)),
        Completion((3, 4), (no, no)),
    ]
    return Group((1, 2), told[:2]), Group((3,), told[2:])


def loss(output, part):
    """One that looks at completions as a whole, and at what stands beside actions."""
    rows = part.rows.to(output.logp_N.device)
    loss_N = rows.spread(rows.mean(output.logp_N)) * part["advantage"] * part["weight"]
    return loss_N.sum(), {"seen": output.logp_N, "lengths": rows.lengths_S.double()}


@pytest.fixture
def learners(monkeypatch):
    monkeypatch.setattr(
        replies, "reply_tokens", lambda c, _: ~c.action if c.actions else c.action
    )  # what these are is a matter of its own

    def make(budget: int) -> Learner:
        model = tiny("gpt2", torch.float64)
        remove_dropout(model)
        use_attention(model, FLAT)
        policy = Policy(model, EndTokenOnly(), flat=True).eval()
        return Learner(policy, learning_rate=1e-300, max_grad_norm=0.0, max_tokens_per_microbatch=budget)

    return make


def update() -> Experience:
    experience = Experience(episodes())
    rows = experience.rows
    advantage_N = torch.tensor([0, 0, 1, 2, 3, 4, 5], dtype=torch.float64)  # the first completion teaches nothing
    weight_N = token_mean(rows, rows.actions).double()
    return replace(experience.with_actions(advantage=advantage_N, weight=weight_N), needed_S=(False, True, True, False))


@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_gradient_is_the_policys_own_and_the_mean_likelihood_of_replies_however_it_is_cut(learners, budget):
    learner = learners(10**6)
    own = learner.update(loss, update())
    own_gradient = learner.flat_gradient()
    shown = tuple(
        Group(g.prompt, [Completion(c.ids, ~c.action if c.actions else c.action) for c in g.completions])
        for g in episodes()
    )

    def likelihood(output, _):
        return -output.logp_N.sum() / 4, {"nll": -output.logp_N}

    replied = learner.update(likelihood, Experience(shown))
    wanted = own_gradient + 0.3 * learner.flat_gradient()
    learner = learners(budget)
    term = with_replies(Term(loss, update()), 0.3, None)
    line = learner.update_on([term])
    assert float((learner.flat_gradient() - wanted).norm() / wanted.norm()) < 1e-12
    assert line["loss"] == pytest.approx(own["loss"] + 0.3 * replied["loss"], rel=1e-12)
    assert line["reply_nll"] == pytest.approx(replied["nll"], rel=1e-12)
    assert term.experience.needed_S == (True, True, True, False)


def test_a_stage_whose_rewards_say_nothing_learns_what_its_environment_says(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    flat = {"mask_truncated": False, "rewards": [{"fn": "rewards.py:always"}], "step_end": None}
    run(tmp_path, {"grpo": {**GRPO, **flat, "steps": 6, "reply_coef": 1.0}})
    lines = metrics(tmp_path, "grpo")
    assert all(line["zero_signal"] == 1 for line in lines)
    assert lines[-1]["reply_nll"] < 0.5 * lines[0]["reply_nll"]


@pytest.mark.slow
def test_a_weight_of_zero_is_the_stage_as_it_was_bit_for_bit(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    one, other = (
        weights(run(tmp_path, {"grpo": {**GRPO, **more}}, f"run={name}"))
        for name, more in (("with", {"reply_coef": 0.0}), ("without", {}))
    )
    assert all(torch.equal(w, other[name]) for name, w in one.items())


@pytest.mark.slow
def test_it_stands_beside_an_experts_rows(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    expert = {"data": {"answers": {"task": {"fn": "addition.held_out"}, "limit": 20}}, "batch_size": 4}
    run(tmp_path, {"grpo": {**GRPO, "reply_coef": 0.1, "expert": expert}})
    assert all(line["reply_nll"] > 0 and line["expert/nll"] > 0 for line in metrics(tmp_path, "grpo"))
