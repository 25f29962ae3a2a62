"""Claims about the trust-region update: the step that was planned is the step that is taken.

Axes: X states, V tokens, F parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives.trust_region import conjugate_gradient, finite_difference, line_search, step_length
from rlpost.oracle import truth
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import Row, Section, exact, fact, holds

DAMPING = 0.1
SMALL = 1e-8
"""A δ at which the KL is as good as quadratic on any tree."""
DELTAS = (1e-4, 1e-2, 1e-1)


class Region:
    """Averages per action over the states that a table visits, as functions of a step of its logits."""

    def __init__(self, problem: Problem) -> None:
        self.old_XV = problem.logp_XV.detach()
        visits_X = truth.visits(problem.tree, self.old_XV)
        self.share_X = visits_X / visits_X.sum()
        """How many of all actions are taken in each state; the visits sum to the expected length."""
        q_XV = truth.action_values(problem.tree, problem.value_X, problem.reward_L)
        self.advantage_XV = q_XV - problem.value_X[:, None]
        self.gradient_F = problem.reward_gradient / visits_X.sum()
        """[F] of the expected reward, per action."""

    def kl(self, step_F: Tensor) -> Tensor:
        """KL(old || new)."""
        return (self.share_X * (self.old_XV.exp() * (self.old_XV - self._moved(step_F))).sum(1)).sum()

    def improvement(self, step_F: Tensor) -> Tensor:
        """The surrogate: expected advantage of the new policy's actions in the states that the old one visits."""
        return (self.share_X * (self._moved(step_F).exp() * self.advantage_XV).sum(1)).sum()

    def slope(self, step_F: Tensor) -> Tensor:
        """[F] ∇KL(old || new)."""
        at_F = step_F.detach().requires_grad_()
        return torch.autograd.grad(self.kl(at_F), at_F)[0]

    def fisher(self, v_F: Tensor) -> Tensor:
        """[F] F·v exactly: the second derivative of the KL where it is 0."""
        at_F = torch.zeros_like(v_F).requires_grad_()
        slope_F = torch.autograd.grad(self.kl(at_F), at_F, create_graph=True)[0]
        return torch.autograd.grad(slope_F @ v_F, at_F)[0]

    def damped(self, v_F: Tensor) -> Tensor:
        """[F] what the solve inverts."""
        return self.fisher(v_F) + DAMPING * v_F

    def _moved(self, step_F: Tensor) -> Tensor:
        return (self.old_XV + step_F.view_as(self.old_XV)).log_softmax(1)


def trust_section(problem: Problem) -> Section:
    """The Fisher product without a second backward pass, the solve, and the measured KL of the step."""
    region = Region(problem)
    return Section("trust region on the tree, KL per action over visited states", tuple(_rows(region)))


def _rows(region: Region) -> list[Row]:
    """The step has the planned KL to second order whatever direction the solve found, if its length uses F alone.

    With damping inside the length as well, the step falls short.
    """
    g_F = region.gradient_F
    x_F = conjugate_gradient(region.damped, g_F, iterations=10)
    fx_F = region.fisher(x_F)

    def reached(product_F: Tensor, delta: float) -> float:
        return float(region.kl(step_length(x_F, product_F, delta) * x_F)) / delta

    at_zero = torch.zeros_like(g_F).requires_grad_()
    slope_F = torch.autograd.grad(region.improvement(at_zero), at_zero)[0]
    planned, short = reached(fx_F, SMALL), reached(fx_F + DAMPING * x_F, SMALL)
    product_F = finite_difference(region.slope, x_F)
    return [
        exact("gradient of the surrogate against that of the reward per action", relative_error(slope_F, g_F)),
        exact("F·x from two gradients of the KL", relative_error(product_F, fx_F), "to the difference's order", 1e-6),
        fact("residual of 10 iterations of conjugate gradient", f"{relative_error(region.damped(x_F), g_F):.1e}"),
        holds(f"measured KL/δ at δ = {SMALL:g}", f"{planned:.4f}", "1 within 1 %", abs(planned - 1) < 0.01),
        holds("the same with damping in the length too", f"{short:.4f}", "falls short", short < planned - 1e-3),
        *(fact(f"measured KL/δ at δ = {delta:g}", f"{reached(fx_F, delta):.4f}") for delta in DELTAS),
        *_searched(region, x_F, fx_F),
    ]


def _searched(region: Region, x_F: Tensor, fx_F: Tensor) -> list[Row]:
    """Whatever δ, the step that the line search accepts improves the surrogate and keeps to δ."""
    rows = []
    for delta in DELTAS:
        step_F = step_length(x_F, fx_F, delta) * x_F

        def measure(share: float, step_F: Tensor = step_F) -> tuple[float, float]:
            return float(region.improvement(share * step_F)), float(region.kl(share * step_F))

        share, improvement, kl = line_search(measure, delta)
        value = f"share {share:g}, KL/δ {kl / delta:.4f}"
        rows.append(holds(f"line search at δ = {delta:g}", value, "KL ≤ δ, better", kl <= delta and improvement > 0))
    return rows
