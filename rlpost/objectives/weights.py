"""Weights of actions, or pairs, in one optimiser update: loss = sum(loss_n * weight_n).

Counts are those of the whole update, over all micro-batches and ranks: pass them when `rows` is only a part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives.ragged import Ragged


def token_mean(rows: Ragged, total: int | None = None) -> Tensor:
    """[N] 1/N: every action of the update counts the same (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8).

    `total` is N of the whole update.
    """
    n = rows.actions if total is None else total
    return torch.full((rows.actions,), 1.0 / max(n, 1), dtype=torch.float64, device=rows.device)


def sequence_mean(rows: Ragged, count: int | None = None) -> Tensor:
    """[N] 1/(S·len): every completion counts the same (GRPO, Shao et al. 2024, arXiv:2402.03300, eq. 3).

    `count` is S of the whole update, completions without actions left out.
    """
    return sequence_sum(rows, count) / rows.spread(rows.lengths_S.to(torch.float64))


def sequence_sum(rows: Ragged, count: int | None = None) -> Tensor:
    """[N] 1/S: the unbiased policy gradient sums over a completion (RLOO, Ahmadian et al. 2024, arXiv:2402.14740)."""
    s = rows.learned if count is None else count
    return torch.full((rows.actions,), 1.0 / max(s, 1), dtype=torch.float64, device=rows.device)


def constant_length(rows: Ragged, length: float, count: int | None = None) -> Tensor:
    """[N] 1/(S·length): as `sequence_sum`, at the scale of a token mean (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    Raises:
        ValueError: if `length` is not positive.
    """
    if length <= 0:
        raise ValueError(f"length must be positive, got {length}: use the longest completion allowed")
    return sequence_sum(rows, count) / length


def pair_mean(pairs: int, count: int | None = None, device: torch.device | str = "cpu") -> Tensor:
    """[P] 1/P on `device`: every pair counts the same; `count` is P of the whole update."""
    p = pairs if count is None else count
    return torch.full((pairs,), 1.0 / max(p, 1), dtype=torch.float64, device=device)


def part_mean(rows: Ragged, part: int, of: int) -> Tensor:
    """[N] 1/N′ on the completions at place `part` of every group of `of`, 0 on the others: a token mean over them.

    N′ counts their actions in the whole update, which is given. Over all gold completions, Σ weight·NLL is least where
    the policy is their distribution; a mean per completion counts short ones more, and is least elsewhere.

    Raises:
        ValueError: if the completions are no groups of `of`, or have no such place.
    """
    if of < 1 or not 0 <= part < of or rows.completions % of:
        raise ValueError(f"place {part} in groups of {of} of {rows.completions} completions: there is none such")
    place_S = torch.arange(rows.completions, device=rows.device) % of
    own_N = rows.spread((place_S == part).to(torch.float64))
    return own_N / own_N.sum().clamp(min=1)


def weigh(name: str, rows: Ragged, actions: int, completions: int, length: float) -> Tensor:
    """[N] the weight called `name`, from counts of the whole update.

    Args:
        name: `token_mean`, `sequence_mean`, `sequence_sum` or `constant_length`.
        rows: this part's actions.
        actions: N of the whole update.
        completions: S of the whole update, those without actions left out.
        length: for `constant_length`, the longest completion allowed.

    Raises:
        ValueError: for another name.
    """
    if name == "token_mean":
        return token_mean(rows, actions)
    if name == "sequence_mean":
        return sequence_mean(rows, completions)
    if name == "sequence_sum":
        return sequence_sum(rows, completions)
    if name == "constant_length":
        return constant_length(rows, length, completions)
    raise ValueError(f"no weight {name!r}: token_mean, sequence_mean, sequence_sum or constant_length")
