"""The loss of pairs that `dpo` and `online_dpo` share: from log-probabilities to Σ loss·weight.

Axes: N action tokens, P pairs of an update, 2 = (chosen, rejected); S completions: of a triple, the gold one is third.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.facts import fact
from rlpost.objectives.coupled import linearised
from rlpost.objectives.mixed import WeightedSum
from rlpost.objectives.preference import PairBatch, pairs_of
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.weights import pair_mean, part_mean
from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.recipe.specs.dpo import Dpo
from rlpost.recipe.specs.online_dpo import OnlineDpo
from rlpost.stages.context import Context
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction
from rlpost.usercode.bound import Bound

LOSS = "preference_loss"
"""The metric; of a sum, `preference_loss/NAME` is each of its losses, without its weight."""


@dataclass(frozen=True)
class PairObjective:
    """A loss of pairs, with the recipe's modifiers and its NLL terms."""

    function: Bound | WeightedSum
    modifiers: Sequence[Callable[[PairBatch], PairBatch]] = ()
    nll: float = 0.0
    """Weight of the chosen completions' negative log-likelihood, per token."""
    temperature: float = 1.0
    """The one the completions were sampled at, and the reference scored at."""
    gold: float = 0.0
    """The same as `nll` of the gold completions; above 0, rows are triples."""

    @property
    def stats(self) -> LogitStats:
        """What the forward pass computes: some modifiers need the collision probability too."""
        collision = any(fact(m, "needs_collision") for m in self.modifiers)
        return LogitStats(temperature=self.temperature, collision=collision)

    @property
    def couples(self) -> bool:
        """Whether a pair's loss may depend on other pairs; True unless the loss declares otherwise."""
        return fact(self.function, "couples_pairs")

    @property
    def size(self) -> int:
        """Completions of a row."""
        return 3 if self.gold else 2

    def each(self, pairs: PairBatch) -> dict[str, Tensor]:
        """[P] the loss as `preference_loss`, and of a sum also each one by name, modifiers applied."""
        for modify in self.modifiers:
            pairs = modify(pairs)
        if isinstance(self.function, WeightedSum):
            each = self.function.each(pairs)
            found = {LOSS: self.function.total(each), **{f"{LOSS}/{name}": x_P for name, x_P in each.items()}}
        else:
            found = {LOSS: self.function(pairs)}
        return found if pairs.weight_P is None else {name: x_P * pairs.weight_P for name, x_P in found.items()}

    def prepared(self, update: Experience, learner: Learner) -> Experience:
        """The update with its weights, normalised over all of it; it has `reference` already.

        For a loss that couples pairs, a first pass without gradient computes the slope of the whole update's loss.
        """
        count = len(update.groups)
        update = update.with_actions(chosen_weight=part_mean(update.rows, 0, self.size))
        if self.gold:
            update = update.with_actions(gold_weight=part_mean(update.rows, 2, self.size))
        update = update.with_groups(pair_weight=pair_mean(count, count))
        if not self.couples or not count:
            return update
        every_PC = learner.evaluate_no_grad(lambda output, part: self._pairs(output, part).table_PC, update, self.stats)

        def whole(table_PC: Tensor) -> Tensor:
            return self.each(PairBatch.from_table(table_PC))[LOSS].sum() / count

        _, slope_PC = linearised(whole, every_PC)
        values = {name: x_P.sum() / count for name, x_P in self.each(PairBatch.from_table(every_PC)).items()}
        # Each pair carries an equal share of a value, so that parts add up to it.
        return update.with_groups(slope=slope_PC, **{name: value.expand(count) for name, value in values.items()})

    def loss(self) -> LossFunction:
        """Σ loss·weight of a part."""

        def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
            pairs = self._pairs(output, part)
            if self.couples:
                each = {name: x_P for name, x_P in part.per_group.items() if name.startswith(LOSS)}
                # This term is 0, and its gradient is that of the whole update's loss.
                total = (part["slope"] * (pairs.table_PC - pairs.table_PC.detach())).sum()
                total = total + (each[LOSS] * part["pair_weight"]).sum()
            else:
                each = self.each(pairs)
                total = (each[LOSS] * part["pair_weight"]).sum()
            if self.nll:
                total = total - self.nll * (output.logp_N * part["chosen_weight"]).sum()
            metrics = _metrics(pairs, each)
            if self.gold:
                total = total - self.gold * (output.logp_N * part["gold_weight"]).sum()
                metrics["gold_nll"] = -part.rows.to(output.logp_N.device).mean(output.logp_N.detach())[2::3]
            return total, metrics

        return loss

    def _pairs(self, output: PolicyOutput, part: Experience) -> PairBatch:
        """The pairs of the part; gold completions are left out."""
        rows = part.rows.to(output.logp_N.device)
        values = [output.logp_N, part["reference"], output.collision_N]
        if self.gold:
            of_pair_S = torch.arange(rows.completions, device=rows.device) % self.size < 2
            of_pair_N = rows.spread(of_pair_S)
            values = [None if x_N is None else x_N[of_pair_N] for x_N in values]
            rows = Ragged(rows.lengths_S[of_pair_S])
        logp_N, reference_N, collision_N = values
        assert logp_N is not None
        assert reference_N is not None
        return pairs_of(logp_N, reference_N, rows, collision_N)


def loss_of(context: Context, cfg: Dpo | OnlineDpo) -> Bound | WeightedSum:
    """The stage's `loss`, or the weighted sum of its `losses`."""
    if not cfg.losses:
        return context.function(cfg, "loss")
    bound = {function.name: function for function in context.functions(cfg, "losses")}
    return WeightedSum(bound, {each.called: each.weight for each in cfg.losses})


def _metrics(pairs: PairBatch, each: Mapping[str, Tensor]) -> dict[str, Tensor]:
    margin_P, delta_P2 = pairs.margin_P.detach(), pairs.delta_P2.detach()
    return {
        **{name: x_P.detach() for name, x_P in each.items()},
        "accuracy": (margin_P > 0).to(margin_P.dtype),
        "margin": margin_P,
        "chosen_logratio": delta_P2[:, 0],
        "rejected_logratio": delta_P2[:, 1],
        "chosen_nll": -pairs.mean_logp_P2[:, 0].detach(),
    }
