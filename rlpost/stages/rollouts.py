"""What the stages that learn from samples share: drawing prompts, sampling, scoring, and the KL's coefficient.

Axes: N action tokens, S completions, P prompts of a step, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlpost.console import Spell
from rlpost.data.dataset import Dataset
from rlpost.data.divide import divide, step_texts
from rlpost.data.formats import Need
from rlpost.engine.sampling import greedy
from rlpost.environments.loop import Collect, collector
from rlpost.errors import DataError
from rlpost.objectives import kl
from rlpost.objectives.rows import has_signal
from rlpost.policy.policy import Policy
from rlpost.recipe.specs.common import GROUP_BASELINES, Grouped, Rollouts
from rlpost.rewards.score import Scorer, joined, rewarded
from rlpost.rewards.score import Scores as Rewards
from rlpost.stages.context import Context
from rlpost.stages.params import Kl, KlEstimator
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group, completions


@dataclass(frozen=True)
class Rollout:
    """The samples of one step, scored."""

    groups: Sequence[Group]
    """P groups of G completions, with their rewards."""
    rewards: Rewards
    reward_PG: Tensor
    """[P, G] total rewards; NaN where a completion is unscored, or left out of learning."""
    drawn: int
    """Prompts sampled to get these."""
    weights: Mapping[str, float]
    """Of each reward of the recipe's list, by name."""
    drawn_means: Mapping[str, float] = field(default_factory=dict)
    """Mean of each reward over all that was drawn, where groups were chosen from it."""

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
        """What the samples say by themselves: rewards by name, lengths, how many groups teach anything."""
        sampled = completions(self.groups)
        scored = [r for total in self.rewards.total for r in total if r is not None]
        logprobs = [x for c in sampled for x in c.logprobs.tolist()]
        metrics: dict[str, Any] = {"reward": sum(scored) / len(scored)} if scored else {}
        metrics |= {f"reward/{name}": value for name, value in self.rewards.means().items()}
        return (
            metrics
            | {
                "unscored": self.rewards.unscored,
                "zero_signal": 1.0 - float(has_signal(self.reward_PG).double().mean()),
                "truncated": sum(c.finish == "length" for c in sampled) / len(sampled),
                "length": sum(c.actions for c in sampled) / len(sampled),
                # The mean of −log p over samples is an unbiased estimate of the entropy.
                "entropy": -sum(logprobs) / max(len(logprobs), 1),
            }
            | ({"drawn": self.drawn} if self.drawn > len(self.groups) else {})
            | {f"drawn/{name}": value for name, value in self.drawn_means.items()}
        )


class Signal:
    """Whether a stage's rewards tell completions apart: what is said when they do not, and when they do again."""

    def __init__(self, name: str, cfg: Rollouts) -> None:
        self._name = name
        self._nothing = isinstance(cfg, Grouped) and cfg.advantage.fn in GROUP_BASELINES
        self._spell = Spell()

    def look(self, rollout: Rollout, step: int) -> Rollout:
        """Look at the samples of a step, and pass them on."""
        learned = sorted(set(rollout.reward_PG[~rollout.reward_PG.isnan()].tolist()))
        if has_signal(rollout.reward_PG).any():
            self._spell.ends(f"{self._name}: rewards differ again from step {step + 1} on")
        elif not learned:
            self._spell.begins(f"{self._name}: no completion of step {step + 1} has a reward; nothing is learned")
        else:
            all_of = f"every reward of step {step + 1} is {learned[0]:g}"
            equal = all_of if len(learned) == 1 else f"in step {step + 1} each prompt's rewards are equal"
            follows = "no gradient from them" if self._nothing else "they do not tell completions apart"
            self._spell.begins(f"{self._name}: {equal}; {follows}")
        return rollout


class Samples(Protocol):
    """Where a stage's rollouts come from."""

    @property
    def data(self) -> Dataset:
        """The stage's rows."""
        ...

    def sample(self, step: int) -> Rollout:
        """The rollouts of a step."""
        ...


def samples_of(context: Context, cfg: Rollouts, policy: Policy) -> Samples:
    """The policy's own samples, or what another policy's rollouts recorded."""
    if isinstance(cfg, Grouped) and cfg.recorded:
        data = context.data(policy, cfg.data, Need.recorded, cfg.max_length, cfg.too_long)
        scorer = context.scorer(cfg.rewards, policy, cfg.step_end) if cfg.rewards else None
        return Recorded(cfg, policy, data, Signal(context.name, cfg), scorer)
    return Sampler(context, cfg, policy)


class Sampler:
    """Samples of the policy as it is, from the stage's prompts, scored by the stage's rewards."""

    def __init__(self, context: Context, cfg: Rollouts, policy: Policy) -> None:
        """Open the stage's prompts; nothing is sampled yet."""
        self.context = context
        self.cfg = cfg
        self.policy = policy
        self.signal = Signal(context.name, cfg)
        room = cfg.max_length - cfg.sampling.max_new_tokens
        self.data = context.data(policy, cfg.data, Need.prompts, room, cfg.too_long)
        self.scorer = context.scorer(cfg.rewards, policy, cfg.step_end)
        self.resample = cfg.resample if isinstance(cfg, Grouped) else 0
        self.engine = context.engine(policy, cfg.rollouts)
        self._environment = context.function(cfg, "environment") if cfg.environment else None
        self.gone_on_from = False
        """Whether more is sampled from inside the completions of a step."""

    def sample(self, step: int) -> Rollout:
        """The step's samples; groups without a signal are replaced from up to `resample` more draws of prompts.

        The prompts kept are those with a signal first, in the order drawn (dynamic sampling: DAPO, Yu et al. 2025,
        arXiv:2503.14476, §3.2).
        """
        self.engine.update_weights(self.policy, step)
        prompts = self.cfg.prompts
        rounds = [self._round(step, 0)]
        while len(rounds) <= self.resample and _with_signal(rounds) < prompts:
            rounds.append(self._round(step, len(rounds) * prompts))
        return self.signal.look(rounds[0] if len(rounds) == 1 else _chosen(rounds, prompts), step)

    def score(self, groups: Sequence[Group]) -> Rewards:
        """The rewards of any completions, with their steps if the stage divides them."""
        return scored(self.scorer, groups, self.policy)

    def greedy(self, prompts: Sequence[Group]) -> Tensor:
        """[P] reward of each prompt's most likely completion, NaN where it is unscored."""
        groups = self.divided(self._collect(prompts, 1, greedy(self.cfg.sampling), seed=0))
        return _tensor(self.score(groups).total)[:, 0]

    @property
    def _collect(self) -> Collect:
        return collector(self.engine, self.policy, self._environment, self.cfg.turns, keep=self.gone_on_from)

    def _round(self, step: int, first: int) -> Rollout:
        seed = self.context.seed_for("sample", step)
        prompts = self.data.next(self.cfg.prompts)
        groups = self.divided(self._collect(prompts, self.cfg.group_size, self.cfg.sampling, seed=seed, first=first))
        rewards = self.score(groups)
        groups = rewarded(groups, rewards.total)
        reward_PG = learned_rewards(groups, self.cfg.mask_truncated)
        return Rollout(groups, rewards, reward_PG, len(groups), self.scorer.weights)

    def divided(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, their completions divided into steps if the recipe says how."""
        if self.cfg.step_end is None:
            return list(groups)
        return [divide(g, self.policy.tokenizer, self.cfg.step_end, self.policy.end_ids) for g in groups]


class Recorded:
    """Rollouts that another policy made, in the place of samples."""

    def __init__(self, cfg: Rollouts, policy: Policy, data: Dataset, signal: Signal, scorer: Scorer | None) -> None:
        """Score with `scorer`, or take the recorded rewards."""
        self.cfg = cfg
        self.policy = policy
        self.data = data
        self.signal = signal
        self.scorer = scorer

    def sample(self, step: int) -> Rollout:
        """The next prompts with what was sampled of them.

        Raises:
            DataError: a group has another number of completions than `group_size`.
        """
        groups = self.data.next(self.cfg.prompts)
        for group in groups:
            if len(group.completions) != self.cfg.group_size:
                raise DataError(
                    f"a recorded group has {len(group.completions)} completions but group_size={self.cfg.group_size}; "
                    "set group_size to what was recorded"
                )
        if self.cfg.step_end is not None:
            groups = [divide(g, self.policy.tokenizer, self.cfg.step_end, self.policy.end_ids) for g in groups]
        if self.scorer is None:
            rewards = Rewards(total=[[c.reward for c in g.completions] for g in groups], by_name={})
        else:
            rewards = scored(self.scorer, groups, self.policy)
            groups = rewarded(groups, rewards.total)
        reward_PG = learned_rewards(groups, self.cfg.mask_truncated)
        weights = self.scorer.weights if self.scorer else {}
        return self.signal.look(Rollout(groups, rewards, reward_PG, len(groups), weights), step)


def scored(scorer: Scorer, groups: Sequence[Group], policy: Policy) -> Rewards:
    """The rewards of any completions, told of their steps if they are divided."""
    if not any(len(c.steps) for c in completions(groups)):
        return scorer.score(groups)
    return scorer.score(groups, steps=[step_texts(c, policy.tokenizer, policy.end_ids) for c in completions(groups)])


class Beta:
    """The KL's coefficient: fixed, or moved towards a target; its state is saved with checkpoints."""

    def __init__(self, cfg: Kl) -> None:
        """Begin at the recipe's value."""
        self.value = cfg.beta
        self._cfg = cfg

    def seen(self, experience: Experience) -> dict[str, float]:
        """Take note of a step's KL; returns it, in nats a completion, with the coefficient it was weighed by."""
        if "reference" not in experience.per_action:
            return {}
        rows = experience.rows
        kl_S = rows.sum(kl.k1(experience["old_logp"], experience["reference"]))
        mean = float(kl_S.sum()) / max(rows.learned, 1)
        line = {"sequence_kl": mean, "beta": self.value}
        if self._cfg.target is not None:
            self.value = kl.adaptive(
                self.value, mean, target=self._cfg.target, horizon=self._cfg.horizon, count=rows.learned
            )
        return line

    def state(self) -> dict[str, Any]:
        """Its value, and the recipe's that it began at."""
        return {"beta": self.value, "began": self._cfg.beta}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from that value; begin anew where the recipe has another one by now."""
        if state["began"] == self._cfg.beta:
            self.value = float(state["beta"])


def learned_rewards(groups: Sequence[Group], mask_truncated: bool) -> Tensor:
    """[P, G] total rewards; NaN where a completion is unscored, or cut off and left out of learning."""
    left_out = [[mask_truncated and c.finish == "length" for c in g.completions] for g in groups]
    return torch.where(torch.tensor(left_out), torch.nan, _tensor([[c.reward for c in g.completions] for g in groups]))


def without_unscored(groups: Sequence[Group], reward_PG: Tensor) -> list[Group]:
    """The groups in which completions without a reward have no actions: they are counted nowhere and move nothing."""
    unscored = reward_PG.isnan().tolist()
    return [
        replace(
            g, completions=tuple(_without_actions(c) if out else c for c, out in zip(g.completions, row, strict=True))
        )
        for g, row in zip(groups, unscored, strict=True)
    ]


def sampled_logprobs(groups: Sequence[Group]) -> Tensor:
    """[N] log-probabilities of the actions when they were sampled."""
    logprobs = [c.logprobs for c in completions(groups)]
    return torch.tensor(np.concatenate(logprobs) if logprobs else [], dtype=torch.get_default_dtype())


def kl_estimate(cfg: Kl) -> Callable[[Tensor, Tensor], Tensor]:
    """The estimator of the recipe."""
    return {KlEstimator.k1: kl.k1, KlEstimator.k2: kl.k2, KlEstimator.k3: kl.k3}[cfg.estimator]


def mean_of(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over a step's updates; the sampler's gap is the first's, before the policy moved."""
    names = dict.fromkeys(name for metrics in updates for name in metrics)
    means = {n: fmean(metrics[n] for metrics in updates if n in metrics) for n in names}
    return means | {n: x for n, x in updates[0].items() if n == "sampler_gap"}


def _without_actions(completion: Completion) -> Completion:
    nothing = {name: getattr(completion, name)[:0] for name in ("logprobs", "steps", "step_labels")}
    return replace(completion, action=np.zeros(len(completion.ids), np.bool_), **nothing)


def _tensor(total: Sequence[Sequence[float | None]]) -> Tensor:
    return torch.tensor([[float("nan") if r is None else r for r in row] for row in total], dtype=torch.float64)


def _with_signal(rounds: Sequence[Rollout]) -> int:
    return sum(int(has_signal(r.reward_PG).sum()) for r in rounds)


def _chosen(rounds: Sequence[Rollout], prompts: int) -> Rollout:
    """Groups with a signal first, then others, as many as a step has."""
    signal = torch.cat([has_signal(r.reward_PG) for r in rounds]).tolist()
    order = sorted(range(len(signal)), key=lambda i: not signal[i])[:prompts]
    groups = [g for r in rounds for g in r.groups]
    reward_PG = torch.cat([r.reward_PG for r in rounds])[order]
    drawn = [r.rewards for r in rounds]
    return Rollout(
        groups=[groups[i] for i in order],
        rewards=joined(drawn, order),
        reward_PG=reward_PG,
        drawn=len(groups),
        weights=rounds[0].weights,
        drawn_means=joined(drawn, range(len(groups))).means(),
    )
