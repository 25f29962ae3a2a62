"""The likelihood of what environments and tools replied, beside a policy gradient and in its forward pass.

ECHO (Shrivastava et al. 2026, arXiv:2605.24517): the replies stand in the rows anyway, as tokens that are no actions.
Here a pass scores them too. The policy's own loss sees its actions alone, as without them.

Axes: N action tokens, M action and reply tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpost.devices import true_at
from rlpost.environments.reply_tokens import reply_tokens
from rlpost.objectives.supervised import nll
from rlpost.policy.logprobs import PolicyOutput
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction, Term
from rlpost.types import Completion, Group, completions


def with_replies(own: Term, coefficient: float, tokenizer: Any) -> Term:
    """The term with `coefficient` times the mean of −logp over all reply tokens of the update.

    A completion that adds nothing to the policy's own gradient is computed all the same if something was replied in it.
    """
    update = own.experience
    behind: dict[Completion, Completion] = {}  # by identity: cutting an update keeps its completions

    def told(c: Completion) -> Completion:
        wider = Completion(c.ids, c.action | reply_tokens(c, tokenizer))
        behind[wider] = c
        return wider

    groups = tuple(Group(g.prompt, [told(c) for c in g.completions], g.example) for g in update.groups)
    wide = Experience(groups)
    acted_M = _acted(wide, behind)
    replies = wide.rows.actions - update.rows.actions

    def spread(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(len(acted_M), *x_N.shape[1:]).index_copy(0, acted_M.nonzero()[:, 0].to(x_N.device), x_N)

    needed_S = update.needed_S
    if needed_S is not None:
        needed_S = tuple(
            needed or wider.actions > behind[wider].actions
            for needed, wider in zip(needed_S, completions(groups), strict=True)
        )
    wide = Experience(groups, {name: spread(x) for name, x in update.per_action.items()}, update.per_group, needed_S)
    return replace(own, experience=wide, loss=_both(own.loss, coefficient / max(replies, 1), behind))


def _both(loss: LossFunction, weight: float, behind: Mapping[Completion, Completion]) -> LossFunction:
    """The policy's own loss of the actions, and `weight` times −logp of each reply token."""

    def both(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        acted_M, device = _acted(part, behind), output.logp_N.device
        at_N, at_R = true_at(acted_M, device), true_at(~acted_M, device)
        own = [Group(g.prompt, [behind[c] for c in g.completions], g.example) for g in part.groups]
        narrow = Experience(
            tuple(own), {name: x[at_N] for name, x in part.per_action.items()}, part.per_group, part.needed_S
        )
        total, metrics = loss(_at(output, at_N), narrow)
        nll_R = nll(output.logp_N[at_R])
        return total + weight * nll_R.sum(), {**metrics, "reply_nll": nll_R.detach()}

    return both


def _at(output: PolicyOutput, at_N: Tensor) -> PolicyOutput:
    """What was computed for some of the tokens."""
    logp_N, *others = output
    return PolicyOutput(logp_N[at_N], *(None if x is None else x[at_N] for x in others))


def _acted(wide: Experience, behind: Mapping[Completion, Completion]) -> Tensor:
    """[M] on the CPU, True at actions, False at replies."""
    pieces = [behind[c].action[c.action] for c in completions(wide.groups)]
    return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.zeros(0, dtype=torch.bool)
