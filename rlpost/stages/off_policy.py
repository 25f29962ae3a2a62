"""What the sampler's log-probabilities are to the trainer's: how far apart, and what is done about it.

Axes: N action tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlpost import console
from rlpost.console import Spell
from rlpost.engine.params import EngineChoice
from rlpost.objectives.correction import correction
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.recipe.grouped import Grouped
from rlpost.recipe.specs.common import Rollouts
from rlpost.stages.context import Context
from rlpost.stages.params import CorrectionMode
from rlpost.train.experience import Experience


class SamplerCorrection:
    """A stage's importance weights between sampler and trainer, as the recipe has them or as the engine needs them."""

    def __init__(self, context: Context, cfg: Rollouts, policy: Policy) -> None:
        """Choose the mode; one that the recipe does not name is told."""
        self._wanted = cfg.correction
        self._temperature = cfg.sampling.temperature
        self._policy = policy
        recorded = isinstance(cfg, Grouped) and cfg.recorded
        engine = None if recorded else cfg.rollouts or context.rollouts
        self._mode = cfg.correction.mode_for(engine)
        if engine is not None and cfg.correction.mode is None and self._mode is not CorrectionMode.none:
            late = f", with weights of {engine.staleness} steps before" if engine.staleness else ""
            console.say(
                f"{context.name}: {engine.engine} samples{late}: actions are weighed by the trainer's probability over "
                f"the sampler's, at most {cfg.correction.cap:g} (correction.mode={self._mode})"
            )

    def of(self, experience: Experience) -> Experience:
        """The experience with `old_logp` recomputed by the trainer, and its importance weight `correction`.

        Unchanged if there is no correction.
        """
        if self._mode is CorrectionMode.none:
            return experience
        wanted = self._wanted
        old_N = logprobs(self._policy, experience.groups, temperature=self._temperature)
        weight_N = correction(
            old_N,
            experience["sampled_logp"],
            experience.rows,
            per=wanted.per.value,
            cap=wanted.cap,
            mode=self._mode.value,
            floor=wanted.floor,
        )
        return experience.with_actions(old_logp=old_N, correction=weight_N)


class Gap:
    """Warns when sampler and trainer compute other log-probabilities of the same tokens with the same weights."""

    def __init__(self, name: str, engine: EngineChoice) -> None:
        self._name = name
        self._engine = engine
        self._spell = Spell()

    def report(self, line: Mapping[str, float], step: int) -> None:
        """Look at a step's metrics; samples of earlier weights differ by what was learned since, and are not judged."""
        gap = line.get("sampler_gap")
        if gap is None or self._engine.staleness:
            return
        if gap <= self._engine.gap_limit:
            self._spell.ends(f"{self._name}: step {step + 1}: sampler and trainer agree again")
            return
        self._spell.begins(
            f"{self._name}: step {step + 1}: the log-probabilities of {self._engine.engine} are {gap:.3g} nats a token "
            f"from the trainer's (limit {self._engine.gap_limit:g}); give both the same precision, or lower "
            "correction.cap (docs/engines.md#when-probabilities-differ)"
        )
