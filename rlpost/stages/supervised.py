"""What minimises a supervised loss of given rows, in a stage of its own or beside another loss.

Axes: N action tokens of an update, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlpost.devices import true_at
from rlpost.errors import ModelError, RecipeError
from rlpost.objectives.weights import weigh
from rlpost.policy.logprobs import DistributionLoss, LogitStats, PolicyOutput
from rlpost.policy.policy import Policy
from rlpost.stages.params import Weight
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction
from rlpost.types import Group, labels

FULL = {"logp_NV", "teacher_NV", "target_N"}
"""Parameters of a loss that need the whole vocabulary's log-probabilities."""


def prepared(groups: Sequence[Group], weight: Weight, longest: int, *, with_labels: bool) -> Experience:
    """An update of given rows, with its weights, normalised over all of it, and with its rows' labels if asked for.

    Args:
        groups: the rows.
        weight: how much each token counts.
        longest: tokens that a row may have, for `constant_length`.
        with_labels: at every action, True where the completion is to be imitated.
    """
    update = Experience(tuple(groups))
    rows = update.rows
    update = update.with_actions(weight=weigh(weight, rows, rows.actions, rows.learned, longest))
    return update.with_actions(label=_labels(update)) if with_labels else update


def _labels(update: Experience) -> Tensor:
    """[N] bool, on the CPU."""
    return torch.tensor(labels(update.groups), dtype=torch.bool).repeat_interleave(update.rows.lengths_S)


def supervised_loss(function: Callable[..., Tensor]) -> LossFunction:
    """Σ loss·weight of a function of log-probabilities; one of whole distributions was computed in the forward pass."""
    by_label = "label_N" in inspect.signature(function).parameters

    def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        nll_N = -output.logp_N.detach()
        if by_label:
            loss_N = function(logp_N=output.logp_N, label_N=part["label"])
            wanted_N = _labels(part)
            said, unsaid = (nll_N[true_at(mask_N, nll_N.device)] for mask_N in (wanted_N, ~wanted_N))
            return (loss_N * part["weight"]).sum(), {"nll": said, "unsaid_nll": unsaid}
        loss_N = function(logp_N=output.logp_N) if output.loss_N is None else output.loss_N
        return (loss_N * part["weight"]).sum(), {"nll": nll_N}

    return loss


def stats_of(function: Callable[..., Tensor], teacher: Policy | None) -> LogitStats:
    """What the forward pass computes: also a loss of whole distributions, tile by tile.

    Raises:
        ModelError: the loss asks for a teacher, and there is none.
        RecipeError: it asks for labels and for whole distributions.
    """
    takes = set(inspect.signature(function).parameters)
    wanted = takes & {"logp_N", *FULL}
    if "label_N" in takes and wanted & FULL:
        raise RecipeError(f"a loss with label_N takes only logp_N besides; remove {', '.join(sorted(wanted & FULL))}")
    if "teacher_NV" in wanted and teacher is None:
        raise ModelError("the loss imitates a teacher and there is none; give `teacher`")
    if not wanted & FULL:
        return LogitStats()
    return LogitStats(loss=DistributionLoss(function, frozenset(wanted), teacher if "teacher_NV" in wanted else None))
