"""The on-policy training loop, and terms of the loss that several algorithms share.

An algorithm gives two functions: `assemble` makes experience of a step's samples, `minimise` does one update on a
minibatch of it. `KlPenalty` is the KL to the reference, in the reward or in the loss.

Axes: N action tokens, S completions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlpost.facts import fact
from rlpost.objectives import kl, metrics
from rlpost.objectives.surrogates import ratio
from rlpost.objectives.weights import token_mean, weigh
from rlpost.policy.logprobs import PolicyOutput
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference
from rlpost.recipe.grouped import Grouped
from rlpost.recipe.specs.common import Rollouts
from rlpost.recipe.specs.ppo import Ppo
from rlpost.stages.ahead import Ahead
from rlpost.stages.context import Context, steps_of
from rlpost.stages.off_policy import Gap
from rlpost.stages.params import Kl, KlEstimator, KlPlacement
from rlpost.stages.rollouts import Rollout, Sampler, Samples
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.train.loop import Loop, Stateful
from rlpost.train.rollout_rows import show_samples
from rlpost.types import completions
from rlpost.usercode.params import Function


def on_policy(
    context: Context,
    cfg: Rollouts,
    policy: Policy,
    samples: Samples,
    *,
    assemble: Callable[[Rollout, int], Experience],
    minimise: Callable[[Experience, int], Mapping[str, float]],
    observe: Callable[[Experience], dict[str, float]],
    learners: Mapping[str, Learner],
    states: Mapping[str, Stateful],
    live: Sequence[str],
) -> Path:
    """Sample, assemble, minimise, step after step; returns the policy's final checkpoint.

    Args:
        context: the stage's surroundings.
        cfg: its section of the recipe.
        policy: samples, and is trained.
        samples: gives a step's rollouts; where the recipe has `staleness`, ahead of training from now on.
        assemble: (scored samples, step) -> experience.
        minimise: (minibatch of it, step) -> metrics, after one update.
        observe: experience -> further metrics of the step; called once, after its updates.
        learners: by name: `policy`, and others such as `critic`.
        states: further state that checkpoints hold, by name.
        live: metrics shown on the progress line.
    """
    steps = _steps(context, cfg, samples)
    if isinstance(samples, Sampler) and samples.staleness:
        samples = Ahead(samples, steps)
    pool = samples.opponents if isinstance(samples, Sampler) else None
    weights = None if pool is None else {"opponents": pool}
    loop = context.loop(cfg, {"data": samples, **states}, steps, weights, held_out=None, **learners)
    gap = Gap(context.name, cfg.rollouts or context.rollouts)
    for step in loop.steps():
        rollout = _timed(samples, step, loop)
        experience = assemble(rollout, step)
        updates: list[Mapping[str, float]] = []
        for iteration in range(cfg.num_iterations):
            seed = context.seed_for("split", step * cfg.num_iterations + iteration)
            for minibatch in experience.split(cfg.num_minibatches, seed):
                updates.append(minimise(minibatch, step))
        line = rollout.metrics | observe(experience) | metrics.without_parts(mean_of(updates))
        gap.report(line, step)
        loop.log(step, line, live)
        if cfg.table_every and (step == 0 or (step + 1) % cfg.table_every == 0):
            loop.rollouts(step, rollout.groups)
            show_samples(step, rollout.groups, policy.tokenizer)
    return context.finish(policy, cfg.kind, steps)


def _timed(samples: Samples, step: int, loop: Loop) -> Rollout:
    """The step's samples; the loop is told how long their parts took."""
    before = dict(samples.seconds)
    rollout = samples.sample(step)
    loop.throughput.spent({part: seconds - before[part] for part, seconds in samples.seconds.items()})
    drawn = completions(rollout.groups)
    loop.throughput.count(sum(c.actions for c in drawn), len(drawn))
    return rollout


def updates_of(context: Context, cfg: Rollouts, samples: Samples) -> int:
    """Optimiser updates of the whole stage."""
    return _steps(context, cfg, samples) * cfg.num_iterations * cfg.num_minibatches


def _steps(context: Context, cfg: Rollouts, samples: Samples) -> int:
    return steps_of(cfg, samples.data.epoch_length, cfg.prompts_per_step, f"stages.{context.name}")


def mean_of(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over a step's updates; `sampler_gap` is the first update's, before the policy changed."""
    names = dict.fromkeys(name for line in updates for name in line)
    means = {n: fmean(line[n] for line in updates if n in line) for n in names}
    return means | {n: x for n, x in updates[0].items() if n == "sampler_gap"}


class KlPenalty:
    """β·KL(policy || reference), in the reward or in the loss, and its metrics.

    β is fixed, or adapted so that the KL reaches a target; checkpoints hold it. Without a reference it is 0.
    """

    def __init__(self, cfg: Kl, reference: Reference | None) -> None:
        """Start from the recipe's β."""
        self.beta = cfg.beta
        self._cfg = cfg
        self._reference = reference
        self._weighted = cfg.estimator is KlEstimator.k3_weighted
        self._estimate = {KlEstimator.k1: kl.k1, KlEstimator.k2: kl.k2}.get(cfg.estimator, kl.k3)

    @property
    def in_loss(self) -> bool:
        """Whether it is a term of the loss, rather than of the rewards."""
        return self._reference is not None and self._cfg.placement is KlPlacement.loss

    def with_reference(self, experience: Experience, temperature: float) -> Experience:
        """The experience with the `reference`'s log-probability of every action."""
        if self._reference is None:
            return experience
        return experience.with_actions(reference=self._reference.logprobs(experience.groups, temperature))

    def per_action(self, experience: Experience) -> Tensor:
        """[N] the penalty on each action's own reward (Ziegler et al. 2019, arXiv:1909.08593)."""
        if self._reference is None or self.in_loss:
            return torch.zeros_like(experience["old_logp"])
        return self.beta * self._estimate(experience["old_logp"], experience["reference"])

    def to_go(self, experience: Experience, group_size: int) -> Tensor:
        """[N] the penalty on each action's advantage: the KL from it on, less a leave-one-out baseline of its group."""
        if self._reference is None or self.in_loss:
            return torch.zeros_like(experience["old_logp"])
        old_N, reference_N = experience["old_logp"], experience["reference"]
        return self.beta * kl.kl_in_reward(old_N, reference_N, experience.rows, group_size, self._estimate)

    def loss(self, logp_N: Tensor, part: Experience) -> Tensor:
        """[N] the term of the loss, with gradient."""
        if self._weighted:
            return self.beta * kl.k3_weighted(logp_N, part["reference"], part["sampled_logp"])
        return self.beta * self._estimate(logp_N, part["reference"])

    def metrics(self, logp_N: Tensor, part: Experience) -> dict[str, Tensor]:
        """k3 of each action, under the policy being updated."""
        return {"kl": kl.k3(logp_N.detach(), part["reference"])} if self._reference is not None else {}

    def observe(self, experience: Experience) -> dict[str, float]:
        """Mean KL of a sampled completion, in nats, and the β it was weighed by; then β is adapted."""
        if self._reference is None:
            return {}
        rows = experience.rows
        kl_S = rows.sum(kl.k1(experience["old_logp"], experience["reference"]))
        mean = float(kl_S.sum()) / max(rows.learned, 1)
        line = {"sequence_kl": mean, "beta": self.beta}
        if self._cfg.target is not None:
            self.beta = kl.adaptive(
                self.beta, mean, target=self._cfg.target, horizon=self._cfg.horizon, count=rows.learned
            )
        return line

    def state(self) -> dict[str, Any]:
        """β, and the recipe's β that it started from."""
        return {"beta": self.beta, "began": self._cfg.beta}

    def load(self, state: dict[str, Any]) -> None:
        """Restore β, unless the recipe's own has changed since."""
        if state["began"] == self._cfg.beta:
            self.beta = float(state["beta"])


def weighted(minibatch: Experience, cfg: Grouped | Ppo) -> Experience:
    """The minibatch with each action's `weight` in the loss, and its `token_weight` in a mean over all actions."""
    rows = minibatch.rows
    weight_N = weigh(cfg.weight, rows, rows.actions, rows.learned, cfg.sampling.max_new_tokens)
    return minibatch.with_actions(weight=weight_N, token_weight=token_mean(rows, rows.actions))


def clip_of(surrogate: Callable[..., Tensor], loss: Function) -> tuple[float, float] | None:
    """A surrogate's clip range (low, high), by the recipe's arguments or its defaults; None if it does not clip."""
    if not fact(surrogate, "clips_ratio"):
        return None
    given = inspect.signature(surrogate).parameters
    low, high = (
        float(loss.args[side] if side in loss.args else given[side].default) for side in ("clip_low", "clip_high")
    )
    return low, high


def surrogate_metrics(output: PolicyOutput, part: Experience, clip: tuple[float, float] | None) -> dict[str, Tensor]:
    """Metrics of a surrogate with that clip range, over the actions that were computed."""
    logp_N, old_N, advantage_N = output.logp_N.detach(), part["old_logp"], part["advantage"]
    line = {"ratio": ratio(logp_N, old_N), "sampler_gap": (logp_N - part["sampled_logp"]).abs()}
    if "correction" in part.per_action:
        line |= metrics.effective_sample_parts(part["correction"])
    if clip is not None:
        line["clipped_low"] = metrics.clipped_low(logp_N, old_N, advantage_N, clip_low=clip[0])
        line["clipped_high"] = metrics.clipped_high(logp_N, old_N, advantage_N, clip_high=clip[1])
    if output.entropy_N is not None:
        line["exact_entropy"] = output.entropy_N.detach()
    return line
