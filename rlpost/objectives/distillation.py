"""On-policy distillation: divergences over a teacher's likeliest tokens, and credit for states that actions lead to.

Axes: N action tokens, S completions, G completions a prompt, V vocabulary, K tokens; K1 those and one class for all
other tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives.ragged import Ragged, widen
from rlpost.objectives.supervised import log1mexp


def top_tokens(logp_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """([N, K] the `k` likeliest tokens of each distribution, likeliest first; [N, K] their log-probabilities).

    Raises:
        ValueError: if `k` is below 1, or leaves no other token of the vocabulary.
    """
    vocabulary = logp_NV.shape[-1]
    if not 1 <= k < vocabulary:
        raise ValueError(f"k is a number of tokens from 1 to {vocabulary - 1}, one less than the vocabulary, got {k}")
    logp_NK, ids_NK = logp_NV.topk(k, dim=-1)
    return ids_NK, logp_NK


def fold(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """[N, K1] the same distributions over the given tokens and one class for all others.

    No token's probability is dropped, so a divergence of two distributions that are folded alike is a divergence still,
    and at most that of the whole ones (data-processing inequality): what is lost is how they differ among the others.
    Over all but one of the vocabulary's tokens nothing is.

    Raises:
        ValueError: if the tokens leave no other of the vocabulary.
    """
    if ids_NK.shape[-1] >= logp_NV.shape[-1]:
        raise ValueError(f"{ids_NK.shape[-1]} tokens of a vocabulary of {logp_NV.shape[-1]} leave no others to fold")
    logp_NV = widen(logp_NV)
    # A sum of the others, not 1 less the given: that has no digits where little is left. Of nothing but −inf there
    # would be no gradient.
    others_N1 = logp_NV.scatter(-1, ids_NK, torch.finfo(torch.float32).min).logsumexp(-1, keepdim=True)
    return torch.cat([logp_NV.gather(-1, ids_NK), others_N1], -1)


def with_others(logp_NK: Tensor) -> Tensor:
    """[N, K1] distributions of which only some tokens' log-probabilities are known, 1 less their sum for all others.

    For a teacher that tells no more than its likeliest tokens. The others' share is at least the rounding of float32.
    """
    logp_NK = widen(logp_NK)
    known_N1 = logp_NK.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(torch.float32).eps)
    return torch.cat([logp_NK, log1mexp(known_N1)], -1)


def divergence_to_go(divergence_N: Tensor, rows: Ragged, group_size: int) -> Tensor:
    """[N] Σ_{k>t} D_k, less the mean of the group's other completions: what an action adds by the states it leads to.

    D_k is the divergence in the state before action k, over its whole distribution. The gradient of E[Σ_t D_t] over the
    student's own completions is E[Σ_t ∇D_t + ∇logp_t·Σ_{k>t} D_k]: a loss of each state's own divergence has the first
    term alone; with this as the negative of an advantage it has both, and for the reverse KL they are the gradient of
    KL(student || teacher) of whole completions (MiniLLM, Gu et al. 2023, arXiv:2306.08543, splits it alike). The
    state's own divergence needs no ∇logp_t: its expectation over the action is taken already.

    The baseline is the others' own Σ_{k>t}, 0 after their end: independent of the action, hence without bias. Rows lie
    group after group, `group_size` each; completions without actions are no baseline of others.

    Raises:
        ValueError: if the rows are not whole groups.
    """
    if group_size < 1 or rows.completions % group_size:
        raise ValueError(f"{rows.completions} completions are not groups of {group_size}")
    wide_N = widen(divergence_N).detach()
    later_SL = rows.pad(rows.suffix_sum(wide_N) - wide_N)
    if group_size == 1 or not rows.actions:
        return rows.flatten(later_SL)
    later_PGL = later_SL.view(-1, group_size, later_SL.shape[1])
    learned_PG1 = (rows.lengths_S > 0).to(wide_N.dtype).view(-1, group_size, 1)
    others_PG1 = (learned_PG1.sum(1, keepdim=True) - learned_PG1).clamp(min=1)
    baseline_PGL = (later_PGL.sum(1, keepdim=True) - later_PGL) / others_PG1
    return rows.flatten((later_PGL - baseline_PGL).flatten(0, 1))
