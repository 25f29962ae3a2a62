"""The samples of a step: prompts drawn, completions sampled and scored, or rollouts that another policy made.

Axes: N action tokens, S completions, P prompts of a step, G completions a prompt, K rewards of the recipe's list.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlpost.console import Spell
from rlpost.data.dataset import Dataset
from rlpost.data.formats import DataRole
from rlpost.data.step_split import split_steps
from rlpost.engine.api import Engine
from rlpost.engine.sampling import greedy
from rlpost.environments.loop import collector
from rlpost.environments.scoring import scored
from rlpost.errors import DataError, RecipeError
from rlpost.objectives.ragged import has_signal
from rlpost.policy.policy import Policy
from rlpost.recipe.grouped import Grouped
from rlpost.recipe.specs.common import Rollouts
from rlpost.rewards.score import RewardBatch, Scorer, joined, rewarded
from rlpost.stages.beside import side_engine
from rlpost.stages.context import Context
from rlpost.stages.exclusion import excluding
from rlpost.stages.self_play import past_versions
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group, completions
from rlpost.usercode.toolset import bound_tools

AHEAD = "ahead"
"""In a state: what was drawn for later steps."""


@dataclass(frozen=True)
class Rollout:
    """The samples of one step, scored."""

    groups: Sequence[Group]
    """P groups of G completions, with their rewards."""
    learned: Sequence[Group]
    """The same groups; a completion that is excluded from learning has no actions in them."""
    reward_PG: Tensor
    """[P, G] total rewards; NaN where a completion is excluded."""
    rewards: RewardBatch
    drawn: int
    """Prompts sampled to get these."""
    weights: Mapping[str, float]
    """Of each reward of the recipe's list, by name."""
    drawn_means: Mapping[str, float] = field(default_factory=dict)
    """Mean of each reward over all that was drawn, where groups were chosen from it."""
    staleness: float | None = None
    """Where sampling is ahead of training: mean number of steps since the weights that completions were drawn with."""

    @property
    def experience(self) -> Experience:
        """The learned groups, with the actions' log-probabilities when they were sampled."""
        logprobs = [c.logprobs for c in completions(self.learned)]
        sampled_N = torch.tensor(np.concatenate(logprobs) if logprobs else [], dtype=torch.get_default_dtype())
        return Experience(tuple(self.learned)).with_actions(sampled_logp=sampled_N, old_logp=sampled_N)

    @property
    def reward_S(self) -> Tensor:
        """[S] total rewards, 0 where a completion is excluded."""
        return self.reward_PG.flatten().nan_to_num()

    @property
    def reward_PGK(self) -> Tensor:
        """[P, G, K] each reward of the recipe's list apart, NaN where a completion is unscored."""
        columns = [_tensor(self.rewards.by_name[name]) for name in self.weights]
        apart = torch.stack(columns, 2) if columns else self.reward_PG[..., None]
        return torch.where(self.reward_PG.isnan()[..., None], torch.nan, apart)

    @property
    def weight_K(self) -> Tensor:
        """[K] weight of each reward."""
        return torch.tensor(list(self.weights.values()) or [1.0], dtype=torch.float64)

    def step_rewards(self, completion: int, steps: int) -> list[float]:
        """The weighted sum of what rewards by step gave each step of a completion (its number in S)."""
        total = [0.0] * steps
        for name, weight in self.weights.items():
            given = self.rewards.by_step.get(name)
            own = given[completion] if given is not None else None
            if own is not None:
                total = [t + weight * x for t, x in zip(total, own, strict=True)]
        return total

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the samples: rewards by name, lengths, the share of groups without a signal."""
        sampled = completions(self.groups)
        scored = [r for total in self.rewards.total for r in total if r is not None]
        logprobs = [x for c in sampled for x in c.logprobs.tolist()]
        metrics: dict[str, Any] = {"reward": sum(scored) / len(scored)} if scored and self.rewards.given else {}
        metrics |= {f"reward/{name}": value for name, value in self.rewards.means().items()}
        return (
            metrics
            | {"unscored": self.rewards.unscored}
            | ({"zero_signal": 1.0 - float(has_signal(self.reward_PG).double().mean())} if self.rewards.given else {})
            | {
                "truncated": sum(c.finish == "length" for c in sampled) / len(sampled),
                "length": sum(c.actions for c in sampled) / len(sampled),
                # The mean of −log p over samples is an unbiased estimate of the entropy.
                "entropy": -sum(logprobs) / max(len(logprobs), 1),
            }
            | ({} if self.staleness is None else {"staleness": self.staleness})
            | ({"drawn": self.drawn} if self.drawn > len(self.groups) else {})
            | {f"drawn/{name}": value for name, value in self.drawn_means.items()}
            | _of_tools(sampled)
        )


class Signal:
    """Warns when a stage's rewards stop telling completions apart, and says when they do again."""

    def __init__(self, name: str, cfg: Rollouts) -> None:
        self._name = name
        self._no_gradient, self._counts = isinstance(cfg, Grouped) and cfg.compares_completions, cfg.rewards_count
        self._spell = Spell()

    def report(self, rollout: Rollout, step: int) -> Rollout:
        """Warn about a step's samples if need be, and return them."""
        learned = sorted(set(rollout.reward_PG[~rollout.reward_PG.isnan()].tolist()))
        alone = rollout.reward_PG.shape[1] == 1 and not self._no_gradient
        tells = has_signal(rollout.reward_PG).any() or (alone and len(learned) > 1)
        if not (rollout.rewards.given and self._counts) or tells:
            self._spell.ends(f"{self._name}: rewards differ again from step {step + 1} on")
        elif not learned:
            self._spell.begins(
                f"{self._name}: no completion of step {step + 1} has a reward; nothing is learned from them"
            )
        else:
            all_of = f"every reward of step {step + 1} is {learned[0]:g}"
            equal = all_of if len(learned) == 1 else f"in step {step + 1} each prompt's rewards are equal"
            follows = "no gradient from them" if self._no_gradient else "they do not tell completions apart"
            self._spell.begins(f"{self._name}: {equal}; {follows}")
        return rollout


class Samples(Protocol):
    """Where a stage's rollouts come from."""

    @property
    def data(self) -> Dataset:
        """The stage's rows."""
        ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """What `sample` has spent on its parts so far: `sampling`, `scoring`, …"""
        ...

    def sample(self, step: int) -> Rollout:
        """The rollouts of a step."""
        ...

    def state(self) -> dict[str, Any]:
        """The position in the data, and what is drawn already, as JSON."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


def samples_of(context: Context, cfg: Rollouts, policy: Policy) -> Samples:
    """The policy's own samples, or what another policy's rollouts recorded."""
    if isinstance(cfg, Grouped) and cfg.recorded:
        data = context.data(policy, cfg.data, DataRole.recorded, cfg.max_length, cfg.too_long)
        scorer = context.scorer(cfg.rewards, policy, cfg.step_end) if cfg.rewards else None
        return Recorded(cfg, policy, data, Signal(context.name, cfg), scorer)
    return Sampler(context, cfg, policy)


class Sampler:
    """Completions of the current policy to the stage's prompts, scored by the stage's rewards."""

    def __init__(self, context: Context, cfg: Rollouts, policy: Policy) -> None:
        """Open the stage's prompts; nothing is sampled yet."""
        self.context = context
        self.cfg = cfg
        self.policy = policy
        self.signal = Signal(context.name, cfg)
        room = cfg.max_length - cfg.sampling.max_new_tokens
        tools = bound_tools(cfg, f"stages.{context.name}", context.folder)
        told = [tool.schema for tool in tools]
        self.data = context.data(policy, cfg.data, DataRole.prompts, room, cfg.too_long, tools=told)
        chosen = cfg.rollouts or context.rollouts
        self.staleness = chosen.staleness
        self.scorer = context.scorer(cfg.rewards, policy, cfg.step_end, shares=not self.staleness)
        self.dynamic_sampling_rounds = cfg.dynamic_sampling_rounds if isinstance(cfg, Grouped) else 0
        self.engine: Engine = (
            side_engine(context, policy, chosen) if self.staleness else context.engine(policy, cfg.rollouts)
        )
        environment = context.function(cfg, "environment") if cfg.environment else tools
        self.opponents = past_versions(context, cfg, policy) if cfg.opponents else None
        # An advantage by Monte-Carlo rollouts goes on from these completions, so their cache is kept.
        keep = isinstance(cfg, Grouped) and "value_K" in signature(context.function(cfg, "advantage").call).parameters
        self._collect = collector(
            self.engine, policy, environment, cfg.max_turns, longest=room, opponents=self.opponents, keep=keep
        )
        self._seconds = 0.0

    @property
    def seconds(self) -> Mapping[str, float]:
        """Spent on sampling and on scoring so far."""
        return {"sampling": self._seconds - self.scorer.seconds, "scoring": self.scorer.seconds}

    def state(self) -> dict[str, Any]:
        """The position in the data."""
        return self.data.state()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from that position.

        Raises:
            RecipeError: there are samples besides, which would be left out.
        """
        if state.get(AHEAD):
            raise RecipeError(
                f"stages.{self.context.name}: its checkpoint holds samples of {len(state[AHEAD])} steps that are not "
                "learned from yet, which rollouts.staleness=0 would leave out: keep a staleness of at least 1"
            )
        self.data.load(state)

    def sample(self, step: int) -> Rollout:
        """The step's samples, by the policy as it is.

        Raises:
            RecipeError: they are to be drawn ahead, which `on_policy` alone does.
        """
        if self.staleness:
            raise RecipeError(
                f"stages.{self.context.name}.kind: {self.cfg.kind} takes its samples step by step, so none are drawn "
                "ahead - set rollouts.staleness=0"
            )
        began = time.perf_counter()
        self.engine.update_weights(self.policy, step)
        if self.opponents is not None:
            self.opponents.begin(step)
        rollout = self.draw(step)
        self._seconds += time.perf_counter() - began
        return self.signal.report(rollout, step)

    def draw(self, step: int) -> Rollout:
        """The step's samples, with the weights that the engine has.

        Up to `dynamic_sampling_rounds` more draws of prompts replace groups without a signal. The prompts kept are
        those with a signal first, in the order drawn (dynamic sampling: DAPO, Yu et al. 2025, arXiv:2503.14476, §3.2).
        """
        prompts = self.cfg.prompts_per_step
        rounds = [self._round(step, 0)]
        while len(rounds) <= self.dynamic_sampling_rounds and _with_signal(rounds) < prompts:
            rounds.append(self._round(step, len(rounds) * prompts))
        return rounds[0] if len(rounds) == 1 else _chosen(rounds, prompts)

    def score(self, groups: Sequence[Group]) -> RewardBatch:
        """The rewards of any completions, by step too if they are split into steps."""
        return scored(self.scorer, groups, self.policy)

    def greedy(self, prompts: Sequence[Group]) -> Tensor:
        """[P] reward of each prompt's most likely completion, NaN where it is unscored."""
        groups = self.divided(self._collect(prompts, 1, greedy(self.cfg.sampling), seed=0))
        return learned_from(rewarded(groups, self.score(groups).total))[1][:, 0]

    def _round(self, step: int, first: int) -> Rollout:
        seed = self.context.seed_for("sample", step)
        prompts = self.data.next(self.cfg.prompts_per_step)
        groups = self.divided(self._collect(prompts, self.cfg.group_size, self.cfg.sampling, seed=seed, first=first))
        return rollout_of(groups, self.score(groups), self.scorer.weights, self.cfg.mask_truncated)

    def divided(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with their completions split into steps, if the recipe has `step_end`."""
        if self.cfg.step_end is None:
            return list(groups)
        return [split_steps(g, self.policy.tokenizer, self.cfg.step_end, self.policy.end_ids) for g in groups]


class Recorded:
    """Recorded rollouts of another policy, instead of samples."""

    def __init__(self, cfg: Rollouts, policy: Policy, data: Dataset, signal: Signal, scorer: Scorer | None) -> None:
        """Score with `scorer`, or take the recorded rewards."""
        self.cfg = cfg
        self.policy = policy
        self.data = data
        self.signal = signal
        self.scorer = scorer
        self._seconds = 0.0

    @property
    def seconds(self) -> Mapping[str, float]:
        """Spent on reading rollouts and on scoring so far."""
        scoring = self.scorer.seconds if self.scorer else 0.0
        return {"sampling": self._seconds - scoring, "scoring": scoring}

    def state(self) -> dict[str, Any]:
        """The position in the data."""
        return self.data.state()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from that position."""
        self.data.load(state)

    def sample(self, step: int) -> Rollout:
        """The next recorded groups.

        Raises:
            DataError: a group has another number of completions than `group_size`.
        """
        began = time.perf_counter()
        rollout = self._read()
        self._seconds += time.perf_counter() - began
        return self.signal.report(rollout, step)

    def _read(self) -> Rollout:
        groups = self.data.next(self.cfg.prompts_per_step)
        for group in groups:
            if len(group.completions) != self.cfg.group_size:
                raise DataError(
                    f"a recorded group has {len(group.completions)} completions but group_size={self.cfg.group_size}; "
                    "set group_size to what was recorded"
                )
        if self.cfg.step_end is not None:
            groups = [split_steps(g, self.policy.tokenizer, self.cfg.step_end, self.policy.end_ids) for g in groups]
        if self.scorer is None:
            rewards = RewardBatch(total=[[c.reward for c in g.completions] for g in groups], by_name={})
        else:
            rewards = scored(self.scorer, groups, self.policy)
        weights = self.scorer.weights if self.scorer else {}
        return rollout_of(groups, rewards, weights, self.cfg.mask_truncated)


def _of_tools(sampled: Sequence[Completion]) -> dict[str, float]:
    """Calls of tools a completion, and the share of them that failed; nothing where there are no tools."""
    calls = [m["tool_calls"] for c in sampled for m in c.messages if "tool_calls" in m]
    results = [m for c in sampled for m in c.messages if m["role"] == "tool"]
    failed = sum(m.get("failed", False) for m in results) / max(len(results), 1)
    return {"tool_calls": sum(map(len, calls)) / len(sampled), "tool_failures": failed} if calls else {}


def rollout_of(
    groups: Sequence[Group], rewards: RewardBatch, weights: Mapping[str, float], mask_truncated: bool
) -> Rollout:
    """The samples with their rewards."""
    groups = rewarded(groups, rewards.total)
    learned, reward_PG = learned_from(groups, mask_truncated)
    return Rollout(groups, learned, reward_PG, rewards, len(groups), weights)


def learned_from(groups: Sequence[Group], mask_truncated: bool = False) -> tuple[list[Group], Tensor]:
    """The groups as they are learned from, and [P, G] their rewards.

    A completion that is unscored, or cut off where `mask_truncated` says so, has no actions there, so that it is
    counted nowhere and moves nothing; its reward is NaN.
    """
    out = [[c.reward is None or (mask_truncated and c.finish == "length") for c in g.completions] for g in groups]
    total = _tensor([[c.reward for c in g.completions] for g in groups])
    return excluding(groups, out), torch.where(torch.tensor(out), torch.nan, total)


def _tensor(total: Sequence[Sequence[float | None]]) -> Tensor:
    return torch.tensor([[float("nan") if r is None else r for r in row] for row in total], dtype=torch.float64)


def _with_signal(rounds: Sequence[Rollout]) -> int:
    return sum(int(has_signal(r.reward_PG).sum()) for r in rounds)


def _chosen(rounds: Sequence[Rollout], prompts: int) -> Rollout:
    """Groups with a signal first, then others, as many as a step has."""
    signal = torch.cat([has_signal(r.reward_PG) for r in rounds]).tolist()
    order = sorted(range(len(signal)), key=lambda i: not signal[i])[:prompts]
    groups, learned = [g for r in rounds for g in r.groups], [g for r in rounds for g in r.learned]
    reward_PG = torch.cat([r.reward_PG for r in rounds])[order]
    drawn = [r.rewards for r in rounds]
    return Rollout(
        groups=[groups[i] for i in order],
        learned=[learned[i] for i in order],
        reward_PG=reward_PG,
        rewards=joined(drawn, order),
        drawn=len(groups),
        weights=rounds[0].weights,
        drawn_means=joined(drawn, range(len(groups))).means(),
    )
