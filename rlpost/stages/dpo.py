"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives.

Axes: N action tokens, P groups of an update, K completions of a ranked group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlpost.data.dataset import Dataset
from rlpost.data.formats import DataRole
from rlpost.devices import moved
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.weights import pair_mean
from rlpost.policy.logprobs import PolicyOutput
from rlpost.policy.moving_reference import MovingReference
from rlpost.recipe.specs.dpo import Dpo
from rlpost.stages.context import Context, steps_of
from rlpost.stages.pairwise import PairObjective, loss_of
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction
from rlpost.types import Group, completions


def dpo(context: Context, cfg: Dpo) -> Path:
    """Train on pairs of a chosen and a rejected completion, or on ranked groups; returns the final checkpoint."""
    policy = context.policy()
    need = cfg.rows()
    data = context.data(policy, cfg.data, need, cfg.max_length, cfg.too_long)
    function = loss_of(context, cfg)
    modifiers = [f.call for f in context.functions(cfg, "modifiers")]
    objective = PairObjective(function, modifiers, cfg.nll_coef, gold=cfg.gold_coef)
    ranks = need is DataRole.ranked
    loss, prepared = (ranking_loss(function), prepared_ranking) if ranks else (objective.loss(), objective.prepared)
    steps = steps_of(cfg, data.epoch_length, cfg.batch_size, f"stages.{context.name}")
    moving = MovingReference(policy, context.checkpoint(cfg.reference), context.model) if cfg.refresh else None
    if moving is not None and moving.frozen is not None:
        context.shard(moving.frozen)
    reference = moving or context.reference(policy, cfg.reference)
    references = ReferenceLogprobs(reference, data, draws=0 if cfg.refresh else steps * cfg.batch_size)
    learner = context.learner(policy, cfg, updates=steps, whole_groups=True)
    # The reference of held-out rows, unless it moves.
    known: dict[str, Tensor] = {}

    def measure(groups: tuple[Group, ...]) -> Mapping[str, float]:
        if moving or not known:
            known["reference"] = reference.logprobs(groups)
        return learner.measure(loss, prepared(Experience(groups).with_actions(**known), learner), objective.stats)

    held_out = context.held_out(policy, cfg, measure)
    kept = {"reference": moving} if moving else {}
    loop = context.loop(cfg, {"data": data}, steps, kept, held_out=held_out, policy=learner)

    for step in loop.steps():
        experience = Experience(tuple(data.next(cfg.batch_size)))
        experience = experience.with_actions(reference=references.of(experience.groups))
        metrics = learner.update(loss, prepared(experience, learner), objective.stats)
        if moving and cfg.refresh and (step + 1) % cfg.refresh.every == 0:
            metrics["cut_off"] = moving.move(cfg.refresh.share)
        loop.log(step, metrics, live=("loss", "accuracy", "margin"))
    return context.finish(policy, cfg.kind, steps)


def ranking_loss(function: Callable[..., Tensor]) -> LossFunction:
    """Σ loss·weight over groups whose completions have rewards."""

    def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        rows = part.rows.to(output.logp_N.device)
        groups = Ragged([len(g.completions) for g in part.groups]).to(rows.device)
        delta_S = rows.sum(output.logp_N) - rows.sum(part["reference"])
        reward_S = moved(torch.tensor([_number(c.score) for c in completions(part.groups)]), rows.device)
        # Groups may differ in size: what is padded is an absent completion.
        delta_PK, reward_PK = groups.pad(delta_S), groups.pad(reward_S.to(delta_S), fill=torch.nan)
        loss_P = function(delta_PK=delta_PK, reward_PK=reward_PK)
        metrics = {"preference_loss": loss_P.detach(), "accuracy": _first_is_best(delta_PK.detach(), reward_PK)}
        return (loss_P * part["pair_weight"]).sum(), metrics

    return loss


def prepared_ranking(update: Experience, _: Learner) -> Experience:
    """The update with its weights, normalised over all of it."""
    return update.with_groups(pair_weight=pair_mean(len(update.groups)))


class AnyReference(Protocol):
    """A reference model, frozen or moving."""

    def logprobs(self, groups: Iterable[Group]) -> Tensor:
        """[N] log-probability of every action."""
        ...


class ReferenceLogprobs:
    """The reference's log-probabilities: of the whole dataset at once if its rows come again, else as rows come.

    Either way they are computed from the same groups in the same order on every run, so that a resumed stage
    sees the same digits. A group is found again by a digest of its tokens.
    """

    def __init__(self, reference: AnyReference, data: Dataset, draws: int) -> None:
        """Compute the whole dataset's now, if more rows will be drawn than it has."""
        self._reference = reference
        self._logp_N: Tensor | None = None
        if data.is_augmented or draws <= len(data):
            return
        keys: list[bytes] = []
        ends = [0]

        def noted() -> Iterator[Group]:
            for group in data.every():
                keys.append(_key(group))
                ends.append(ends[-1] + sum(c.actions for c in group.completions))
                yield group

        self._logp_N = reference.logprobs(noted())
        keys_P = np.array(keys)
        order_P = np.argsort(keys_P)
        self._keys_P, self._spans_P2 = keys_P[order_P], np.stack([ends[:-1], ends[1:]], 1)[order_P]

    def of(self, groups: tuple[Group, ...]) -> Tensor:
        """[N] for the actions of `groups`."""
        if self._logp_N is None:
            return self._reference.logprobs(groups)
        found = np.searchsorted(self._keys_P, np.array([_key(g) for g in groups]))
        return torch.cat([self._logp_N[begin:end] for begin, end in self._spans_P2[found].tolist()])


def _key(group: Group) -> bytes:
    """A digest of a group's tokens."""
    digest = hashlib.blake2b(digest_size=12)
    for ids in (group.prompt, *(c.ids for c in group.completions)):
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return digest.hexdigest().encode()


def _number(score: float | None) -> float:
    return float("nan") if score is None else float(score)


def _first_is_best(delta_PK: Tensor, reward_PK: Tensor) -> Tensor:
    """[P] 1 where the completion whose log-ratio is highest has the highest reward."""
    top_P = torch.where(reward_PK.isnan(), -torch.inf, delta_PK).argmax(1, keepdim=True)
    best_P = torch.where(reward_PK.isnan(), -torch.inf, reward_PK).amax(1)
    return (reward_PK.gather(1, top_P)[:, 0] == best_P).to(delta_PK.dtype)
