"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives.

Axes: N action tokens, P pairs of an update, 2 = (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlpost.data.dataset import Dataset
from rlpost.data.formats import Need
from rlpost.experience import Experience
from rlpost.groups import Group
from rlpost.learner import Learner
from rlpost.objectives.preference import pairs_of
from rlpost.objectives.weights import pair_mean
from rlpost.policy.policy import Scores
from rlpost.policy.reference import Reference
from rlpost.recipe.schema import Dpo
from rlpost.stages.context import Context, steps_of


def dpo(context: Context, cfg: Dpo) -> Path:
    """Train on pairs of a chosen and a rejected completion; returns the final checkpoint."""
    policy = context.policy()
    data = context.data(policy, cfg.data, Need.pairs, cfg.max_length, cfg.too_long)
    pair_loss = context.function(cfg.loss, "dpo.loss")
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    references = ReferenceScores(context.reference(policy, cfg.reference), data, draws=steps * cfg.batch_size)
    learner = context.learner(policy, cfg, updates=steps, whole_groups=True)
    loop = context.loop(cfg, {"data": data}, steps, policy=learner)

    def loss(scores: Scores, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        pairs = pairs_of(scores.logp_N, part["reference"], part.rows.to(scores.logp_N.device))
        loss_P = pair_loss(pairs)
        chosen_nll = -(scores.logp_N * part["chosen_weight"]).sum()
        margin_P, delta_P2 = pairs.margin_P.detach(), pairs.delta_P2.detach()
        metrics = {
            "preference_loss": loss_P.detach(),
            "accuracy": (margin_P > 0).to(margin_P.dtype),
            "margin": margin_P,
            "chosen_logratio": delta_P2[:, 0],
            "rejected_logratio": delta_P2[:, 1],
            "chosen_nll": -pairs.mean_logp_P2[:, 0].detach(),
        }
        return (loss_P * part["pair_weight"]).sum() + cfg.nll * chosen_nll, metrics

    for step in loop.steps():
        experience = Experience(tuple(data.next(cfg.batch_size)))
        totals = learner.totals(experience)
        experience = experience.with_actions(
            reference=references.of(experience.groups), chosen_weight=_chosen_mean(experience, learner)
        ).with_groups(pair_weight=pair_mean(len(experience.groups), totals.groups))
        metrics = learner.update(loss, experience)
        loop.log(step, metrics, live=("loss", "accuracy", "margin"))
    return context.finish(policy, cfg.kind, steps)


Key = tuple[tuple[int, ...], ...]
"""A group's tokens."""


class ReferenceScores:
    """The reference's log-probabilities of pairs: all at once where pairs come again, else as they come.

    Either way they are computed from the same groups in the same order on every run, so that a resumed stage
    sees the same digits.
    """

    def __init__(self, reference: Reference, data: Dataset, draws: int) -> None:
        """Score the whole dataset now if it will be drawn from more often than it has rows."""
        self._reference = reference
        self._known: dict[Key, Tensor] = {}
        groups = [] if data.is_presented or draws <= len(data) else data.all()
        lengths = [sum(c.actions for c in g.completions) for g in groups]
        if groups:
            scored = torch.split(reference.logprobs(groups), lengths)
            self._known = {_key(g): x for g, x in zip(groups, scored, strict=True)}

    def of(self, groups: tuple[Group, ...]) -> Tensor:
        """[N] for the actions of `groups`."""
        if self._known:
            return torch.cat([self._known[_key(g)] for g in groups])
        return self._reference.logprobs(groups)


def _key(group: Group) -> Key:
    return (group.prompt, *(c.ids for c in group.completions))


def _chosen_mean(experience: Experience, learner: Learner) -> Tensor:
    """[N] a token mean over the chosen completions' actions of the whole update, 0 on the rejected ones."""
    rows = experience.rows
    chosen_N = rows.spread(torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(experience.groups)))
    return chosen_N / max(learner.total(int(chosen_N.sum())), 1)
