"""Credit over turns: the steps of an episode with an environment, each rewarded at its end.

The actions of a turn share one advantage, and its rewards come after all of them. Which turn an action belongs to is
known before it is drawn, so a baseline may depend on the turn. That holds for turns of an environment and for steps of
a fixed number of actions; where a text ends a step, a token that ends the completion joins the step before it, and
what is said to be exact here is not.

Axes: N action tokens, S completions, K steps (turns) of all completions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.credit import Steps, gae, return_to_go
from rlpost.objectives.ragged import Ragged, widen


def turn_gae(
    reward_K: Tensor,
    value_K: Tensor,
    steps: Steps,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[N] advantage and [K] return A + V: generalised advantage estimation whose time is the turn, not the token.

    δ_k = r_k + γV_{k+1} − V_k and A_k = δ_k + γλA_{k+1} (Schulman et al. 2015, arXiv:1506.02438, eq. 16), A_k on all
    actions of turn k: a whole turn is one action of the process between turns (Zhou et al. 2024, arXiv:2402.19446).
    V_k is settled before the turn's first action, so it is a baseline for each of them: exact for any V with λ = 1, and
    for every λ with the true one.

    Args:
        reward_K: reward of each turn, with all that it paid for its actions (as a penalty for their KL).
        value_K: the critic's value of the state in which each turn's first action was taken.
        steps: the turns.
        gamma: discount, per turn.
        gae_lambda: λ, per turn.
        bootstrap_S: value of the state after each completion's end, 0 where it terminated.
    """
    turns = Ragged(steps.count_S)
    advantage_K, return_K = gae(reward_K, value_K, turns, gamma=gamma, gae_lambda=gae_lambda, bootstrap_S=bootstrap_S)
    return steps.spread(advantage_K), return_K


def turn_leave_one_out(step_reward_K: Tensor, steps: Steps, group_size: int, *, gamma: float = 1.0) -> Tensor:
    """[N] return from turn t on, less its mean over the group's other completions that have a turn t.

    Where no other one has, the baseline is 0. E[b·∇log π(a)] = 0 for every b that is settled before a is drawn: which
    turn an action belongs to is, and the other completions are drawn independently. With `sequence_sum` and γ = 1 it is
    therefore the gradient of the expected sum of rewards, without bias, as `leave_one_out` is; of one turn it is
    `leave_one_out`. Rewards of earlier turns, which an action had no part in, are gone.

    Raises:
        ValueError: if the completions are not whole groups.
    """
    return_K, among = _by_turn(step_reward_K, steps, group_size, gamma)
    # Multiplied before it is divided, as in `leave_one_out`.
    others_K = among.centred_K * among.count_K / (among.count_K - 1).clamp(min=1)
    return steps.spread(torch.where(among.count_K > 1, others_K, return_K))


def turn_normalised(
    step_reward_K: Tensor, steps: Steps, group_size: int, *, gamma: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """[N] return from turn t on, less its mean over the group's completions with a turn t, over (their std + eps).

    `group_normalised` (GRPO, arXiv:2402.03300, §4.1.2) turn by turn; std with Bessel's correction. A turn that one
    completion of the group alone has, and one from which all returns are equal, has advantage 0.

    Raises:
        ValueError: if the completions are not whole groups.
    """
    _, among = _by_turn(step_reward_K, steps, group_size, gamma)
    return steps.spread(among.scaled(True, eps))


declare(turn_normalised, compares_completions=True)


def gigpo(
    step_reward_K: Tensor,
    steps: Steps,
    anchor_K: Tensor,
    group_size: int,
    *,
    omega: float = 1.0,
    gamma: float = 1.0,
    std: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """[N] A_E + ω·A_S (GiGPO, Feng et al. 2025, arXiv:2505.10978): of whole episodes, and of turns from equal states.

    A_E is the sum of an episode's rewards less the group's mean, A_S the return from the turn on less the mean over all
    turns of the group that began in the same state, wherever in an episode; both over (std + eps), or as they are.
    A state that the group was in once has A_S = 0. Biased: an action's own return is in both means.

    Args:
        step_reward_K: reward of each turn.
        steps: the turns.
        anchor_K: a number for the state in which each turn began, the same within a group for the same state.
        group_size: completions of a prompt.
        omega: ω.
        gamma: discount of A_S, per turn.
        std: divide by standard deviations (with Bessel's correction); else only means are subtracted.
        eps: added to them.

    Raises:
        ValueError: if the completions are not whole groups.
    """
    group_K = _group_of(steps, group_size)
    reward_K = widen(step_reward_K)
    turns = Ragged(steps.count_S)
    acted_S = steps.count_S > 0
    group_S = torch.arange(steps.rows.completions, device=steps.rows.device) // group_size
    episodes = _among(turns.sum(reward_K)[acted_S], group_S[acted_S])
    anchors = int(anchor_K.max()) + 1 if len(anchor_K) else 1
    states = _among(return_to_go(reward_K, turns, gamma=gamma), group_K * anchors + anchor_K)
    whole_S = reward_K.new_zeros(steps.rows.completions)
    whole_S[acted_S] = episodes.scaled(std, eps)
    return steps.spread(turns.spread(whole_S) + omega * states.scaled(std, eps))


class _Among(NamedTuple):
    """Numbers among those that they are compared with."""

    count_K: Tensor
    """How many these are, itself included."""
    centred_K: Tensor
    """Less their mean; exactly 0 where all are equal."""
    std_K: Tensor
    """Their standard deviation, with Bessel's correction."""

    def scaled(self, std: bool, eps: float) -> Tensor:
        """[K] less their mean, over (standard deviation + eps) where `std` says so; 0 where all are equal."""
        by_std_K = self.centred_K / (self.std_K + eps if std else 1.0)
        return torch.where(self.centred_K == 0, 0.0, by_std_K)  # also without eps


def _among(x_K: Tensor, set_K: Tensor) -> _Among:
    """`x_K` among those with the same number in `set_K`."""
    names, of_K = torch.unique(set_K, return_inverse=True)
    zeros = x_K.new_zeros(len(names))
    count = zeros.index_add(0, of_K, torch.ones_like(x_K))
    centred_K = x_K - (zeros.index_add(0, of_K, x_K) / count)[of_K]
    high, low = (zeros.scatter_reduce(0, of_K, x_K, which, include_self=False) for which in ("amax", "amin"))
    # Rounding may make the mean of equal numbers differ from them.
    centred_K = torch.where((high > low)[of_K], centred_K, 0.0)
    variance = zeros.index_add(0, of_K, centred_K.square()) / (count - 1).clamp(min=1)
    return _Among(count[of_K], centred_K, variance.sqrt()[of_K])


def _by_turn(step_reward_K: Tensor, steps: Steps, group_size: int, gamma: float) -> tuple[Tensor, _Among]:
    """[K] the return from each turn on, and it among the group's from the same turn on."""
    group_K = _group_of(steps, group_size)
    turns = Ragged(steps.count_S)
    return_K = return_to_go(widen(step_reward_K), turns, gamma=gamma)
    number_K = torch.arange(turns.actions, device=turns.device) - turns.spread(turns.start_S)
    most = int(number_K.max()) + 1 if turns.actions else 1
    return return_K, _among(return_K, group_K * most + number_K)


def _group_of(steps: Steps, group_size: int) -> Tensor:
    """[K] the group of each step."""
    if group_size < 1 or steps.rows.completions % group_size:
        raise ValueError(f"{steps.rows.completions} completions are not groups of {group_size}")
    return steps.completion_K // group_size
