"""Evaluation while a stage trains: held-out metrics every so many steps, the best step so far, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.console import compact
from rlpost.policy.policy import Policy
from rlpost.train.params import KeepBest
from rlpost.train.random_state import random_state_kept
from rlpost.train.trainable import Trainable

Measure = Callable[[], Mapping[str, float]]
"""Held-out metrics of the weights as they are."""


@dataclass(frozen=True)
class RecipeMeasure:
    """The recipe's evaluation, for policies while they are trained."""

    every: int = 0
    """Steps between evaluations, unless a stage says otherwise; 0: none."""
    of: Callable[[Policy], Measure] | None = None
    """Gives the numbers of a policy as it is; None where there are none."""


_SAID = 4
"""Metrics of an evaluation that are printed; all are in the log."""


class StageEvaluation:
    """What a stage is measured by while it trains; checkpoints hold the best step, so that a resumed stage knows it."""

    def __init__(self, every: int, measures: Sequence[Measure], keep_best: KeepBest | None) -> None:
        """Nothing is evaluated yet.

        Args:
            every: steps between evaluations; 0: none.
            measures: give the metrics.
            keep_best: what is compared, if the best weights are wanted.
        """
        self._every = every if measures else 0
        self._measures = measures
        self.keep_best = keep_best
        self.best: float | None = None
        """The best value so far."""
        self.best_step: int | None = None
        self.waited = 0
        """Evaluations since then."""

    def due(self, done: int, steps: int) -> bool:
        """Whether to evaluate after `done` of `steps` steps."""
        return self._every > 0 and (done % self._every == 0 or done == steps)

    def measure(self, models: Sequence[Trainable]) -> dict[str, float]:
        """The metrics of these models as they are, without dropout; nothing of them or of random generators changes."""
        modes = [model.training for model in models]
        for model in models:
            model.train(False)
        with random_state_kept():
            found = {name: value for measure in self._measures for name, value in measure().items()}
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
        return found

    def note(self, done: int, metrics: Mapping[str, float]) -> None:
        """Remember the step if it is the best so far; a metric that is missing this time is no improvement."""
        chosen = self.keep_best
        if chosen is None:
            return
        value = metrics.get(chosen.metric, math.nan)
        if math.isfinite(value) and (self.best is None or self._gain(value, self.best) > chosen.min_delta):
            self.best, self.best_step, self.waited = value, done, 0
        else:
            self.waited += 1

    @property
    def stops(self) -> bool:
        """Whether the stage is to stop early: as many evaluations as the recipe allows brought nothing better."""
        patience = self.keep_best.patience if self.keep_best is not None else None
        return patience is not None and self.waited >= patience

    def shown(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What the progress line shows of an evaluation: the metric that is compared, or the first one."""
        key = self.keep_best.metric if self.keep_best is not None else next(iter(metrics), "")
        return {f"eval/{key}": metrics[key]} if key in metrics else {}

    def line(self, done: int, metrics: Mapping[str, float]) -> str:
        """An evaluation in a line."""
        key = self.keep_best.metric if self.keep_best is not None else ""
        brief = [name for name in metrics if name != key and name.count("/") < 2][: _SAID - bool(key)]
        text = ", ".join(f"{name} {compact(metrics[name])}" for name in [key, *brief] if name in metrics)
        if self.best_step is None:
            return f"evaluation: {text}"
        best = "the best so far" if self.best_step == done else f"the best was at step {self.best_step}"
        return f"evaluation: {text} ({best})"

    def outcome(self, done: int, steps: int) -> Iterator[str]:
        """What is to be said after the last step, in lines."""
        if self.keep_best is None:
            return
        metric = self.keep_best.metric
        if self.stops and done < steps:
            times = f"{self.waited} evaluation{'s' * (self.waited > 1)}"
            yield f"stopped early after step {done}: {times} without a better {metric}"
        if self.best is None:
            yield f"no evaluation gave {metric}, so the result is of the last step"
        else:
            yield f"the result is of step {self.best_step}, the best by {metric} ({compact(self.best)})"

    def about_result(self, done: int) -> dict[str, Any]:
        """For checkpoint.json: the step that the result's weights are from, and why."""
        if self.best_step is None or self.keep_best is None:
            return {"step": done}
        best = {"metric": self.keep_best.metric, "value": self.best, "steps_done": done}
        return {"step": self.best_step, "best": best}

    def state(self) -> dict[str, Any]:
        """The best so far, and what was compared, as JSON; empty without `keep_best`."""
        if self.keep_best is None:
            return {}
        return {"of": self._of(), "best": self.best, "step": self.best_step, "waited": self.waited}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore it; of another metric nothing is known yet."""
        if self.keep_best is not None and state.get("of") == self._of():
            self.best, self.best_step, self.waited = state["best"], state["step"], state["waited"]

    def _of(self) -> list[Any]:
        assert self.keep_best is not None
        return [self.keep_best.metric, self.keep_best.lower]

    def _gain(self, value: float, before: float) -> float:
        assert self.keep_best is not None
        return before - value if self.keep_best.lower else value - before
