"""Claims about learning values: where a critic's losses have their minimum, and their gradients.

A completion's reward lies between 0 and 1 here, so it can be the probability of reaching a goal as well.

Axes: X states, L leaves, N actions of all leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import pvariance

import torch
from torch import Tensor

from rlpost.objectives import metrics
from rlpost.objectives.values import bellman_residual, contrastive_value, monte_carlo_value, value_loss
from rlpost.oracle import truth
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import Row, Section, exact

CLIP = 0.1
NEGATIVES = 3


class Critic:
    """A value of each state, as a table."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rows = problem.tree.rows
        self.weight_N = self.rows.spread(problem.probability_L)
        self.label_N = self.rows.spread(problem.reward_L)
        self.visits_X = truth.visits(problem.tree, problem.logp_XV.detach())

    def slope(self, loss: Callable[[Tensor], Tensor], at_X: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """[X] of the expected loss, by the number that each state has."""
        moving_X = at_X.detach().requires_grad_()
        weight_N = self.weight_N if weight_N is None else weight_N
        total = (loss(moving_X[self.problem.tree.state_N]) * weight_N).sum()
        return torch.autograd.grad(total, moving_X)[0]


def value_section(problem: Problem) -> Section:
    """The minimum of every loss of values, and the clip of PPO's."""
    critic = Critic(problem)
    rows = [*_minimum_rows(critic), *_slope_rows(critic), _clip_row(critic), _explained_row(problem)]
    return Section(
        "losses of values: ‖expected gradient‖ at the truth in units of that at 0, relative error", tuple(rows)
    )


def _minimum_rows(critic: Critic) -> list[Row]:
    """In every state: what is learned from samples is V, by its completions' ends or by the value one step on."""
    v_X = critic.problem.value_X
    logit_X = torch.logit(v_X)

    def end(logit_N: Tensor) -> Tensor:
        return monte_carlo_value(logit_N, critic.label_N)

    def step(logit_N: Tensor) -> Tensor:
        return bellman_residual(logit_N, critic.label_N, critic.rows)

    def square(value_N: Tensor) -> Tensor:
        return value_loss(value_N, critic.label_N, value_N.detach(), clip=None)

    zeros_X = torch.zeros_like(v_X)
    rows = [
        exact(f"{name} at the true V", _against(critic.slope(loss, at_X), critic.slope(loss, zeros_X)), "0")
        for name, loss, at_X in (
            ("monte_carlo_value", end, logit_X),
            ("bellman_residual", step, logit_X),
            ("value_loss without a clip", square, v_X),
        )
    ]
    return [*rows, _contrastive_row(critic)]


def _contrastive_row(critic: Critic) -> Row:
    """Own goals against those of others: the optimum is log p(goal | state) − log p(goal)."""
    problem = critic.problem
    lift_X = (problem.value_X / problem.value_X[0]).log()
    own_N = critic.weight_N * critic.label_N
    other_N = NEGATIVES * critic.weight_N * problem.value_X[0]

    def slope(at_X: Tensor) -> Tensor:
        parts = [
            critic.slope(
                lambda logit_N, label=label: contrastive_value(  # type: ignore[misc]
                    logit_N, torch.full_like(logit_N, label), negatives=NEGATIVES
                ),
                at_X,
                weight_N,
            )
            for label, weight_N in ((1.0, own_N), (0.0, other_N))
        ]
        return parts[0] + parts[1]

    error = _against(slope(lift_X), slope(lift_X + 1))
    return exact(f"contrastive_value, {NEGATIVES} negatives, at log p(goal|s) − log p(goal)", error, "0")


def _slope_rows(critic: Critic) -> list[Row]:
    """Away from the minimum: how far off the value is, as often as the state is visited."""
    problem, v_X = critic.problem, critic.problem.value_X
    said_X = torch.frac((torch.arange(len(v_X)).double() + 1) * 0.6180339887498949)
    found = critic.slope(lambda logit_N: monte_carlo_value(logit_N, critic.label_N), torch.logit(said_X))
    # One step on: the reward where a completion ends, else the estimate for the next state.
    after_XV = truth.action_values(problem.tree, said_X, problem.reward_L)
    next_X = (problem.logp_XV.detach().exp() * after_XV).sum(1)
    stepped = critic.slope(lambda x_N: bellman_residual(x_N, critic.label_N, critic.rows), torch.logit(said_X))
    expected = critic.visits_X * (said_X - next_X) * said_X * (1 - said_X)
    return [
        exact("monte_carlo_value elsewhere", relative_error(found, critic.visits_X * (said_X - v_X)), "visits·(σ − V)"),
        exact("bellman_residual elsewhere", relative_error(stepped, expected), "the next value without gradient"),
    ]


def _clip_row(critic: Critic) -> Row:
    """No gradient where the value has moved beyond the clip and the value at the clip is the worse one."""
    old_N = critic.problem.value_X[critic.problem.tree.state_N]
    moved_N = old_N + torch.arange(len(old_N)).double().sin() * 3 * CLIP
    held_N = torch.minimum(torch.maximum(moved_N, old_N - CLIP), old_N + CLIP)
    right_N = critic.label_N
    worse_N = (held_N - right_N).abs() > (moved_N - right_N).abs()
    moving_N = moved_N.clone().requires_grad_()
    loss_N = value_loss(moving_N, right_N, old_N, clip=CLIP)
    (slope_N,) = torch.autograd.grad(loss_N.sum(), moving_N)
    value_N = torch.where(worse_N, held_N - right_N, moved_N - right_N) ** 2 / 2
    expected_N = torch.where(worse_N & (held_N != moved_N), 0.0, moved_N - right_N)
    # Where the two are equal, the maximum shares its gradient between them.
    error = relative_error(torch.cat([loss_N.detach(), slope_N]), torch.cat([value_N, expected_N]))
    return exact("value_loss beyond its clip: loss and gradient", error, "closed form")


def _explained_row(problem: Problem) -> Row:
    value_N, return_N = problem.value_X[problem.tree.state_N], problem.tree.rows.spread(problem.reward_L)
    parts = metrics.explained_variance_parts(value_N, return_N)
    found = metrics.without_parts({name: float(x.mean()) for name, x in parts.items()})["explained_variance"]
    true = 1 - pvariance((return_N - value_N).tolist()) / pvariance(return_N.tolist())
    return exact("explained variance", abs(found - true), "1 − Var(R − V)/Var(R)")


def _against(found: Tensor, scale: Tensor) -> float:
    return float(found.norm() / scale.norm())
