"""Direct preference optimisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Optional

from rlpost.data.params import Need
from rlpost.key import key
from rlpost.recipe.rules import Earlier
from rlpost.recipe.specs.common import Training
from rlpost.stages.params import Refresh
from rlpost.usercode.params import Function, Lookup

# ruff: noqa: UP045 - see common.py

LOSS = Lookup(
    "dpo.loss",
    "rlpost.objectives.preference",
    ("pairs", "delta_PK", "reward_PK"),
    by_name=True,
    some=True,
    returns="elements",
)
MODIFIER = Lookup("dpo.modifiers", "rlpost.objectives.preference_modifiers", ("pairs",), returns="the same")
_WITHOUT_REFERENCE = ("simpo", "cpo", "orpo")
"""Losses of pairs that look at the policy alone."""
_OF_LOG_RATIOS = ("f_divergence", "length_desensitised")
"""Modifiers that change log-ratios to the reference, and nothing else."""


@dataclass
class Dpo(Training):
    """Direct preference optimisation and its relatives, on pairs (with `ranking`, on ranked completions)."""

    kind: str = "dpo"
    batch_size: int = key(32, ge=1)
    """Pairs an update."""
    loss: Function = key(factory=lambda: Function("dpo"), lookup=LOSS)
    nll: float = key(0.0, ge=0)
    """Weight of the chosen completion's negative log-likelihood, per token, beside the pair loss."""
    reference: str = "start"
    """`start` (where this stage begins), `base`, or an earlier stage by name."""
    modifiers: list[Function] = key(factory=list, lookup=MODIFIER)
    """What is done to the pairs before the loss, in order (objectives/preference_modifiers.py)."""
    refresh: Optional[Refresh] = None

    function: ClassVar[str] = "rlpost.stages.dpo:dpo"

    def rows(self) -> Need:
        """Pairs, or ranked completions."""
        return Need.ranked if self.loss.fn == "ranking" else Need.pairs

    def problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of training; a setting without an effect is refused, so that nobody takes the result for its."""
        yield from super().problems(where, earlier)
        yield from earlier.no_policy(self.reference, f"{where}.reference", ("start", "base"))
        loss, modifiers = self.loss.fn, [m.fn for m in self.modifiers]
        if loss == "ranking" and modifiers:
            yield f"{where}.modifiers[0]: {modifiers[0]} is for pairs, and ranking compares whole groups - remove it"
        if loss == "ranking" and self.nll:
            yield f"{where}.nll: ranking compares whole groups, of which none is the chosen one - use 0"
        if loss in _WITHOUT_REFERENCE and self.refresh:
            yield f"{where}.refresh: {loss} has no reference that could follow - remove it, or use another loss"
        for i, name in enumerate(modifiers):
            if loss in _WITHOUT_REFERENCE and name in _OF_LOG_RATIOS:
                yield (
                    f"{where}.modifiers[{i}]: {name} changes log-ratios to the reference, and {loss} has none - "
                    "remove it, or use another loss"
                )
            if name == "length_desensitised" and any(m in _OF_LOG_RATIOS for m in modifiers[:i]):
                yield f"{where}.modifiers[{i}]: {name} weighs actions - put it before f_divergence, and only once"
