"""Checks at load that later tokens change no earlier score, and finds the row length that does.

Training reads a whole row and takes each score as if only the tokens before it had been there. A model that looks
ahead would learn to copy the answer; one whose rotary frequencies follow the length of the row (LongRoPE) scores the
same prefix in two ways. Both are found by changing what comes later, and how far away it is, in one short row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlpost.policy.balance import is_mixture

LEAK = 1e-3
"""Share of an earlier token's effect that rounding may give a later one."""
LEAK_HALF = 0.05
"""The same for half-precision weights."""
ROUNDING = 2e-6
"""Share of the largest logit that rounding may change, where shapes are the same."""
RESHAPED = 1e-4
"""The same, where experts get other tokens."""
RESHAPED_HALF = 0.02
"""The same for half-precision weights."""
ORIGINAL = "original_max_position_embeddings"
"""Name of the length at which rotary factors switch, in rotary parameters."""


@dataclass(frozen=True)
class Causality:
    """Result of `examine`."""

    causal: bool
    """Later tokens change no earlier score."""
    logits_TV: Tensor
    """Logits of prompt and completion by a plain forward pass."""
    length: int | None = None
    """Longer rows are read with other rotary factors; None if length does not matter."""
    step: bool = True
    """True if all longer rows are read alike; False if every length is read in its own way."""


def examine(
    model: Any, prompt: Sequence[int], completion: Sequence[int], vocabulary: int, max_positions: int
) -> Causality:
    """Read one row, and again with other tokens at the beginning and the end of its completion, the last far away.

    Args:
        model: a transformers causal language model.
        prompt: tokens, some.
        completion: tokens, at least three.
        vocabulary: token ids are below it.
        max_positions: positions that the model has.
    """
    assert len(completion) >= 3
    row = [*prompt, *completion]
    other = list(row)
    for changed in (len(prompt), len(row) - 1):
        other[changed] = (row[changed] + 1) % vocabulary
    n = len(prompt)
    alone = logits(model, row)
    far = max_positions - 1 if _takes_positions(model) and len(row) < max_positions < 1 << 30 else None
    # Both changes at once, since a model almost always passes; they are told apart only if it does not.
    share = LEAK_HALF if model.dtype in (torch.bfloat16, torch.float16) else LEAK
    # Shapes are the same, so rounding is too, unless other tokens went to an expert.
    if _is_clean(alone, logits(model, other, far), n, share if is_mixture(model) else 0.0):
        return Causality(True, alone)
    if not _is_clean(alone, logits(model, other), n, share):
        return Causality(False, alone)
    if far is None:
        return Causality(True, alone)
    return Causality(True, alone, *_switch(model, row, far))


def _is_clean(alone_TV: Tensor, other_TV: Tensor, n: int, share: float) -> bool:
    """Whether the first `n` logits agree, compared with how much the changed token moved those after it."""
    effect = _gap(alone_TV[n + 1 : -1], other_TV[n + 1 : -1])
    return _gap(alone_TV[:n], other_TV[:n]) <= max(share * effect, ROUNDING * float(alone_TV.abs().max()))


def logits(model: Any, row: Sequence[int], last_at: int | None = None) -> Tensor:
    """[T, V] float logits of one row by the model alone; the last token may stand at another position."""
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": torch.tensor([list(row)], device=device)}
    if last_at is not None:
        position = torch.arange(len(row), device=device)
        position[-1] = last_at
        inputs["position_ids"] = position[None]
    found: Tensor = model(**inputs, use_cache=False).logits[0]
    return found if found.dtype == torch.float64 else found.float()


def _switch(model: Any, row: Sequence[int], far: int) -> tuple[int | None, bool]:
    """The longest row whose logits agree with its prefixes', and whether all longer ones are read alike."""
    n = len(row) - 1
    # A model's own positions may start elsewhere (RoBERTa's at 2), so positions are passed on both sides.
    near = logits(model, row, n)[:n]
    allowed = _allowed(near, model)
    if _gap(near, logits(model, row, far)[:n]) <= allowed:
        return None, True
    low, high = n, far  # positions of the last token: the prefix agrees at `low`, and not at `high`
    while high - low > 1:
        middle = (low + high) // 2
        if _gap(near, logits(model, row, middle)[:n]) > allowed:
            high = middle
        else:
            low = middle
    step = _gap(logits(model, row, high)[:n], logits(model, row, far)[:n]) <= allowed
    logits(model, row)  # resets frequencies that the model caches between passes to those of short rows
    return high, step


@contextmanager
def early_switch(model: Any, at: int) -> Iterator[bool]:
    """Make rotary factors switch at `at` tokens inside; yields whether the model has such a setting."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    tables: dict[int, dict[str, Any]] = {}
    for config in configs.values():
        parameters = getattr(config, "rope_parameters", None)
        if isinstance(parameters, dict):
            tables |= {id(p): p for p in (parameters, *parameters.values()) if isinstance(p, dict) and ORIGINAL in p}
    before = {key: table[ORIGINAL] for key, table in tables.items()}
    for table in tables.values():
        table[ORIGINAL] = at
    try:
        yield bool(tables)
    finally:
        for key, table in tables.items():
            table[ORIGINAL] = before[key]


def switches_at(model: Any, row: Sequence[int], at: int) -> bool:
    """Whether a row of `at` tokens is read like its prefix, and one of a token more is not."""
    short = row[: at - 3]
    alone, near, far = (logits(model, short, last)[:-1] for last in (None, at - 1, at))
    allowed = _allowed(alone, model)
    return _gap(alone, near) <= allowed < _gap(alone, far)


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _allowed(logits_TV: Tensor, model: Any) -> float:
    share = ROUNDING
    if is_mixture(model):
        share = RESHAPED_HALF if model.dtype in (torch.bfloat16, torch.float16) else RESHAPED
    return share * float(logits_TV.abs().max())


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
