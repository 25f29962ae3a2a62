"""The check at load of the fused decoding step: its logits beside those of the model's own forward.

The norms' weights and the biases of a new model are ones and zeros, under which wrong orders and forgotten terms give
right numbers; so every parameter of one axis, and every one of zeros, is changed at random while the two are compared,
and restored afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlpost.policy.decoders import FlatDecoder
from rlpost.policy.fused import FusedModel
from rlpost.policy.recognise import NotRecognised
from rlpost.types import Group

EXACT = 1e-4
"""Largest difference of a log-probability that counts as rounding."""
STEPS = 4
"""Tokens that are decoded."""


@torch.no_grad()
def why_not_fused(model: Any, groups: list[Group]) -> str:
    """Why the fused step does not serve a model that decodes flat rows, or empty if it does.

    Args:
        model: a transformers causal language model without adapters, whose attention follows a layout.
        groups: some prompts with completions of random tokens.
    """
    with changed(model):
        try:
            fused = FusedModel(model)
        except NotRecognised as reason:
            return str(reason)
        own, other = _decoded(model, groups, None), _decoded(model, groups, fused)
    gap = float((own - other).abs().max())
    return "" if gap < EXACT else f"its fused step differs from its own forward by {gap:.1e}"


def _decoded(model: Any, groups: list[Group], fused: FusedModel | None) -> Tensor:
    """[steps, B, V] log-probabilities after each of the first tokens of all completions; one row leaves on the way."""
    rows = [(number, c) for number, g in enumerate(groups) for c in g.completions]
    steps = min(STEPS, *(len(c.ids) for _, c in rows))
    decoder = FlatDecoder(model, [g.prompt for g in groups], [number for number, _ in rows], steps, fused=fused)
    decoder.start()
    found = []
    live = list(range(len(rows)))
    for t in range(steps):
        ids = torch.tensor([int(rows[row][1].ids[t]) for row in live], device=decoder.device)
        logits = decoder.step(ids)
        found.append(logits.double().log_softmax(-1).flatten())
        if t == 1 and len(live) > 1:
            live = live[1:]
            decoder.keep(torch.arange(1, len(live) + 1, device=decoder.device))
    return torch.cat(found)


@contextmanager
def changed(model: Any) -> Iterator[None]:
    """Norms' weights and biases, and the zeros of new adapters, are off by a tenth or so inside."""
    flat = [p for p in model.parameters() if p.ndim == 1 or not p.any()]
    before = [p.detach().clone() for p in flat]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in flat:
            noise = torch.rand(2, *p.shape, generator=generator).to(p)
            p.mul_(0.9 + 0.2 * noise[0]).add_(0.1 * noise[1] - 0.05)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(flat, before, strict=True):
                p.copy_(old)
