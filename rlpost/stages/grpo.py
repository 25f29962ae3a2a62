"""Reinforcement learning from groups of samples: GRPO (Shao et al. 2024, arXiv:2402.03300) and its relatives.

The advantage, the surrogate, the weight and the KL are the recipe's, so one stage holds REINFORCE with a
leave-one-out baseline, GRPO, Dr. GRPO, GSPO, CISPO and what lies between.

Axes: N action tokens, S completions, P prompts of a step, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlpost.data.formats import Need
from rlpost.experience import Experience
from rlpost.groups import Group, completions
from rlpost.learner import Learner, LossFunction
from rlpost.loop import show_samples
from rlpost.objectives import kl
from rlpost.objectives.rows import has_signal
from rlpost.objectives.surrogates import clipped_share, clipped_surrogate, ratio
from rlpost.objectives.weights import token_mean, weigh
from rlpost.policy.policy import Scores
from rlpost.policy.reference import Reference
from rlpost.recipe.schema import Grpo, Kl, KlEstimator, KlPlacement
from rlpost.rewards.score import Scores as Rewards
from rlpost.rollout.builtin import BuiltinEngine
from rlpost.rollout.collect import collect
from rlpost.stages.context import Context, steps_of

Advantage = Callable[[Tensor], Tensor]


def grpo(context: Context, cfg: Grpo) -> Path:
    """Train on sampled completions and their rewards; returns the final checkpoint."""
    policy = context.policy()
    room = cfg.max_length - cfg.sampling.max_new_tokens
    data = context.data(policy, cfg.data, Need.prompts, room, cfg.too_long)
    scorer = context.scorer(cfg.rewards)
    advantage = context.function(cfg.advantage, "advantage")
    loss = surrogate_loss(context.function(cfg.loss, "grpo.loss"), cfg)
    reference = context.reference(policy, cfg.reference) if cfg.kl.beta else None
    steps = steps_of(cfg, data.epoch_length, cfg.prompts, f"stages.{context.name}")
    learner = context.learner(policy, cfg, updates=steps * cfg.updates)
    engine = BuiltinEngine(policy)
    loop = context.loop(cfg, {"data": data}, steps, policy=learner)

    for step in loop.steps():
        engine.sync(policy)
        prompts = data.next(cfg.prompts)
        groups = collect(engine, prompts, cfg.group_size, cfg.sampling, seed=context.seed_for("sample", step))
        rewards = scorer.score(groups)
        reward_PG = learned_rewards(groups, rewards, cfg.mask_truncated)
        experience = assemble(groups, reward_PG, advantage, cfg, reference)
        updates = [
            learner.update(
                loss, weighted(update, cfg, learner), temperature=cfg.sampling.temperature, entropy=cfg.entropy > 0
            )
            for update in experience.split(cfg.updates, seed=context.seed_for("split", step))
        ]
        metrics = reward_metrics(groups, rewards, reward_PG) | mean_of(updates)
        loop.log(step, metrics, live=("reward", "length", "entropy"))
        if cfg.table_every and (step == 0 or (step + 1) % cfg.table_every == 0):
            loop.rollouts(step, groups, rewards.total)
            show_samples(step, groups, rewards.total, lambda g: policy.tokenizer.decode(list(g.prompt)))
    return context.finish(policy, cfg.kind, steps)


def surrogate_loss(surrogate: Callable[..., Tensor], cfg: Grpo) -> LossFunction:
    """Σ surrogate·weight, with the KL term if it belongs in the loss, less the entropy bonus.

    Its metrics are over the actions that were computed: those of completions with an advantage, as a rule.
    """
    clip = {side: float(cfg.loss.args[side]) for side in ("low", "high") if side in cfg.loss.args}

    def loss(scores: Scores, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        old_N, advantage_N = part["old_logp"], part["advantage"]
        rows = part.rows.to(scores.logp_N.device)
        loss_N = surrogate(scores.logp_N, old_N, advantage_N, rows)
        ratio_N = ratio(scores.logp_N.detach(), old_N)
        metrics = {
            "ratio": ratio_N,
            "sampler_gap": (scores.logp_N.detach() - old_N).abs(),
        }
        if cfg.loss.fn == clipped_surrogate.__name__:
            metrics["clipped"] = clipped_share(scores.logp_N.detach(), old_N, advantage_N, **clip)
        if "reference" in part.per_action:
            metrics["kl"] = kl.k3(scores.logp_N.detach(), part["reference"])
        if cfg.kl.beta and cfg.kl.placement is KlPlacement.loss:
            loss_N = loss_N + cfg.kl.beta * kl_estimate(cfg.kl)(scores.logp_N, part["reference"])
        total = (loss_N * part["weight"]).sum()
        if scores.entropy_N is not None:
            metrics["exact_entropy"] = scores.entropy_N.detach()
            total = total - cfg.entropy * (scores.entropy_N * part["token_weight"]).sum()
        return total, metrics

    return loss


def mean_of(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over a step's updates; the sampler's gap is the first's, before the policy moved."""
    names = dict.fromkeys(name for metrics in updates for name in metrics)
    means = {n: fmean(metrics[n] for metrics in updates if n in metrics) for n in names}
    return means | {n: x for n, x in updates[0].items() if n == "sampler_gap"}


def kl_estimate(cfg: Kl) -> Callable[[Tensor, Tensor], Tensor]:
    """The estimator of the recipe."""
    return {KlEstimator.k1: kl.k1, KlEstimator.k2: kl.k2, KlEstimator.k3: kl.k3}[cfg.estimator]


def learned_rewards(groups: Sequence[Group], rewards: Rewards, mask_truncated: bool) -> Tensor:
    """[P, G] total rewards; NaN where a completion is unscored, or cut off and left out of learning."""
    return torch.tensor(
        [
            [
                float("nan") if r is None or (mask_truncated and c.finish == "length") else r
                for c, r in zip(group.completions, total, strict=True)
            ]
            for group, total in zip(groups, rewards.total, strict=True)
        ],
        dtype=torch.float64,
    )


def assemble(
    groups: Sequence[Group], reward_PG: Tensor, advantage: Advantage, cfg: Grpo, reference: Reference | None
) -> Experience:
    """What the step's updates learn from: each action's advantage and its log-probability when it was sampled."""
    groups = [_without_unscored(g, reward_G) for g, reward_G in zip(groups, reward_PG, strict=True)]
    experience = Experience(tuple(groups))
    rows = experience.rows
    old_logp_N = torch.tensor([x for c in completions(groups) if c.actions for x in c.logprobs])
    advantage_S = advantage(reward_PG).flatten()
    advantage_N = rows.spread(advantage_S).float()
    values = {"old_logp": old_logp_N}
    if reference is not None:
        values["reference"] = reference.logprobs(groups, cfg.sampling.temperature)
        if cfg.kl.placement is KlPlacement.reward:
            kl_N = kl.kl_in_reward(old_logp_N, values["reference"], rows, cfg.group_size, kl_estimate(cfg.kl))
            advantage_N = advantage_N - cfg.kl.beta * kl_N
    # With neither KL nor entropy, an advantage of exactly zero is a gradient of exactly zero; what a user's own
    # surrogate adds to the advantage is not known.
    other_terms = reference is not None or cfg.entropy or ":" in cfg.loss.fn
    needed = None if other_terms else tuple((advantage_S != 0).tolist())
    return replace(experience.with_actions(advantage=advantage_N, **values), needed_S=needed)


def weighted(update: Experience, cfg: Grpo, learner: Learner) -> Experience:
    """The update with its weights, counted over all of it."""
    rows, totals = update.rows, learner.totals(update)
    weight_N = weigh(cfg.weight, rows, totals.actions, totals.completions, cfg.sampling.max_new_tokens)
    update = update.with_actions(weight=weight_N)
    return update.with_actions(token_weight=token_mean(rows, totals.actions)) if cfg.entropy else update


def reward_metrics(groups: Sequence[Group], rewards: Rewards, reward_PG: Tensor) -> dict[str, float]:
    """What the samples say by themselves: rewards by name, lengths, how many groups teach anything."""
    sampled = completions(groups)
    scored = [r for total in rewards.total for r in total if r is not None]
    logprobs = [x for c in sampled for x in c.logprobs]
    metrics: dict[str, Any] = {"reward": sum(scored) / max(len(scored), 1)}
    metrics |= {f"reward/{name}": value for name, value in rewards.means().items()}
    return metrics | {
        "unscored": rewards.unscored,
        "zero_signal": 1.0 - float(has_signal(reward_PG).double().mean()),
        "truncated": sum(c.finish == "length" for c in sampled) / len(sampled),
        "length": sum(len(c.ids) for c in sampled) / len(sampled),
        # The mean of −log p over samples is an unbiased estimate of the entropy.
        "entropy": -sum(logprobs) / max(len(logprobs), 1),
    }


def _without_unscored(group: Group, reward_G: Tensor) -> Group:
    """A completion without a reward has no actions: it is counted nowhere and moves nothing."""
    kept = [
        c if not r else replace(c, action=(False,) * len(c.ids), logprobs=())
        for c, r in zip(group.completions, reward_G.isnan().tolist(), strict=True)
    ]
    return replace(group, completions=tuple(kept))
