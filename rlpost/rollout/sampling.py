"""One token from each row's logits.

The order is: temperature, top-k, top-p over what top-k left (renormalised), min-p. The log-probability
returned is the one under the distribution that was drawn from: at the sampling temperature, renormalised over
what the filters kept; greedy tokens get theirs at temperature 1 without filters.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlpost.recipe.schema import Sampling


def is_greedy(sampling: Sampling, greedy: bool) -> bool:
    """A temperature of 0 is the limit in which the most likely token is certain."""
    return greedy or sampling.temperature == 0


def choose(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their log-probabilities [B].

    Args:
        logits_BV: of any floating type; computed with in at least float32.
        uniform_B: float64 in (0, 1); the token is where the cumulative distribution passes it.
        sampling: temperature and filters.
        greedy: take the most likely token.
    """
    logits = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    if is_greedy(sampling, greedy):
        logp = logits.log_softmax(-1)
        best = logits.argmax(-1, keepdim=True)
        return best[:, 0], logp.gather(1, best)[:, 0]
    scaled = logits if sampling.temperature == 1.0 else logits / sampling.temperature
    logp = filtered(scaled, sampling).log_softmax(-1)
    chosen = _inverse_cdf(logp.exp(), uniform_B)
    return chosen[:, 0], logp.gather(1, chosen)[:, 0]


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


def _inverse_cdf(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B, 1] the token in whose share of the cumulative distribution the number falls."""
    mass = probability_BV.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    # Strictly below the total, so that the token found has mass; the clamp is for logits that are nan.
    at = torch.minimum(uniform_B[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, at, right=True).clamp_(max=mass.shape[-1] - 1)
