"""Credit per action: returns, generalised advantages, rewards of steps, and values by fresh rollouts.

Axes: N action tokens, S completions, K steps of all completions, L the longest completion. The scalar reward of a
completion is on its last action. Episodes end where completions do. Tokens that are not actions do not appear here, so
credit passes across the turns of a tool or an environment. Estimators whose unit is the turn are in turns.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.ragged import Ragged, widen


class Steps:
    """Which actions make up which step.

    Example: ``Steps(Ragged([3, 2]), torch.tensor([False, True, False, False, True]))`` has K = 3 steps of 2, 1 and 2
    actions: a completion's last action always ends a step.
    """

    def __init__(self, rows: Ragged, ends_N: Tensor) -> None:
        """Divide the actions of `rows` where `ends_N` says."""
        last = rows.last[rows.last >= 0]
        ends = ends_N.clone()
        ends[last] = True
        self.rows = rows
        self.last_K = ends.nonzero()[:, 0]
        """[K] index into N of each step's last action."""
        self.first_K = torch.cat([self.last_K.new_zeros(1), self.last_K[:-1] + 1])[: len(self.last_K)]
        """[K] index into N of each step's first action."""
        self.rows_K = Ragged(self.last_K - self.first_K + 1)
        """The steps as rows of actions."""
        self.completion_K = rows.index_N[self.last_K]
        """[K] the completion of each step."""

    @property
    def step_N(self) -> Tensor:
        """[N] the step of each action."""
        return self.rows_K.index_N

    @property
    def count_S(self) -> Tensor:
        """[S] steps of each completion."""
        return torch.bincount(self.completion_K, minlength=self.rows.completions)

    def spread(self, x_K: Tensor) -> Tensor:
        """[N] each step's value at every one of its actions."""
        return x_K[self.step_N]


def reward_on_last_action(reward_S: Tensor, rows: Ragged) -> Tensor:
    """[N] each completion's reward on its last action, 0 elsewhere; a completion without actions is left out."""
    wide_S = widen(reward_S)
    acted = rows.last >= 0
    return wide_S.new_zeros(rows.actions).index_put((rows.last[acted],), wide_S[acted])


def return_to_go(reward_N: Tensor, rows: Ragged, *, gamma: float = 1.0) -> Tensor:
    """[N] Σ_{k≥t} γ^{k−t} r_k within each completion (REINFORCE, Williams 1992)."""
    if gamma == 1.0:
        return rows.suffix_sum(reward_N)
    return rows.flatten(_discounted(rows.pad(widen(reward_N)), gamma))


def gae(
    reward_N: Tensor,
    value_N: Tensor,
    rows: Ragged,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[N] advantage and [N] return A + V (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    δ_t = r_t + γV_{t+1} − V_t and A_t = δ_t + γλA_{t+1}. After a completion's last action V is 0, or `bootstrap_S`
    where it was truncated (Pardo et al. 2018, arXiv:1712.00378).

    Args:
        reward_N: reward of each action.
        value_N: the critic's value of the state in which each action was taken.
        rows: which actions belong to which completion.
        gamma: discount, per action.
        gae_lambda: λ; 1 gives the return less the value, 0 the one-step temporal difference.
        bootstrap_S: value of the state after each completion's end, 0 where it terminated.
    """
    value_N = widen(value_N)
    reward_SL, value_SL = rows.pad(widen(reward_N)), rows.pad(value_N)
    next_SL = torch.cat([value_SL[:, 1:], value_SL.new_zeros(rows.completions, 1)], 1)[:, : value_SL.shape[1]]
    if bootstrap_S is not None and rows.actions:
        acted = (rows.lengths_S > 0).nonzero()[:, 0]
        next_SL = next_SL.index_put((acted, rows.lengths_S[acted] - 1), widen(bootstrap_S)[acted].to(next_SL.dtype))
    # Past a completion's end all terms are 0.
    inside_SL = rows.pad(torch.ones_like(value_N))
    delta_SL = (reward_SL + gamma * next_SL - value_SL) * inside_SL
    advantage_N = rows.flatten(_discounted(delta_SL, gamma * gae_lambda))
    return advantage_N, advantage_N + value_N


def spread_evenly(reward_K: Tensor, steps: Steps) -> Tensor:
    """[N] each step's reward in equal shares on its actions."""
    return steps.spread(widen(reward_K) / steps.rows_K.lengths_S)


def on_last(reward_K: Tensor, steps: Steps) -> Tensor:
    """[N] each step's reward on its last action."""
    return reward_on_last_action(reward_K, steps.rows_K)


def least(reward_K: Tensor, steps: Steps) -> Tensor:
    """[N] only the worst step of a completion (the first of equals) keeps its reward, on its last action.

    The min form of credit (PURE, Cheng et al. 2025, arXiv:2504.15275, in the limit of temperature 0): a chain of
    reasoning is as good as its weakest step.
    """
    reward_K = widen(reward_K)
    if not len(reward_K):
        return reward_K.new_zeros(steps.rows.actions)
    by_completion = Ragged(steps.count_S)
    padded = by_completion.pad(reward_K, fill=torch.inf)
    worst_S = padded.argmin(1) + by_completion.start_S
    keep_K = torch.zeros_like(reward_K, dtype=torch.bool)
    keep_K[worst_S[steps.count_S > 0]] = True
    return on_last(torch.where(keep_K, reward_K, 0.0), steps)


def process(
    step_reward_K: Tensor, steps: Steps, *, how: Literal["even", "last", "least"] = "even", gamma: float = 1.0
) -> Tensor:
    """[N] return-to-go of rewards by step: `even` shares on a step's actions, on its `last` one, or the `least` form.

    With γ = 1 the total return of a completion is the sum of its steps' rewards for `even` and `last` alike.

    Raises:
        ValueError: for another `how`.
    """
    forms = {"even": spread_evenly, "last": on_last, "least": least}
    if how not in forms:
        raise ValueError(f"how={how!r}: rewards of steps are placed {', '.join(forms)}")
    return return_to_go(forms[how](step_reward_K, steps), steps.rows, gamma=gamma)


def process_normalised(step_reward_K: Tensor, steps: Steps, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """[N] process supervision of GRPO (arXiv:2402.03300, §4.1.3): A_t = Σ over steps ending at or after t of z.

    z is the step's reward, less the mean over all steps of the group's completions, over their standard deviation
    (with Bessel's correction, + eps). A group whose steps are all rewarded alike carries no signal: 0. NaN marks a
    step without a reward: absent from the statistics, 0.

    Raises:
        ValueError: if the completions are not whole groups.
    """
    if group_size < 1 or steps.rows.completions % group_size:
        raise ValueError(f"{steps.rows.completions} completions are not groups of {group_size}")
    group_K = steps.completion_K // group_size
    by_group = Ragged(torch.bincount(group_K, minlength=steps.rows.completions // group_size))
    scored_K = ~step_reward_K.isnan()
    reward_K = widen(step_reward_K).nan_to_num()
    count_P = by_group.sum(scored_K).clamp(min=1).to(reward_K.dtype)
    centred_K = torch.where(scored_K, reward_K - by_group.spread(by_group.sum(reward_K) / count_P), 0.0)
    variance_P = by_group.sum(centred_K.square()) / (count_P - 1).clamp(min=1)
    z_K = centred_K / (by_group.spread(variance_P).sqrt() + eps)
    high_P = by_group.pad(torch.where(scored_K, reward_K, -torch.inf), fill=-torch.inf)
    low_P = by_group.pad(torch.where(scored_K, reward_K, torch.inf), fill=torch.inf)
    if len(z_K):
        z_K = torch.where(by_group.spread(high_P.amax(1) > low_P.amin(1)), z_K, 0.0)
    return return_to_go(on_last(z_K, steps), steps.rows)


declare(process_normalised, compares_completions=True)


def monte_carlo_values(value_K: Tensor, reward_S: Tensor, steps: Steps) -> Tensor:
    """[N] V̂ after the step less V̂ before it, the same for all actions of a step (VinePPO, Kazemnejad et al. 2024).

    Args:
        value_K: mean return of fresh rollouts from the state at each step's start.
        reward_S: the completions' own rewards, the value of where their last steps end.
        steps: of the completions.
    """
    value_K = widen(value_K)
    next_K = torch.cat([value_K[1:], value_K.new_zeros(1)])[: len(value_K)]
    is_last_K = torch.isin(steps.last_K, steps.rows.last)
    after_K = torch.where(is_last_K, widen(reward_S).to(value_K.dtype)[steps.completion_K], next_K)
    return steps.spread(after_K - value_K)


def potential_shaping(potential_N: Tensor, rows: Ragged, *, gamma: float = 1.0) -> Tensor:
    """[N] γΦ(s′) − Φ(s), with Φ = 0 after the end (Ng, Harada & Russell 1999): the best policy stays the best.

    The sum over a completion telescopes to −Φ(its prompt) at γ = 1, for any actions; a Φ other than 0 at the end would
    reward endings that Φ favours. `potential_N` is Φ of the state in which each action was taken.
    """
    potential_N = widen(potential_N)
    if not rows.actions:
        return potential_N
    next_SL = rows.pad(potential_N)[:, 1:]
    after_N = rows.flatten(torch.cat([next_SL, next_SL.new_zeros(rows.completions, 1)], 1))
    return gamma * after_N - potential_N


def _discounted(x_SL: Tensor, factor: float) -> Tensor:
    """[S, L] Σ_{k≥t} factor^{k−t} x_k along each row."""
    sums = torch.zeros_like(x_SL)
    running_S = x_SL.new_zeros(x_SL.shape[0])
    for t in range(x_SL.shape[1] - 1, -1, -1):
        running_S = x_SL[:, t] + factor * running_S
        sums[:, t] = running_S
    return sums
