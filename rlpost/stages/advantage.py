"""The advantage of every action, by the estimator that the recipe names; and the steps of completions.

An estimator is given what its parameters are named after: rewards of groups, lengths, a greedy completion's reward,
steps, their rewards and the states they begin in, values by Monte-Carlo rollouts, probabilities, columns of the rows.

Axes: N action tokens, S completions, P prompts of a step, G completions a prompt, K steps of all completions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpost.data.row_values import number_in
from rlpost.data.step_split import ends_of, step_starts
from rlpost.engine.mc_rollouts import as_answers, mc_rollouts
from rlpost.errors import DataError
from rlpost.objectives.advantages import ema
from rlpost.objectives.credit import Steps, reward_on_last_action
from rlpost.objectives.ragged import Ragged
from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.policy.policy import Policy
from rlpost.policy.score import read
from rlpost.recipe.grouped import Grouped
from rlpost.stages.context import Context
from rlpost.stages.role_means import RoleMeans
from rlpost.stages.rollouts import Rollout, Sampler, Samples
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group, completions

DECAY = 0.9
"""Of the running mean, where the estimator's `args` give no other."""


class AdvantageEstimator:
    """A stage's advantage estimator; checkpoints hold its running mean of rewards, or one for each role."""

    def __init__(self, context: Context, cfg: Grouped, policy: Policy, samples: Samples) -> None:
        """Bind the recipe's estimator; some draw more completions from `samples`."""
        self._context = context
        self._cfg = cfg
        self._policy = policy
        self._samples = samples
        self._function = context.function(cfg, "advantage")
        self._parameters = set(inspect.signature(self._function.call).parameters)
        self._mean: float | None = None
        self._roles = RoleMeans(f"stages.{context.name}.advantage", cfg.advantage.args)
        self._step = 0

    def state(self) -> dict[str, Any]:
        """The running means of rewards."""
        return {"running_mean": self._mean, **self._roles.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore those means."""
        self._mean = state["running_mean"]
        self._roles.load(state)

    def advantage(self, rollout: Rollout, experience: Experience, step: int) -> Tensor:
        """[N] the advantage of every action, whatever the estimator's own shape."""
        self._step = step
        known = _Known(rollout, experience.groups, experience.rows, self)
        given = {name: make() for name, make in known.by_name().items() if name in self._parameters}
        found: Tensor = self._function(**given)
        if "running_mean" in self._parameters:
            decay = float(self._cfg.advantage.args.get("decay", DECAY))
            self._mean = ema(self._mean, rollout.reward_PG, decay)
        if "running_mean_P" in self._parameters:
            self._roles.move(experience.groups, rollout.reward_PG)
        return experience.rows.spread(found.flatten()) if found.ndim == 2 else found

    @property
    def name(self) -> str:
        """The recipe's estimator."""
        return self._cfg.advantage.called

    @property
    def running_mean(self) -> float:
        """Mean of the rewards so far; 0 before the first."""
        return self._mean or 0.0

    def running_means(self, groups: Sequence[Group]) -> Tensor:
        """[P] mean of the earlier rewards of each prompt's role; 0 before the first."""
        return self._roles.of(groups)

    def column(self, groups: Sequence[Group]) -> Tensor:
        """[P] the number in the column of each prompt's row that the recipe names.

        Raises:
            DataError: a row has no such column, or no number there.
        """
        column, where = self._cfg.advantage.args["column"], f"stages.{self._context.name}.advantage.args.column"
        return torch.tensor([number_in(group.example, column, where) for group in groups], dtype=torch.float64)

    def distributions(self, groups: Sequence[Group]) -> Tensor:
        """[N, 2] log-probability of every action, and log Σ p² of what it was drawn from, by the policy as it is."""
        stats = LogitStats(temperature=self._cfg.sampling.temperature, collision=True)
        return read(self._policy, groups, stats, _both).view(-1, 2)

    def values_of_steps(self, groups: Sequence[Group]) -> Tensor:
        """[K] mean reward of fresh rollouts from the start of every step."""
        assert isinstance(self._samples, Sampler), "validated: recorded rollouts give no new ones"
        cfg = self._cfg
        fresh = mc_rollouts(
            self._samples.engine,
            self._policy.tokenizer,
            groups,
            [step_starts(c) for c in completions(groups)],
            cfg.fresh_rollouts,
            cfg.sampling,
            self._context.seed_for("fresh", self._step),
        )
        totals = self._samples.score(self._samples.divided(as_answers(fresh))).total
        return torch.tensor([_mean([r for r in row if r is not None]) for row in totals], dtype=torch.float64)

    def greedy(self, groups: Sequence[Group]) -> Tensor:
        """[P] rewards of the most likely completions."""
        assert isinstance(self._samples, Sampler), "validated: recorded rollouts give no new ones"
        return self._samples.greedy(groups)


def _both(output: PolicyOutput) -> Tensor:
    """[n, 2]."""
    assert output.collision_N is not None, "it was asked for"
    return torch.stack([output.logp_N, output.collision_N], 1)


@dataclass(frozen=True)
class _Known:
    """All that an estimator may ask about a step's samples, computed on demand."""

    rollout: Rollout
    groups: Sequence[Group]
    rows: Ragged
    estimator: AdvantageEstimator

    def by_name(self) -> dict[str, Callable[[], Any]]:
        """Every name an estimator may ask for."""
        return {
            "reward_PG": lambda: self.rollout.reward_PG,
            "length_PG": lambda: self.rows.lengths_S.view(self.rollout.reward_PG.shape).double(),
            "greedy_P": lambda: self.estimator.greedy(self.groups),
            "reward_PGK": lambda: self.rollout.reward_PGK,
            "weight_K": lambda: self.rollout.weight_K,
            "running_mean": lambda: self.estimator.running_mean,
            "reward_S": lambda: self.rollout.reward_S,
            "reward_N": lambda: reward_on_last_action(self.rollout.reward_S, self.rows),
            "rows": lambda: self.rows,
            "steps": lambda: self.steps,
            "step_reward_K": lambda: step_rewards(self.rollout, self.steps),
            "anchor_K": lambda: anchors(self.groups),
            "value_K": lambda: self.estimator.values_of_steps(self.groups),
            "group_size": lambda: self.rollout.reward_PG.shape[1],
            "logp_N": lambda: self.both_N2[:, 0],
            "collision_N": lambda: self.both_N2[:, 1],
            "running_mean_P": lambda: self.estimator.running_means(self.groups),
            "column_P": lambda: self.estimator.column(self.groups),
        }

    @cached_property
    def both_N2(self) -> Tensor:
        """[N, 2] log-probabilities and collisions, of one pass."""
        return self.estimator.distributions(self.groups)

    @property
    def steps(self) -> Steps:
        """The steps of all completions.

        Raises:
            DataError: a recorded one has no steps.
        """
        if any(c.actions and not len(c.steps) for c in completions(self.groups)):
            raise DataError(
                f"a recorded completion has no `steps`, and {self.estimator.name} credits steps - give step_end, the "
                "text that ends one"
            )
        return steps_in(self.groups)


def steps_in(groups: Sequence[Group]) -> Steps:
    """The steps of all completions; one that is not split into steps has its turns, the runs of its actions."""
    ends = [end for c in completions(groups) for end in (ends_of(c) if len(c.steps) else _turn_ends(c))]
    return Steps(Ragged([c.actions for c in completions(groups)]), torch.tensor(ends, dtype=torch.bool))


def step_rewards(rollout: Rollout, steps: Steps) -> Tensor:
    """[K] rewards by step; the rest of a completion's reward is on its last step, so that totals agree."""
    by_step: list[float] = []
    for s, count in enumerate(steps.count_S.tolist()):
        if count:
            own = rollout.step_rewards(s, count)
            own[-1] += float(rollout.reward_S[s]) - sum(own)
            by_step += own
    return torch.tensor(by_step, dtype=torch.float64)


def anchors(groups: Sequence[Group]) -> Tensor:
    """[K] a number for the state in which each step begins; the same within a group where the state is.

    A state is what the environment wrote just before the step, or the prompt; where nothing is written in between, all
    that came before.
    """
    found: list[int] = []
    for group in groups:
        numbers: dict[bytes, int] = {}
        for c in group.completions:
            for before in _observations(c):
                found.append(numbers.setdefault(before, len(numbers)))
    return torch.tensor(found, dtype=torch.long)


def _observations(completion: Completion) -> Iterator[bytes]:
    """What each step is to be compared by."""
    acted, ids = np.flatnonzero(completion.action), completion.ids
    ends = np.flatnonzero(ends_of(completion) if len(completion.steps) else _turn_ends(completion))
    for before in (-1, *ends[:-1].tolist()) if len(ends) else ():
        start, since = acted[before + 1], acted[before] + 1 if before >= 0 else 0
        yield b"written" + ids[since:start].tobytes() if since < start else b"so far" + ids[:start].tobytes()


def _turn_ends(completion: Completion) -> list[bool]:
    """For every action, whether what follows is no action."""
    acted = np.flatnonzero(completion.action)
    ends: list[bool] = np.append(np.diff(acted) > 1, [True] * (len(acted) > 0)).astype(bool).tolist()
    return ends


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
