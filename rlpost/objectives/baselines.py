"""Baselines that know more than a group's rewards: probabilities, a column of the rows, earlier steps role by role.

Axes: P prompts, G completions a prompt, S = P·G completions, N action tokens, L the longest completion. As in
advantages.py, NaN marks a completion that is unscored or excluded from learning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.ragged import Ragged, has_signal, widen


def squared_score(logp_N: Tensor, collision_N: Tensor) -> Tensor:
    """[N] ‖∂ log p(action)/∂ logits‖² = 1 − 2p + Σ_v p(v)²: how far an action can move the logits it was drawn from.

    Li et al. 2026, arXiv:2602.07078. `logp_N` is log p of the action, `collision_N` log Σ_v p(v)². Exact for the
    logits; for the model's weights it is a proxy.
    """
    # In float64: where p is nearly 1, next to nothing is left.
    return (1 - 2 * logp_N.double().exp() + collision_N.double().exp()).clamp(min=0)


def optimal_token_baseline(
    reward_PG: Tensor,
    logp_N: Tensor,
    collision_N: Tensor,
    rows: Ragged,
    *,
    leave_one_out: bool = False,
    accumulate: bool = True,
) -> Tensor:
    """[N] r − Σ_i r_i·W_i,t / Σ_i W_i,t, over the completions i of the group that have a t-th action.

    The optimal token baseline (OTB, Li et al. 2026, arXiv:2602.07078): W_i,t = Σ_{j≤t} ‖∂ log p(a_j)/∂ logits‖². In
    expectation E[r·W_t]/E[W_t] is the constant with which r − b times the score of the first t actions varies least, as
    far as scores of different actions are orthogonal. With `accumulate=False` W_i,t is the norm of action t alone:
    then it is the constant b_t of each position with which the whole gradient varies least, which for logits of their
    own in every state is exact.

    A completion's own reward stands in its baseline, as in the paper, which is a bias: an action whose completion alone
    has gone so far has advantage 0. With `leave_one_out` the sums are over the others and the gradient is unbiased;
    where no other one has a t-th action (or none can move its logits), the others' mean reward is the baseline.

    Raises:
        ValueError: the rows are not the completions of the groups.
    """
    prompts, size = reward_PG.shape
    if rows.completions != prompts * size:
        raise ValueError(f"{rows.completions} completions are not {prompts} groups of {size}")
    norm_SL = rows.pad(squared_score(logp_N, collision_N))
    shape = (prompts, size, norm_SL.shape[1])
    there_PGL = rows.pad(torch.ones_like(logp_N, dtype=norm_SL.dtype)).view(shape) * ~reward_PG.isnan()[..., None]
    weight_PGL = (norm_SL.cumsum(1) if accumulate else norm_SL).view(shape) * there_PGL
    scored_PG = (~reward_PG.isnan()).to(weight_PGL.dtype)
    reward_PG1 = reward_PG.nan_to_num().to(weight_PGL.dtype)[..., None]
    sums = _others if leave_one_out else _all
    mass_PGL, count_PG1 = sums(weight_PGL), sums(scored_PG[..., None])
    weighted_PGL = sums(weight_PGL * reward_PG1) / torch.where(mass_PGL > 0, mass_PGL, 1.0)
    mean_PG1 = sums(scored_PG[..., None] * reward_PG1) / count_PG1.clamp(min=1)
    advantage_PGL = reward_PG1 - torch.where(mass_PGL > 0, weighted_PGL, mean_PG1)
    keep_PG = has_signal(reward_PG)[:, None] & ~reward_PG.isnan()
    advantage_PGL = torch.where(keep_PG[..., None], advantage_PGL, 0.0)
    return rows.flatten(advantage_PGL.view(norm_SL.shape)).to(widen(reward_PG).dtype)


declare(optimal_token_baseline, compares_completions=True)


def role_baseline(reward_PG: Tensor, running_mean_P: Tensor, *, by: str, decay: float = 0.95) -> Tensor:  # noqa: ARG001 - the stage reads `by`
    """[P, G] r − the running mean of earlier rewards of the prompts with the same value in the column `by`.

    Role-conditioned advantage estimation (SPIRAL, Liu et al. 2025, arXiv:2506.24119), where the value is the game and
    the player's role in it: a mean of its own for each, moved after every step as `ema` does with `decay`, and 0 before
    its first reward. What a completion itself earns moves the mean only afterwards, so the gradient is unbiased.

    Raises:
        ValueError: if `decay` is not from 0 to below 1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: a running mean keeps a share of 0 or more, below 1")
    return (widen(reward_PG) - running_mean_P.to(widen(reward_PG).dtype)[:, None]).nan_to_num()


def column_baseline(reward_PG: Tensor, column_P: Tensor, *, column: str) -> Tensor:  # noqa: ARG001 - the stage reads it
    """[P, G] r − the number in a column of the prompt's row.

    With `optimal_value`, as a `pairs` stage writes it, the optimal advantage of A*-PO (Brantley et al. 2025,
    arXiv:2505.20686). Any number that the completion has no part in leaves the gradient unbiased.
    """
    return (widen(reward_PG) - column_P.to(widen(reward_PG).dtype)[:, None]).nan_to_num()


def optimal_value(reward_PG: Tensor, *, beta: float) -> Tensor:
    """[P] β·log mean e^{r/β} over a prompt's scored completions; NaN where there is none.

    Of completions of the reference it estimates V* = β·log E[e^{r/β}], what the best policy of E[r] − β·KL(policy ‖
    reference) earns after its KL (A*-PO, Brantley et al. 2025, arXiv:2505.20686, stage one). It lies between their mean
    reward and their best one; of a few it comes out too low on average, the logarithm being concave.

    Raises:
        ValueError: if β is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}: the temperature of an optimal value must be positive")
    scaled_PG = torch.where(reward_PG.isnan(), -torch.inf, widen(reward_PG) / beta)
    count_P = (~reward_PG.isnan()).sum(1).to(scaled_PG.dtype)
    value_P = beta * (scaled_PG.logsumexp(1) - count_P.clamp(min=1).log())
    return torch.where(count_P > 0, value_P, torch.nan)


def _all(x_PGL: Tensor) -> Tensor:
    return x_PGL.sum(1, keepdim=True).expand_as(x_PGL)


def _others(x_PGL: Tensor) -> Tensor:
    """The sum over the other completions, without subtracting: little would be left of the digits."""
    nothing = torch.zeros_like(x_PGL[:, :1])
    before = torch.cat([nothing, x_PGL.cumsum(1)[:, :-1]], 1)
    after = torch.cat([x_PGL.flip(1).cumsum(1).flip(1)[:, 1:], nothing], 1)
    return before + after
