"""Trust-region policy optimisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from rlpost.policy.params import Lora, Model
from rlpost.recipe.grouped import Grouped
from rlpost.recipe.rules import Earlier
from rlpost.train.params import OptimizerName


class Trpo(Grouped):
    """Trust-region policy optimisation: the natural gradient, as far as the trust region allows."""

    kind: str = "trpo"
    learning_rate: float = Field(1.0, gt=0, le=1)
    """The share of the largest allowed step that is tried first."""
    max_kl: float = Field(0.01, gt=0)
    """Radius of the trust region: KL(old || new) in nats, averaged over tokens."""
    cg_damping: float = Field(0.1, ge=0)
    """Added to the Fisher matrix in the solve, not in the step's length."""
    cg_iterations: int = Field(10, ge=1)
    """Iterations of conjugate gradients."""
    backtracks: int = Field(10, ge=0)
    """Halvings of the step before it is given up."""

    function: ClassVar[str] = "rlpost.stages.trpo:trpo"
    kl_in_loss: ClassVar[bool] = False
    balances: ClassVar[bool] = False

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        if self.optimizer is not OptimizerName.adamw:
            yield f"{where}.optimizer: {self.optimizer} - trpo takes its own steps, without an optimiser; remove it"

    def warnings(self, where: str, model: Model) -> Iterator[str]:
        yield from super().warnings(where, model)
        if isinstance(model.lora, Lora) and model.lora.dropout > 0:
            yield (
                f"model.lora.dropout: {where} compares gradients with each other, which dropout "
                "changes at random - 0 gives it a direction"
            )
