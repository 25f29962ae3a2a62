"""Twisted sequential Monte Carlo: completions that reach a goal, and an estimate of its probability.

Particles are extended by a guided policy, weighed by the ratio of the policy's probability to the proposal's, and
resampled when few of them carry the weight (Lew et al. 2023, arXiv:2306.03081; Zhao et al. 2024, arXiv:2404.17546).
The mean of the weights is an unbiased estimate of P(goal) for any guide; a poor one only costs variance.

Axes: B particles, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlpost.goals.guide import Guide, Mode, Position


@dataclass(frozen=True)
class Particles:
    """The final particles."""

    ids: tuple[tuple[int, ...], ...]
    """[B] completions, end tokens included."""
    weight_B: Tensor
    """[B] normalised weights; zero for completions that miss the goal. All zero if every one does."""
    log_estimate: float
    """log of the unbiased estimate of P(a completion of the policy ends in the goal); −inf if none was found."""


def twisted_smc(
    logp: Callable[[Sequence[Position]], Tensor],
    guide: Guide,
    prompt: tuple[int, ...],
    *,
    particles: int,
    length: int,
    generator: torch.Generator,
    resample_below: float = 0.5,
) -> Particles:
    """Sample towards a goal.

    Args:
        logp: [B, V] log-probabilities of the policy's next token at each position.
        guide: towards the goal.
        prompt: to complete.
        particles: number of completions.
        length: most tokens of a completion.
        generator: of all draws.
        resample_below: resample if the share of effective particles is below this.
    """
    assert guide.mode is Mode.toward
    cloud = _Cloud([Position(prompt, (), length == 1)] * particles, torch.zeros(particles, dtype=torch.float64))
    log_estimate = 0.0
    for t in range(length):
        going = [b for b, p in enumerate(cloud.rows) if not _ended(p, guide)]
        if not going:
            break
        _extend(cloud, going, logp([cloud.rows[b] for b in going]), guide, generator, last=t + 2 == length)
        if cloud.log_weight_B.max() == -math.inf:
            break
        if _effective(cloud.log_weight_B) < resample_below * particles:
            log_estimate += _mean_log(cloud.log_weight_B)
            cloud.resample(generator)
    # At the end, replace each particle's last twist by whether it reached the goal.
    final_B = torch.tensor([_final(p, guide) for p in cloud.rows], dtype=torch.float64)
    final_B = cloud.log_weight_B + torch.where(final_B > 0, -cloud.log_twist_B, -math.inf)
    total = _mean_log(final_B)
    weight_B = torch.zeros_like(final_B) if total == -math.inf else final_B.softmax(0)
    return Particles(tuple(p.ids for p in cloud.rows), weight_B, log_estimate + total)


class _Cloud:
    """Particles with their weights, and the twists contained in them."""

    def __init__(self, rows: list[Position], log_weight_B: Tensor) -> None:
        self.rows = rows
        self.log_weight_B = log_weight_B
        self.log_twist_B = torch.zeros_like(log_weight_B)

    def resample(self, generator: torch.Generator) -> None:
        """Resample particles in proportion to their weights (systematic: one uniform number for all)."""
        share_B = self.log_weight_B.softmax(0)
        count = len(share_B)
        at_B = (
            torch.arange(count, dtype=torch.float64) + torch.rand(1, dtype=torch.float64, generator=generator)
        ) / count
        chosen = torch.searchsorted(share_B.cumsum(0), at_B).clamp(max=count - 1)
        # If rounding ends the cumulative sum below 1, the index could be a particle without weight.
        assert bool((share_B[chosen] > 0).all())
        self.rows = [self.rows[b] for b in chosen.tolist()]
        self.log_twist_B = self.log_twist_B[chosen]
        self.log_weight_B = torch.zeros_like(share_B)


def _extend(
    cloud: _Cloud, going: list[int], logp_BV: Tensor, guide: Guide, generator: torch.Generator, *, last: bool
) -> None:
    """Draw a token from the guided policy for the particles `going`, and update their weights."""
    twist_BV = guide.log_weights(logp_BV, [cloud.rows[b] for b in going])
    proposal_BV = (logp_BV.double() + twist_BV).log_softmax(1)
    token_B = torch.multinomial(proposal_BV.exp(), 1, generator=generator)[:, 0]
    rows = torch.arange(len(going))
    ratio_B = logp_BV.double()[rows, token_B] - proposal_BV[rows, token_B]
    twist_B = twist_BV[rows, token_B]
    for i, b in enumerate(going):
        row = cloud.rows[b]
        cloud.rows[b] = replace(row, ids=(*row.ids, int(token_B[i])), last=last)
        cloud.log_weight_B[b] += ratio_B[i] + twist_B[i] - cloud.log_twist_B[b]
        cloud.log_twist_B[b] = twist_B[i]


def _ended(row: Position, guide: Guide) -> bool:
    return bool(row.ids) and row.ids[-1] in guide.end_ids


def _final(row: Position, guide: Guide) -> float:
    """1 for a completion that ends in the goal, else 0."""
    ended = _ended(row, guide)
    return float(guide.reached(row.ids[:-1] if ended else row.ids, cut=not ended))


def _effective(log_weight_B: Tensor) -> float:
    """(Σw)²/Σw²."""
    return float((2 * log_weight_B.logsumexp(0) - (2 * log_weight_B).logsumexp(0)).exp())


def _mean_log(log_weight_B: Tensor) -> float:
    return float(log_weight_B.logsumexp(0)) - math.log(len(log_weight_B))
