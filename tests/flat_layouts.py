"""Random layouts of a flat batch, options of layers, and what attention reads."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from rlpost.policy.attention import AttentionOptions
from rlpost.policy.tiles import Segment


def random_segments(draw: random.Random, shared: bool) -> tuple[list[Segment], int]:
    """Prompts with completions behind them, some empty, and whole rows in between."""
    segments: list[Segment] = []
    end = 0
    for _ in range(draw.randint(1, 6)):
        width = draw.choice([1, 3, 17, 70, 140])
        segments.append(Segment(end, width))
        prompt, end = end, end + width
        for _ in range(draw.randint(0, 4) if shared else 0):
            length = draw.choice([0, 1, 5, 40, 150])
            segments.append(Segment(end, length, prompt, width))
            end += length
    return segments, end


def random_options(draw: random.Random) -> AttentionOptions:
    return AttentionOptions(
        draw.choice([None, 0.3]), draw.choice([None, 1, 5, 64, 130, 1000]), draw.choice([None, 0.75])
    )


def tensors(
    draw: random.Random, tokens: int, heads: int, groups: int, dtype: torch.dtype, width: int = 8
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    return [torch.randn(1, h, tokens, width, generator=generator, dtype=dtype) for h in (heads, groups, groups)]
