"""What stages that sample share, on rollouts made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlpost.objectives import kl
from rlpost.rewards.score import RewardBatch, rewarded
from rlpost.stages.on_policy import KlPenalty
from rlpost.stages.params import Kl, KlEstimator, KlPlacement
from rlpost.stages.rollouts import Rollout, Sampler, learned_from, rollout_of
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group


def said(n: int, finish: str = "stop") -> Completion:
    return Completion((5,) * n, (True,) * n, finish=finish, logprobs=(-1.0,) * n)


def rollout(*rewards: list[float], prompt: int = 1, **by_step: list[list[float]]) -> Rollout:
    """Groups of completions of one token, with these rewards."""
    groups = [Group((prompt + p,), (said(1),) * len(row)) for p, row in enumerate(rewards)]
    scores = RewardBatch([list(row) for row in rewards], {"mine": [list(row) for row in rewards]}, by_step)
    reward_PG = torch.tensor(rewards, dtype=torch.float64)
    return Rollout(groups, groups, reward_PG, scores, len(groups), {"mine": 1.0, **dict.fromkeys(by_step, 0.5)})


def test_rewards_by_step_are_weighed():
    found = rollout([1.0, 2.0], steps=[[1.0, 3.0], [4.0]])
    assert found.step_rewards(0, 2) == [0.5, 1.5]
    assert found.step_rewards(1, 1) == [2.0]


def test_what_is_logged_of_samples():
    groups = [Group((1,), (said(2, "length"), said(4))), Group((2,), (said(1), said(1)))]
    scores = RewardBatch([[0.0, 1.0], [1.0, None]], {})
    reward_PG = torch.tensor([[0.0, 1.0], [1.0, torch.nan]])
    line = Rollout(groups, groups, reward_PG, scores, 2, {}).metrics
    expected = {"reward": 2 / 3, "unscored": 1, "zero_signal": 0.5, "truncated": 0.25, "length": 2.0, "entropy": 1.0}
    assert line == pytest.approx(expected)


def drawing(rounds: list[Rollout], prompts: int, most_rounds: int) -> tuple[Rollout, list[int]]:
    """The step's rollout, and the first prompt's number of each round."""
    sampler, firsts = Sampler.__new__(Sampler), []
    given = iter(rounds)

    def one(_: int, first: int) -> Rollout:
        firsts.append(first)
        return next(given)

    sampler.cfg = SimpleNamespace(prompts_per_step=prompts)
    sampler.dynamic_sampling_rounds = most_rounds
    sampler._round = one
    return sampler.draw(0), firsts


def test_rounds_are_drawn_until_enough_groups_have_a_signal_and_those_come_first():
    flat, mixed = rollout([1.0, 1.0], [0.0, 2.0]), rollout([1.0, 3.0], [2.0, 2.0], prompt=11)
    found, firsts = drawing([flat, mixed, flat], 2, most_rounds=5)
    assert firsts == [0, 2]
    assert [g.prompt[0] for g in found.groups] == [2, 11]
    assert found.reward_PG.tolist() == [[0.0, 2.0], [1.0, 3.0]]
    assert (found.drawn, found.drawn_means) == (4, {"mine": pytest.approx(1.5)})
    assert drawing([flat, flat, flat], 2, most_rounds=1)[1] == [0, 2]
    assert drawing([rollout([0.0, 1.0], [1.0, 0.0])], 2, most_rounds=5)[1] == [0]


def test_only_a_recipe_that_says_so_leaves_out_what_was_cut_off():
    groups = rewarded([Group((1,), (said(1, "length"), said(1)))], [[1.0, None]])
    for masked, rewards, actions in ((False, [1.0, torch.nan], [1, 0]), (True, [torch.nan, torch.nan], [0, 0])):
        learned, reward_PG = learned_from(groups, masked)
        assert reward_PG.tolist() == [pytest.approx(rewards, nan_ok=True)]
        assert [c.actions for c in learned[0].completions] == actions
        assert [len(c.ids) for c in learned[0].completions] == [1, 1]


def test_the_kl_that_moves_its_coefficient_is_a_sum_over_completions():
    none = Completion((5,), (False,))
    experience = Experience((Group((1,), (said(2), said(1), none)),)).with_actions(
        old_logp=torch.tensor([-1.0, -1.0, -1.0]), reference=torch.tensor([-2.0, -3.0, -2.0])
    )
    penalty = KlPenalty(Kl(beta=0.5, target=8.0, horizon=10), object())
    # 1 + 2 and 1 nats: 2 a completion, of those that were learned from; far below the target.
    assert penalty.observe(experience) == {"sequence_kl": pytest.approx(2.0), "beta": 0.5}
    assert penalty.beta == pytest.approx(0.5 * (1 - 0.2 * 2 / 10))


@pytest.mark.parametrize("name", [KlEstimator.k1, KlEstimator.k2, KlEstimator.k3])
def test_the_penalty_is_in_the_reward_or_in_the_loss(name):
    estimate = {KlEstimator.k1: kl.k1, KlEstimator.k2: kl.k2, KlEstimator.k3: kl.k3}[name]
    logp_N, reference_N = torch.tensor([-1.0, -1.5, -0.5]), torch.tensor([-2.0, -3.0, -0.25])
    experience = Experience((Group((1,), (said(2), said(1))),)).with_actions(old_logp=logp_N, reference=reference_N)
    in_reward = KlPenalty(Kl(beta=0.5, estimator=name), object())
    kl_N = estimate(logp_N, reference_N)
    to_go = [kl_N[0] + kl_N[1] - kl_N[2], kl_N[1] - kl_N[2], kl_N[2] - kl_N[0] - kl_N[1]]
    assert not in_reward.in_loss
    assert in_reward.per_action(experience).tolist() == (0.5 * kl_N).tolist()
    assert in_reward.to_go(experience, 2).tolist() == pytest.approx([0.5 * float(x) for x in to_go])
    in_loss = KlPenalty(Kl(beta=0.5, estimator=name, placement=KlPlacement.loss), object())
    none = KlPenalty(Kl(), None)
    assert in_loss.in_loss
    assert not none.in_loss
    assert in_loss.loss(logp_N, experience).tolist() == (0.5 * kl_N).tolist()
    for penalty in (in_loss, none):
        assert penalty.per_action(experience).tolist() == penalty.to_go(experience, 2).tolist() == [0.0] * 3


def test_the_weighted_penalty_counts_from_the_sampler():
    logp_N, reference_N = torch.tensor([-1.0, -1.5]), torch.tensor([-2.0, -3.0])
    experience = Experience((Group((1,), (said(2),)),)).with_actions(
        old_logp=logp_N, sampled_logp=torch.tensor([-1.25, -1.0]), reference=reference_N
    )
    penalty = KlPenalty(Kl(beta=0.5, estimator=KlEstimator.k3_weighted, placement=KlPlacement.loss), object())
    ratio_N = torch.tensor([0.25, -0.5]).exp()
    assert penalty.loss(logp_N, experience).tolist() == pytest.approx(
        (0.5 * ratio_N * kl.k3(logp_N, reference_N)).tolist()
    )


def test_log_probabilities_are_those_of_the_actions_in_order():
    one = Completion((5, 6, 7), (True, False, True), logprobs=(-1.0, -2.0), reward=1.0)
    other = Completion((8,), (True,), logprobs=(-0.1,), reward=0.0)

    def logprobs(groups: list[Group]) -> list[float]:
        rewards = [[c.reward for c in g.completions] for g in groups]
        return (
            rollout_of(groups, RewardBatch(rewards, {}), {}, mask_truncated=False).experience["sampled_logp"].tolist()
        )

    found = logprobs([Group((1,), (one, other)), Group((2,), (one, one))])
    assert found == torch.tensor([-1.0, -2.0, -0.1, -1.0, -2.0, -1.0, -2.0]).tolist()
    assert logprobs([Group((1,), (replace(one, reward=None), other))]) == torch.tensor([-0.1]).tolist()
