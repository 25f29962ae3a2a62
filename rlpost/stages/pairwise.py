"""The loss of pairs that `dpo` and `online_dpo` share: from log-probabilities to Σ loss·weight.

Axes: N action tokens, P pairs of an update, 2 = (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.facts import fact
from rlpost.objectives.coupled import linearised
from rlpost.objectives.preference import PairBatch, pairs_of
from rlpost.objectives.weights import pair_mean
from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction
from rlpost.usercode.bound import Bound


@dataclass(frozen=True)
class PairObjective:
    """A loss of pairs, with the recipe's modifiers and its NLL term."""

    function: Bound
    modifiers: Sequence[Callable[[PairBatch], PairBatch]] = ()
    nll: float = 0.0
    """Weight of the chosen completions' negative log-likelihood, per token."""
    temperature: float = 1.0
    """The one the completions were sampled at, and the reference scored at."""

    @property
    def stats(self) -> LogitStats:
        """What the forward pass computes: some modifiers need the collision probability too."""
        collision = any(fact(m, "needs_collision") for m in self.modifiers)
        return LogitStats(temperature=self.temperature, collision=collision)

    @property
    def couples(self) -> bool:
        """Whether a pair's loss may depend on other pairs; True unless the loss declares otherwise."""
        return fact(self.function, "couples_pairs")

    def per_pair(self, pairs: PairBatch) -> Tensor:
        """[P] the loss, modifiers applied."""
        for modify in self.modifiers:
            pairs = modify(pairs)
        loss_P: Tensor = self.function(pairs)
        return loss_P if pairs.weight_P is None else loss_P * pairs.weight_P

    def prepared(self, update: Experience, learner: Learner) -> Experience:
        """The update with its weights, normalised over all of it; it has `reference` already.

        For a loss that couples pairs, a first pass without gradient computes the slope of the whole update's loss.
        """
        count = len(update.groups)
        update = update.with_actions(chosen_weight=_chosen_mean(update))
        update = update.with_groups(pair_weight=pair_mean(count, count))
        if not self.couples:
            return update
        every_PC = learner.evaluate_no_grad(lambda output, part: _pairs(output, part).table_PC, update, self.stats)

        def whole(table_PC: Tensor) -> Tensor:
            return self.per_pair(PairBatch.from_table(table_PC)).sum() / count

        value, slope_PC = linearised(whole, every_PC)
        # Each pair carries an equal share of the value, so that parts add up to it.
        return update.with_groups(slope=slope_PC, value=value.expand(len(update.groups)))

    def loss(self) -> LossFunction:
        """Σ loss·weight of a part."""

        def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
            pairs = _pairs(output, part)
            if self.couples:
                loss_P = part["value"]
                # This term is 0, and its gradient is that of the whole update's loss.
                total = (part["slope"] * (pairs.table_PC - pairs.table_PC.detach())).sum()
                total = total + (loss_P * part["pair_weight"]).sum()
            else:
                loss_P = self.per_pair(pairs)
                total = (loss_P * part["pair_weight"]).sum()
            if self.nll:
                total = total - self.nll * (output.logp_N * part["chosen_weight"]).sum()
            return total, _metrics(pairs, loss_P)

        return loss


def _pairs(output: PolicyOutput, part: Experience) -> PairBatch:
    return pairs_of(output.logp_N, part["reference"], part.rows.to(output.logp_N.device), output.collision_N)


def _metrics(pairs: PairBatch, loss_P: Tensor) -> dict[str, Tensor]:
    margin_P, delta_P2 = pairs.margin_P.detach(), pairs.delta_P2.detach()
    return {
        "preference_loss": loss_P.detach(),
        "accuracy": (margin_P > 0).to(margin_P.dtype),
        "margin": margin_P,
        "chosen_logratio": delta_P2[:, 0],
        "rejected_logratio": delta_P2[:, 1],
        "chosen_nll": -pairs.mean_logp_P2[:, 0].detach(),
    }


def _chosen_mean(update: Experience) -> Tensor:
    """[N] a token mean over the chosen completions' actions of the whole update, 0 on the rejected ones."""
    chosen_N = update.rows.spread(torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(update.groups)))
    return chosen_N / max(float(chosen_N.sum()), 1)
