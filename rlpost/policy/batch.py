"""Groups as tensors for the model's forward pass: one flat row with shared prompts, or plain padded rows.

Each gives the index of the state before every action (for logits and values) and of the state after every completion
(for rewards and bootstrapping), so nothing downstream depends on the layout.

Axes: B rows, T tokens a row, N action tokens, S completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.devices import moved
from rlpost.objectives.ragged import Ragged
from rlpost.policy.layout import FlatLayout
from rlpost.policy.segment_attention import TILES, Kernels
from rlpost.policy.tiles import Segment
from rlpost.types import Completion, Group, Ids, completions


@dataclass(frozen=True)
class Pass:
    """Input of one forward pass of the model."""

    ids_BT: Tensor
    position_BT: Tensor
    mask_BT: Tensor | None
    """[B, T] 1 on tokens, 0 on padding; None where there is none."""
    layout: FlatLayout | None
    """The layout of a flat row; None for plain rows."""
    copies_BT: Tensor
    """[B, T] completions that each token belongs to: several in a shared prompt, none on padding."""

    def to(self, device: torch.device | str) -> Pass:
        """The same on `device`."""
        return Pass(
            moved(self.ids_BT, device),
            moved(self.position_BT, device),
            None if self.mask_BT is None else moved(self.mask_BT, device),
            None if self.layout is None else self.layout.to(device),
            moved(self.copies_BT, device),
        )


@dataclass(frozen=True)
class Batch:
    """Input of one forward pass of a policy: usually one pass of the model, else several, their states concatenated.

    Example: prompt (5, 6) with completions (7, 8) and (9,), all actions, prompt shared: ids 5 6 7 8 9, positions
    0 1 2 3 2, `before_N` 1 2 1, `after_N` 2 3 4, `target_N` 7 8 9, `after_S` 3 4.
    """

    passes: tuple[Pass, ...]
    before_N: Tensor
    """[N] index into the passes' B·T of the state in which each action was taken."""
    after_N: Tensor
    """[N] index into B·T of the state after each action, which is at the action's own position."""
    after_S: Tensor
    """[S] index into B·T of the state after each completion's last token."""
    target_N: Tensor
    """[N] the actions' token ids."""
    rows: Ragged

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        if self.target_N.device == torch.device(device):
            return self
        return replace(
            self,
            passes=tuple(p.to(device) for p in self.passes),
            before_N=moved(self.before_N, device),
            after_N=moved(self.after_N, device),
            after_S=moved(self.after_S, device),
            target_N=moved(self.target_N, device),
            rows=self.rows.to(device),
        )


Start = tuple[int, int]
"""Two indices of a completion among a pass's states: of its first token, and of its prompt's last one."""
Build = Callable[[Sequence[Group]], tuple[tuple[Pass, ...], list[Start]]]
"""Groups -> the passes that read them, and each completion's start among the states of all of them."""


def laid_out(groups: Sequence[Group], build: Build) -> Batch:
    """The groups as `build` lays them out."""
    passes, starts = build(groups)
    return Batch(passes, rows=_rows(groups), **_scored(completions(groups), starts))


def flat_passes(
    groups: Sequence[Group], share: bool = True, blocks: bool = True, kernels: Kernels = TILES
) -> tuple[tuple[Pass, ...], list[Start]]:
    """A `Build`: all groups as one row without padding; with `share`, each prompt stands once before its completions.

    A prompt is shared only by the completions of its group, which all follow it exactly. `blocks`: attention in blocks
    of queries where it serves; `kernels`: those that may compute it instead.
    """
    pieces: list[Ids] = []
    position: list[NDArray[np.int64]] = []
    segments: list[Segment] = []
    copies: list[int] = []  # of each segment
    starts: list[Start] = []
    end = 0
    for g in groups:
        width = len(g.prompt)
        shared = share and len(g.completions) > 1
        if shared:
            prompt, end = end, end + width
            segments.append(Segment(prompt, width))
            copies.append(len(g.completions))
            pieces.append(g.prompt)
            position.append(np.arange(width))
        for c in g.completions:
            if not shared:
                prompt, end = end, end + width
                pieces.append(g.prompt)
                position.append(np.arange(width))
                segments.append(Segment(prompt, width + len(c.ids)))
            else:
                segments.append(Segment(end, len(c.ids), prompt, width))
            copies.append(1)
            starts.append((end, prompt + width - 1))
            end += len(c.ids)
            pieces.append(c.ids)
            position.append(np.arange(width, width + len(c.ids)))
    layout = FlatLayout(segments, end)
    layout.in_blocks, layout.kernels = blocks, kernels
    flat = Pass(
        ids_BT=_joined(pieces)[None],
        position_BT=_joined(position)[None],
        mask_BT=None,
        layout=layout,
        copies_BT=torch.from_numpy(np.repeat(np.array(copies, np.int64), [s.length for s in segments]))[None],
    )
    return (flat,), starts


def padded_passes(groups: Sequence[Group], pad_id: int = 0) -> tuple[tuple[Pass, ...], list[Start]]:
    """A `Build`: a right-padded row a completion, its prompt repeated; almost every transformers model takes this."""
    lines = [(g.prompt, c.ids) for g in groups for c in g.completions]
    width = max((len(p) + len(c) for p, c in lines), default=1)
    ids = np.full((len(lines), width), pad_id, np.int64)
    mask = np.zeros((len(lines), width), np.int64)
    starts = []
    for row, (prompt, completion) in enumerate(lines):
        end = len(prompt) + len(completion)
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : end] = completion
        mask[row, :end] = 1
        starts.append((row * width + len(prompt), row * width + len(prompt) - 1))
    mask_BT = torch.from_numpy(mask)
    position_BT = torch.arange(width).expand(len(lines), width)
    return (Pass(torch.from_numpy(ids), position_BT, mask_BT, None, mask_BT),), starts


def single_passes(groups: Sequence[Group]) -> tuple[tuple[Pass, ...], list[Start]]:
    """A `Build`: a row without padding, and without a mask, in a pass of its own for each completion."""
    passes: list[Pass] = []
    starts = []
    first = 0
    for g in groups:
        for c in g.completions:
            ids_BT = _joined([g.prompt, c.ids])[None]
            passes.append(Pass(ids_BT, torch.arange(ids_BT.shape[1])[None], None, None, torch.ones_like(ids_BT)))
            starts.append((first + len(g.prompt), first + len(g.prompt) - 1))
            first += ids_BT.shape[1]
    return tuple(passes), starts


def switched_batch(groups: Sequence[Group], build: Build, switch: int) -> Batch:
    """For a model that reads rows of more than `switch` tokens in another way: every action scored as its prefix is.

    When an action was sampled, its row ended there. So the first `switch` states of a row
    come from a pass that reads no more of it; the others, of rows that go on, from a pass over the whole row.
    """
    short, long = _up_to(groups, switch), _beyond(groups, switch)
    passes, short_starts = build(short) if short else ((), [])
    more, long_starts = build(long) if long else ((), [])
    offset = sum(p.ids_BT.numel() for p in passes)
    of_short, of_long = iter(short_starts), iter(long_starts)
    before, after, final, target = (list[NDArray[np.int64]]() for _ in range(4))
    for g in groups:
        room = switch - len(g.prompt)
        for c in g.completions:
            near = next(of_short) if room >= 0 else None
            far = next(of_long) if len(c.ids) > room else None
            acts, last = np.flatnonzero(c.action), np.array([len(c.ids) - 1])
            for found, at in ((before, acts - 1), (after, acts), (final, last)):
                found.append(np.where(at < room, _states(near, at), offset + _states(far, at)))
            target.append(c.ids[acts].astype(np.int64))
    before_N, after_N, after_S, target_N = map(_joined, (before, after, final, target))
    return Batch((*passes, *more), before_N, after_N, after_S, target_N, _rows(groups))


def _states(start: Start | None, at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of a completion's tokens `at` (−1: its prompt's last) among a pass's states; any without a start."""
    first, prompt_end = start or (0, 0)
    return np.where(at < 0, prompt_end, first + at)


def _up_to(groups: Sequence[Group], switch: int) -> list[Group]:
    """The groups cut to their first `switch` tokens, without those whose prompts are longer."""
    return [
        Group(g.prompt, tuple(Completion(c.ids[:room], c.action[:room]) for c in g.completions))
        for g in groups
        if (room := switch - len(g.prompt)) >= 0
    ]


def _beyond(groups: Sequence[Group], switch: int) -> list[Group]:
    """The completions whose rows are longer than `switch`, by group."""
    longer = [(g, tuple(c for c in g.completions if len(g.prompt) + len(c.ids) > switch)) for g in groups]
    return [Group(g.prompt, some) for g, some in longer if some]


def _rows(groups: Sequence[Group]) -> Ragged:
    return Ragged([c.actions for c in completions(groups)])


def _scored(all_completions: Sequence[Completion], starts: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """The fields on states and actions, from where each completion starts and where its prompt ends."""
    before, after, target = [], [], []
    final: list[int] = []
    for c, (start, prompt_end) in zip(all_completions, starts, strict=True):
        final.append(start + len(c.ids) - 1 if len(c.ids) else prompt_end)
        acts = np.flatnonzero(c.action)
        # The first token of each completion is predicted at the prompt's last position, shared or not.
        before.append(np.where(acts > 0, start + acts - 1, prompt_end))
        after.append(start + acts)
        target.append(c.ids[acts])
    named = {"before_N": before, "after_N": after, "target_N": target}
    after_S = torch.tensor(final, dtype=torch.long)
    return {"after_S": after_S, **{name: _joined(pieces) for name, pieces in named.items()}}


def _joined(pieces: Sequence[NDArray[np.integer[Any]]]) -> Tensor:
    """All pieces concatenated, as int64, which torch indexes with."""
    return torch.from_numpy(np.concatenate(pieces, dtype=np.int64) if pieces else np.zeros(0, np.int64))
