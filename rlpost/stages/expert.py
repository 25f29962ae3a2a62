"""An expert's rows, learned from in every update beside a policy's own samples (CHORD, arXiv:2508.11408).

An update has then two terms, each counted over all of its own tokens, so neither depends on how many the other has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlpost.data.formats import DataRole
from rlpost.objectives.mixing import expert_weight
from rlpost.policy.policy import Policy
from rlpost.recipe.specs.grpo import Expert, Grpo
from rlpost.recipe.specs.sft import LOSS
from rlpost.stages.context import Context
from rlpost.stages.supervised import prepared, stats_of, supervised_loss
from rlpost.train.learner import Learner, Term
from rlpost.usercode.binding import bind
from rlpost.usercode.toolset import bound_tools


class ExpertRows:
    """Adds a term of the expert's next rows to updates; checkpoints hold the position in the rows."""

    def __init__(self, context: Context, cfg: Grpo, expert: Expert, policy: Policy) -> None:
        """Open the rows; none is drawn yet."""
        where = f"stages.{context.name}"
        told = [tool.schema for tool in bound_tools(cfg, where, context.folder)]
        self._data = context.data(
            policy, expert.data, expert.rows(), cfg.max_length, cfg.too_long, key="expert.data", tools=told
        )
        function = bind(expert.loss, LOSS, f"{where}.expert.loss", context.folder)
        self._loss, self._stats = supervised_loss(function), stats_of(function, None)
        self._cfg = expert
        self._longest = cfg.max_length

    def update(self, learner: Learner, own: Term, step: int) -> dict[str, float]:
        """One optimiser step on (1 − μ) times the policy's own loss and μ times that of the next rows."""
        mu = self._cfg.mu
        share = expert_weight(
            step, peak=mu.peak, valley=mu.valley, warmup_steps=mu.warmup_steps, decay_steps=mu.decay_steps
        )
        groups = self._data.next(self._cfg.batch_size)
        labelled = self._cfg.rows() is DataRole.labelled
        rows = prepared(groups, self._cfg.weight, self._longest, with_labels=labelled)
        expert = Term(self._loss, rows, self._stats, factor=share, name="expert")
        return {**learner.update_on([replace(own, factor=1 - share), expert]), "mu": share}

    def state(self) -> dict[str, Any]:
        """The position in the rows."""
        return self._data.state()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from that position."""
        self._data.load(state)
