"""The entropy bonus of a stage's loss: its weight is fixed, or adapted to the entropy of the samples."""

from __future__ import annotations

from typing import Any

from rlpost.objectives.entropy import adaptive_entropy
from rlpost.recipe.specs.grpo import Grpo
from rlpost.recipe.specs.ppo import Ppo
from rlpost.stages.rollouts import Rollout


class EntropyBonus:
    """The weight of the bonus in the step that is under way; where it is adapted, checkpoints hold its coefficient."""

    def __init__(self, cfg: Grpo | Ppo) -> None:
        """Start from the recipe's `entropy_coef`."""
        self.weight = cfg.entropy_coef
        self._adaptive = cfg.adaptive_entropy
        self._began = self._coef = cfg.entropy_coef

    @property
    def wanted(self) -> bool:
        """Whether an update needs the entropy of its actions."""
        return self._adaptive is not None or self.weight > 0

    def measure(self, rollout: Rollout) -> None:
        """Set the weight by the entropy of a step's samples, before its updates."""
        if self._adaptive is not None:
            entropy = rollout.metrics["entropy"]
            self.weight, self._coef = adaptive_entropy(self._coef, entropy, **self._adaptive.model_dump())

    @property
    def metrics(self) -> dict[str, float]:
        """The weight that a step's updates had, where it is adapted."""
        return {} if self._adaptive is None else {"entropy_coef": self.weight}

    @property
    def states(self) -> dict[str, EntropyBonus]:
        """What checkpoints hold of it, by name."""
        return {} if self._adaptive is None else {"entropy": self}

    def state(self) -> dict[str, Any]:
        """The coefficient of the next step, and the recipe's own that it started from."""
        return {"coef": self._coef, "began": self._began}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the coefficient, at most the recipe's `largest`, unless the recipe's own has changed since."""
        if state["began"] == self._began and self._adaptive is not None:
            self._coef = min(float(state["coef"]), self._adaptive.largest)
