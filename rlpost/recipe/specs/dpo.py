"""Direct preference optimisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from rlpost.data.params import DataRole
from rlpost.recipe.rules import Earlier
from rlpost.recipe.specs.common import Offline
from rlpost.stages.params import Refresh
from rlpost.usercode.params import Function, Lookup
from rlpost.usercode.signatures import FunctionInfo, info_of

LOSS = Lookup(
    "dpo.loss",
    "rlpost.objectives.preference",
    ("pairs", "delta_PK", "reward_PK"),
    by_name=True,
    some=True,
    returns="elements",
)
LOSSES = Lookup("dpo.losses", "rlpost.objectives.preference", ("pairs",), returns="elements")
MODIFIER = Lookup("dpo.modifiers", "rlpost.objectives.preference_modifiers", ("pairs",), returns="the same")


class WeightedLoss(Function):
    """A loss of pairs in a sum of several."""

    weight: float = Field(1.0, ge=0)
    """What the loss counts in the sum."""


def one_of_both(value: Any) -> Any:
    """A stage's keys as they are given: with `losses`, the default of `loss` does not count."""
    given = isinstance(value, dict) and value.get("losses") and "loss" not in value
    return {**value, "loss": None} if given else value


def loss_problems(loss: Function | None, losses: Sequence[WeightedLoss], where: str) -> Iterator[str]:
    """What is wrong with the `loss` and the `losses` of the stage at `where`."""
    if loss is None and not losses:
        yield f"{where}.loss: missing - give one loss, like {{fn: dpo}}, or several as {where}.losses"
    if loss is not None and losses:
        yield f"{where}.loss: {loss.called} is given beside {where}.losses - keep one of the keys, the other null or []"
    names: list[str] = []
    for i, each in enumerate(losses):
        if each.called in names:
            yield f"{where}.losses[{i}].fn: {each.called!r} is in the sum already - give it once, with one weight"
        names.append(each.called)
    if losses and not any(each.weight for each in losses):
        yield f"{where}.losses: all weights are 0, so there is nothing to minimise - give one above 0"


class Dpo(Offline):
    """Direct preference optimisation and its relatives, on pairs (with `dpo_plackett_luce`, on ranked completions)."""

    kind: str = "dpo"
    batch_size: int = Field(32, ge=1)
    """Pairs an update."""
    loss: Annotated[Function | None, LOSS] = Field(default_factory=lambda: Function(fn="dpo"))
    """The loss of a pair; in `rlpost/objectives/preference.py`."""
    losses: Annotated[list[WeightedLoss], LOSSES] = Field(default_factory=list)
    """Instead of `loss`: several losses of pairs, whose weighted sum is minimised."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the chosen completions' mean negative log-likelihood per token, added to the pair loss."""
    gold_coef: float = Field(0.0, ge=0)
    """The same of a third completion of each row, the gold one in its column `reference`; 0: rows are pairs."""
    reference: str = "start"
    """The reference model: `start` (where this stage begins), `base`, or an earlier stage that trains."""
    modifiers: Annotated[list[Function], MODIFIER] = Field(default_factory=list)
    """What is done to the pairs before the loss, in order; in `rlpost/objectives/preference_modifiers.py`."""
    refresh: Refresh | None = None
    """A reference that follows the policy; by default it stays."""

    function: ClassVar[str] = "rlpost.stages.dpo:dpo"

    def rows(self) -> DataRole:
        """Pairs, pairs with a gold completion, or ranked completions."""
        if self._takes("delta_PK", "reward_PK"):
            return DataRole.ranked
        return DataRole.triples if self.gold_coef else DataRole.pairs

    def eval_metrics(self) -> tuple[str, ...]:
        """Fewer of ranked completions."""
        more = ["margin", "chosen_logratio", "rejected_logratio", "chosen_nll"]
        more += ["gold_nll"] if self.gold_coef else []
        more += [f"preference_loss/{each.called}" for each in self.losses]
        of_pairs = () if self.rows() is DataRole.ranked else more
        return ("loss", "preference_loss", "accuracy", *of_pairs) if self.eval_data else ()

    @property
    def _named(self) -> list[tuple[str, FunctionInfo]]:
        """Each loss by name."""
        one = [] if self.loss is None else [(self.loss.called, info_of(self.loss, LOSS))]
        return one + [(each.called, info_of(each, LOSSES)) for each in self.losses]

    def _takes(self, *names: str) -> bool:
        return any(info.takes(*names) for _, info in self._named)

    _one_of_both = model_validator(mode="before")(one_of_both)

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from earlier.no_policy(self.reference, f"{where}.reference", ("start", "base"))
        yield from loss_problems(self.loss, self.losses, where)
        loss, ranks = " and ".join(name for name, _ in self._named), self.rows() is DataRole.ranked
        has = "has" if len(self._named) == 1 else "have"
        refers = any(info.has("needs_reference") for _, info in self._named)
        names = [m.called for m in self.modifiers]
        if ranks and names:
            yield f"{where}.modifiers[0]: {names[0]} is for pairs, and {loss} compares whole groups - remove it"
        if ranks and self.nll_coef:
            yield f"{where}.nll_coef: {loss} compares whole groups, of which none is the chosen one - use 0"
        if ranks and self.gold_coef:
            yield f"{where}.gold_coef: {loss} compares whole groups, of which none is the gold one - use 0"
        if self.refresh and not refers:
            yield f"{where}.refresh: {loss} {has} no reference that could follow - remove it, or use another loss"
        changed = False
        for i, name in enumerate(names):
            modifier = info_of(self.modifiers[i], MODIFIER)
            changes = modifier.has("changes_log_ratios")
            if changes and not refers:
                yield (
                    f"{where}.modifiers[{i}]: {name} changes log-ratios to the reference, and {loss} {has} none - "
                    "remove it, or use another loss"
                )
            if changed and modifier.has("weighs_actions"):
                yield (
                    f"{where}.modifiers[{i}]: {name} weighs actions - put it before what changes log-ratios, as "
                    "f_divergence does, and only once"
                )
            changed = changed or changes
