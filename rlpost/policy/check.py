"""Proof at load that the flat forward pass and the tiled head are exact for this model, or an honest fallback.

Families differ in what their attention and head do (windows, soft caps, sinks, position biases); rather than
keep a list, one small batch of random tokens is scored both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlpost.groups import Completion, Group
from rlpost.policy.attention import FLAT
from rlpost.policy.policy import Policy

PLAIN = "eager"
WINDOWS = ("sliding_window", "attention_chunk_size")
"""What families call the reach of their local layers, in the configuration and in the layers."""
WINDOW = 5
"""Its value during the check: shorter than the small batch, or ignoring a window of 4096 would go unseen."""


@dataclass(frozen=True)
class Exactness:
    """What was found."""

    flat: bool
    """Flat rows with shared prompts give what each completion gives alone."""
    tiled: bool
    """The reproduced head gives the model's own logits."""
    gap: float
    """Largest difference of a log-probability between flat rows and rows alone; inf where flat rows cannot run."""
    reason: str
    """Why flat rows are not used, or empty."""


def probe_groups(vocabulary: int, longest: int, seed: int = 0) -> list[Group]:
    """Two groups of random tokens: several completions of different lengths, and a single one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (n,), generator=generator).tolist())

    def group(prompt: int, lengths: tuple[int, ...]) -> Group:
        return Group(draw(prompt), tuple(Completion(draw(n), (True,) * n) for n in lengths))

    scale = min(1.0, longest / 24)
    size = [max(1, int(n * scale)) for n in (13, 9, 4, 11, 7, 8)]
    return [group(size[0], (size[1], size[2], size[3])), group(size[4], (size[5],))]


@torch.no_grad()
def check_exactness(model: Any, tokenizer: Any) -> Exactness:
    """Score one small batch row by row, as flat rows with shared prompts, and with the reproduced head.

    Args:
        model: a transformers causal language model without adapters; left as it was found.
        tokenizer: its tokenizer.
    """
    was_training = model.training
    model.eval()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 24
    groups = probe_groups(Policy(model, tokenizer, flat=False).vocabulary, limit)
    use_attention(model, PLAIN)
    alone = [Group(g.prompt, (c,)) for g in groups for c in g.completions]
    with _short_windows(model):
        plain = _logp(Policy(model, tokenizer, flat=False, tiled=False), alone)
        tiled = _tiled(model, tokenizer, alone, plain)
        gap, reason = _flat_gap(model, tokenizer, groups, plain)
    flat = not reason
    use_attention(model, FLAT if flat else PLAIN)
    model.train(was_training)
    return Exactness(flat, tiled, gap, reason)


def use_attention(model: Any, name: str) -> None:
    """Select an attention implementation for every layer."""
    model.set_attn_implementation(name)


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    """Every window of the model is WINDOW tokens inside, and as it was afterwards."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    owners = [model.config.get_text_config(), *configs.values(), *model.modules()]
    found = [(o, name, getattr(o, name, None)) for o in owners for name in WINDOWS]
    windows = [(o, name, value) for o, name, value in found if isinstance(value, int)]
    for owner, name, _ in windows:
        setattr(owner, name, WINDOW)
    try:
        yield
    finally:
        for owner, name, value in windows:
            setattr(owner, name, value)


def _tiled(model: Any, tokenizer: Any, alone: list[Group], plain: Tensor) -> bool:
    try:
        return _agree(_logp(Policy(model, tokenizer, flat=False, tiled=True), alone), plain, model.dtype)
    except AttributeError:
        # Its trunk or head is not where they usually are: the model's own forward gives the logits.
        return False


def _flat_gap(model: Any, tokenizer: Any, groups: list[Group], plain: Tensor) -> tuple[float, str]:
    try:
        use_attention(model, FLAT)
        flat = _logp(Policy(model, tokenizer, flat=True, tiled=False), groups)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        # A family that takes no layout says so in many ways; each of them means padded rows.
        return float("inf"), f"it does not run on flat rows ({type(error).__name__})"
    gap = float((flat - plain).abs().max())
    if not _agree(flat, plain, model.dtype):
        return gap, f"flat rows differ from plain rows by {gap:.1e}"
    return gap, ""


def _agree(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Rounding of a half-precision pass is judged by its mean, since single tokens may differ by more."""
    if dtype in (torch.bfloat16, torch.float16):
        return float((a - b).abs().mean()) < 0.05
    return float((a - b).abs().max()) < 1e-4


def _logp(policy: Policy, groups: list[Group]) -> Tensor:
    """Flat batches at once; plain rows one by one, since padding itself is not exact in every family."""
    batches = [groups] if policy.flat else [[g] for g in groups]
    return torch.cat([policy(policy.batch(b)).logp_N for b in batches]).double()
