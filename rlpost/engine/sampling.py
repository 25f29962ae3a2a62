"""Samples one token from each row's logits.

The order is: temperature, top-k, top-p over what top-k left (renormalised), min-p. Log-probabilities are those of the
distribution that is drawn from: at the sampling temperature, renormalised over what the filters kept. Greedy tokens
get theirs at temperature 1 without filters.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.engine.params import Sampling
from rlpost.kernels.ops import sample
from rlpost.policy.logprobs import compiled_serves

BLOCK = 64
"""Tokens of the vocabulary whose mass is summed before it is searched."""


def greedy(sampling: Sampling) -> Sampling:
    """The same sampling at temperature 0: the most likely token each time."""
    return sampling.model_copy(update={"temperature": 0.0})


def is_greedy(sampling: Sampling) -> bool:
    """Whether it takes the most likely token each time."""
    return sampling.temperature == 0


def is_whole(sampling: Sampling) -> bool:
    """Whether it draws from the whole distribution."""
    return sampling.temperature > 0 and sampling.top_k <= 0 and sampling.top_p >= 1.0 and sampling.min_p <= 0.0


def choose(
    logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their log-probabilities [B].

    Args:
        logits_BV: of any floating type; computed with in at least float32.
        uniform_B: float64 in (0, 1); the token is where the cumulative distribution passes it.
        sampling: temperature and filters; at temperature 0 the most likely token is taken.
        compiled: draws from the whole distribution may come from the compiled kernel; the same up to rounding.
    """
    if compiled and is_whole(sampling) and compiled_serves(logits_BV):
        return sample(logits_BV, uniform_B, 1 / sampling.temperature)
    logits = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    if is_greedy(sampling):
        logp = logits.log_softmax(-1)
        best = logits.argmax(-1, keepdim=True)
        return best[:, 0], logp.gather(1, best)[:, 0]
    scaled = logits if sampling.temperature == 1.0 else logits / sampling.temperature
    kept = filtered(scaled, sampling)
    shifted = kept - kept.amax(-1, keepdim=True)
    chosen, total = _inverse_cdf(shifted.exp(), uniform_B)
    # The end of the cumulative sum is the normaliser, so log_softmax is not needed.
    logp = shifted.gather(1, chosen) - total.log()
    return chosen[:, 0], logp[:, 0].to(logits.dtype)


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] the logits, −inf where a filter removes the token.

    top_k keeps the k most likely tokens; top_p the smallest set of most likely tokens whose mass reaches p
    (Holtzman et al. 2019, arXiv:1904.09751); min_p those at least p times as likely as the most likely one.
    """
    kept = logits_BV
    if 0 < sampling.top_k < kept.shape[-1]:
        values, where = kept.topk(sampling.top_k)
        kept = torch.full_like(kept, -math.inf).scatter(-1, where, values)
    if sampling.top_p < 1.0:
        values, where = kept.sort(dim=-1, descending=True, stable=True)
        mass = values.softmax(-1, dtype=torch.float64).cumsum(-1)
        # A token stays if those before it have not reached p; so the first always does.
        values[:, 1:].masked_fill_(mass[:, :-1] >= sampling.top_p, -math.inf)
        kept = torch.empty_like(kept).scatter_(-1, where, values)
    if sampling.min_p > 0.0:
        least = kept.amax(-1, keepdim=True) + math.log(sampling.min_p)
        kept = kept.masked_fill(kept < least, -math.inf)
    return kept


def _inverse_cdf(mass_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1] the token whose part of the cumulative mass contains the number, and [B, 1] the total mass.

    Finds the block of tokens first, then the token in it: a cumulative sum over the whole vocabulary is slow.
    """
    missing = -mass_BV.shape[1] % BLOCK
    blocks = (F.pad(mass_BV, (0, missing)) if missing else mass_BV).view(len(mass_BV), -1, BLOCK)
    up_to = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = up_to[:, -1:]
    at = uniform_B[:, None] * total
    block = _first_beyond(up_to, at)
    before = F.pad(up_to, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    token = block * BLOCK + _first_beyond(inside, at - before)
    return token.clamp(max=mass_BV.shape[1] - 1), total


def _first_beyond(up_to: Tensor, at: Tensor) -> Tensor:
    """[B, 1] the first entry of cumulative sums [B, n] above `at`; never one without mass, even by rounding."""
    end = up_to[:, -1:]
    below = torch.minimum(at, torch.nextafter(end, torch.zeros_like(end)))
    # The clamp is for NaN, which has no entry above it.
    return torch.searchsorted(up_to, below, right=True).clamp_(max=up_to.shape[1] - 1)
