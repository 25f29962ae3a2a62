"""Direct preference optimisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

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
MODIFIER = Lookup("dpo.modifiers", "rlpost.objectives.preference_modifiers", ("pairs",), returns="the same")


class Dpo(Offline):
    """Direct preference optimisation and its relatives, on pairs (with `dpo_plackett_luce`, on ranked completions)."""

    kind: str = "dpo"
    batch_size: int = Field(32, ge=1)
    """Pairs an update."""
    loss: Annotated[Function, LOSS] = Field(default_factory=lambda: Function(fn="dpo"))
    """The loss of a pair; in `rlpost/objectives/preference.py`."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the chosen completions' mean negative log-likelihood per token, added to the pair loss."""
    reference: str = "start"
    """The reference model: `start` (where this stage begins), `base`, or an earlier stage that trains."""
    modifiers: Annotated[list[Function], MODIFIER] = Field(default_factory=list)
    """What is done to the pairs before the loss, in order; in `rlpost/objectives/preference_modifiers.py`."""
    refresh: Refresh | None = None
    """A reference that follows the policy; by default it stays."""

    function: ClassVar[str] = "rlpost.stages.dpo:dpo"

    def rows(self) -> DataRole:
        """Pairs, or ranked completions."""
        return DataRole.ranked if self._loss.takes("delta_PK", "reward_PK") else DataRole.pairs

    def eval_metrics(self) -> tuple[str, ...]:
        """Fewer of ranked completions."""
        more = ("margin", "chosen_logratio", "rejected_logratio", "chosen_nll") if self.rows() is DataRole.pairs else ()
        return ("loss", "preference_loss", "accuracy", *more) if self.eval_data else ()

    @property
    def _loss(self) -> FunctionInfo:
        return info_of(self.loss, LOSS)

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from earlier.no_policy(self.reference, f"{where}.reference", ("start", "base"))
        loss, ranks = self.loss.called, self.rows() is DataRole.ranked
        names = [m.called for m in self.modifiers]
        if ranks and names:
            yield f"{where}.modifiers[0]: {names[0]} is for pairs, and {loss} compares whole groups - remove it"
        if ranks and self.nll_coef:
            yield f"{where}.nll_coef: {loss} compares whole groups, of which none is the chosen one - use 0"
        if self.refresh and not self._loss.has("needs_reference"):
            yield f"{where}.refresh: {loss} has no reference that could follow - remove it, or use another loss"
        changed = False
        for i, name in enumerate(names):
            modifier = info_of(self.modifiers[i], MODIFIER)
            changes = modifier.has("changes_log_ratios")
            if changes and not self._loss.has("needs_reference"):
                yield (
                    f"{where}.modifiers[{i}]: {name} changes log-ratios to the reference, and {loss} has none - "
                    "remove it, or use another loss"
                )
            if changed and modifier.has("weighs_actions"):
                yield (
                    f"{where}.modifiers[{i}]: {name} weighs actions - put it before what changes log-ratios, as "
                    "f_divergence does, and only once"
                )
            changed = changed or changes
