"""Groups as tensors for one forward pass: one flat row with shared prompts, or plain padded rows.

Both say where the state before each action is (for logits and values) and where the state after each
completion is (for rewards and bootstrapping), so nothing downstream knows which of the two it was.

Axes: B rows, T tokens a row, N action tokens, S completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlpost.groups import Completion, Group, completions
from rlpost.objectives.rows import Rows
from rlpost.policy.layout import FlatLayout, Segment, flat_layout


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Example: prompt (5, 6) with completions (7, 8) and (9,), all actions, prompt shared: ids 5 6 7 8 9, positions
    0 1 2 3 2, `before_N` 1 2 1, `after_N` 2 3 4, `target_N` 7 8 9, `after_S` 3 4.
    """

    ids_BT: Tensor
    position_BT: Tensor
    mask_BT: Tensor | None
    """[B, T] 1 on tokens, 0 on padding; None for a flat batch, which has no padding."""
    layout: FlatLayout | None
    before_N: Tensor
    """Index into B·T of the state in which each action was taken."""
    after_N: Tensor
    """Index into B·T of the state after each action: where the action itself stands."""
    after_S: Tensor
    """Index into B·T of the state after each completion's last token."""
    target_N: Tensor
    """The actions' token ids."""
    rows: Rows

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        if self.ids_BT.device == torch.device(device):
            return self
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            position_BT=self.position_BT.to(device),
            mask_BT=None if self.mask_BT is None else self.mask_BT.to(device),
            layout=None if self.layout is None else self.layout.to(device),
            before_N=self.before_N.to(device),
            after_N=self.after_N.to(device),
            after_S=self.after_S.to(device),
            target_N=self.target_N.to(device),
            rows=self.rows.to(device),
        )


def flat_batch(groups: Sequence[Group], share: bool = True) -> Batch:
    """All groups as one row without padding; with `share`, each prompt stands once before its completions.

    Prompts are shared only among completions that follow it exactly, which is what a Group says by its type.
    """
    ids: list[int] = []
    position: list[int] = []
    segments: list[Segment] = []
    starts: list[tuple[int, int]] = []  # of each completion: its first token, and the last of its prompt
    for g in groups:
        width = len(g.prompt)
        shared = share and len(g.completions) > 1
        if shared:
            prompt = len(ids)
            segments.append(Segment(prompt, width))
            ids.extend(g.prompt)
            position.extend(range(width))
        for c in g.completions:
            if not shared:
                prompt = len(ids)
                ids.extend(g.prompt)
                position.extend(range(width))
                segments.append(Segment(prompt, width + len(c.ids)))
            else:
                segments.append(Segment(len(ids), len(c.ids), prompt, width))
            starts.append((len(ids), prompt + width - 1))
            ids.extend(c.ids)
            position.extend(range(width, width + len(c.ids)))
    scored = _scored(completions(groups), starts)
    return Batch(
        ids_BT=torch.tensor(ids)[None],
        position_BT=torch.tensor(position)[None],
        mask_BT=None,
        layout=flat_layout(segments, len(ids)),
        rows=_rows(groups),
        **scored,
    )


def padded_batch(groups: Sequence[Group], pad_id: int = 0) -> Batch:
    """One right-padded row a completion, its prompt repeated: what any transformers model takes."""
    lines = [(g.prompt, c.ids) for g in groups for c in g.completions]
    width = max((len(p) + len(c) for p, c in lines), default=1)
    ids = np.full((len(lines), width), pad_id, np.int64)
    mask = np.zeros((len(lines), width), np.int64)
    starts = []
    for row, (prompt, completion) in enumerate(lines):
        end = len(prompt) + len(completion)
        ids[row, :end] = [*prompt, *completion]
        mask[row, :end] = 1
        starts.append((row * width + len(prompt), row * width + len(prompt) - 1))
    scored = _scored(completions(groups), starts)
    return Batch(
        ids_BT=torch.from_numpy(ids),
        position_BT=torch.arange(width).expand(len(lines), width),
        mask_BT=torch.from_numpy(mask),
        layout=None,
        rows=_rows(groups),
        **scored,
    )


def _rows(groups: Sequence[Group]) -> Rows:
    return Rows([c.actions for c in completions(groups)])


def _scored(all_completions: Sequence[Completion], starts: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """The fields on states and actions, from where each completion starts and where its prompt ends."""
    before: list[int] = []
    after: list[int] = []
    final: list[int] = []
    target: list[int] = []
    for c, (start, prompt_end) in zip(all_completions, starts, strict=True):
        final.append(start + len(c.ids) - 1 if c.ids else prompt_end)
        for at, (token, acted) in enumerate(zip(c.ids, c.action, strict=True)):
            if acted:
                # The first token of each completion is predicted at the prompt's last position, shared or not.
                before.append(start + at - 1 if at else prompt_end)
                after.append(start + at)
                target.append(token)
    named = {"before_N": before, "after_N": after, "after_S": final, "target_N": target}
    return {name: torch.tensor(x, dtype=torch.long) for name, x in named.items()}
