"""One optimiser update of every training stage, from the stage's own functions, that can be put together in any order.

A case says which groups an update has and what the stage makes of some of them: those of one process, in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from worlds import GROUP_SIZE, REFERENCE, SAMPLER, SAMPLING, World, pairs, ranked, rollout_of, singles

from rlpost.goals import value
from rlpost.goals.params import ValueTarget
from rlpost.objectives.mixed import WeightedSum
from rlpost.objectives.trust_region import finite_difference
from rlpost.policy.logprobs import LogitStats
from rlpost.recipe.specs.distill import Distill
from rlpost.recipe.specs.dpo import Dpo
from rlpost.recipe.specs.grpo import Grpo
from rlpost.recipe.specs.kto import Kto
from rlpost.recipe.specs.online_dpo import OnlineDpo
from rlpost.recipe.specs.ppo import Ppo
from rlpost.recipe.specs.process_reward_model import ProcessRewardModel
from rlpost.recipe.specs.reward_model import RewardModel
from rlpost.recipe.specs.sft import Sft
from rlpost.recipe.specs.trpo import Trpo
from rlpost.recipe.specs.value import Value
from rlpost.stages import distill, dpo, grpo, kto, online_dpo, ppo, process_reward_model, reward_model, trpo
from rlpost.stages.advantage import AdvantageEstimator
from rlpost.stages.coupling import coupling
from rlpost.stages.entropy import EntropyBonus
from rlpost.stages.meeting import Met
from rlpost.stages.off_policy import SamplerCorrection
from rlpost.stages.on_policy import KlPenalty, weighted
from rlpost.stages.pairwise import PairObjective
from rlpost.stages.params import Against, Correction, CorrectionMode, Critic, Kl, KlEstimator, KlPlacement, OnTruncation
from rlpost.stages.supervised import prepared, stats_of, supervised_loss
from rlpost.stages.teachers import Lessons
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction, Stats
from rlpost.types import Group
from rlpost.usercode.params import Function


class Update(NamedTuple):
    """What a learner is given."""

    loss: LossFunction
    experience: Experience
    stats: Stats | None = None


Measured = tuple[Tensor, dict[str, float]]
"""A vector as long as the trained parameters, and metrics."""


def gradient(learner: Learner, update: Update) -> Measured:
    """The update's gradient and its metrics."""
    metrics = learner.gradient(update.loss, update.experience, update.stats)
    return learner.flat_gradient(), metrics


def step(learner: Learner, update: Update) -> None:
    """One step of the optimiser."""
    learner.update(update.loss, update.experience, update.stats)


@dataclass(frozen=True)
class Case:
    """An update of a stage."""

    groups: Sequence[Group]
    prepare: Callable[[Sequence[int], Learner], Update]
    """What the stage makes of the groups of these numbers, in this order."""
    scalar: bool = False
    """A model of scalars is trained."""
    whole_groups: bool = False
    measure: Callable[[Learner, Update], Measured] = gradient
    step: Callable[[Learner, Update], object] = step
    """How the stage changes the weights."""


def supervised(world: World, fn: str, weight: str, teacher: bool = False) -> Case:
    cfg = Sft(learning_rate=1.0, weight=weight, max_length=30)
    function = world.function(Sft(learning_rate=1.0, loss=Function(fn=fn)), "loss")
    groups = singles()

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        layout = "shared" if learner.model.flat else "padded"
        stats = stats_of(function, world.policy(layout, step=REFERENCE) if teacher else None)
        rows = prepared([groups[i] for i in share], cfg.weight, cfg.max_length, with_labels=False)
        return Update(supervised_loss(function), rows, stats)

    return Case(groups, prepare)


def with_reference(world: World, groups: Sequence[Group], temperature: float = 1.0) -> Experience:
    return Experience(tuple(groups)).with_actions(reference=world.reference().logprobs(groups, temperature))


def paired(world: World, fn: str, modifiers: Sequence[str] = (), nll: float = 0.0) -> Case:
    modify = [
        f.call
        for f in world.functions(Dpo(learning_rate=1.0, modifiers=[Function(fn=m) for m in modifiers]), "modifiers")
    ]
    objective = PairObjective(world.function(Dpo(learning_rate=1.0, loss=Function(fn=fn)), "loss"), modify, nll)
    groups = pairs()

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        experience = with_reference(world, [groups[i] for i in share])
        return Update(objective.loss(), objective.prepared(experience, learner), objective.stats)

    return Case(groups, prepare, whole_groups=True)


def summed(world: World) -> Case:
    """Two losses, one of which couples the pairs, and gold completions, here those that other pairs have chosen."""
    named = {fn: world.function(Dpo(learning_rate=1.0, loss=Function(fn=fn)), "loss") for fn in ("dpo", "bco")}
    objective = PairObjective(WeightedSum(named, {"dpo": 0.8, "bco": 0.2}), nll=0.3, gold=0.7)
    first = pairs()
    chosen = [g.completions[0] for g in first]
    groups = [
        replace(g, completions=(*g.completions, gold)) for g, gold in zip(first, chosen[1:] + chosen[:1], strict=True)
    ]

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        experience = with_reference(world, [groups[i] for i in share])
        return Update(objective.loss(), objective.prepared(experience, learner), objective.stats)

    return Case(groups, prepare, whole_groups=True)


def ranked_policy(world: World) -> Case:
    loss = dpo.ranking_loss(world.function(Dpo(learning_rate=1.0, loss=Function(fn="dpo_plackett_luce")), "loss"))
    groups = ranked()

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        return Update(loss, dpo.prepared_ranking(with_reference(world, [groups[i] for i in share]), learner))

    return Case(groups, prepare, whole_groups=True)


def unpaired(world: World) -> Case:
    function = world.function(Kto(learning_rate=1.0), "loss")
    groups = singles()
    others = kto.mismatched(groups, seed=2)  # with other seeds z is below 0, and cut off there

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        update, mismatched = (with_reference(world, [some[i] for i in share]) for some in (groups, others))
        loss = kto.unpaired_loss(function, kto.log_ratios(learner, mismatched))
        return Update(loss, kto.weighted(update))

    return Case(groups, prepare)


def scored(world: World, fn: str, groups: Sequence[Group]) -> Case:
    loss = reward_model.score_loss(world.function(RewardModel(learning_rate=1.0, loss=Function(fn=fn)), "loss"))

    def prepare(share: Sequence[int], _: Learner) -> Update:
        return Update(loss, reward_model.weighted(Experience(tuple(groups[i] for i in share))))

    return Case(groups, prepare, scalar=True, whole_groups=True)


def scored_steps(world: World) -> Case:
    loss = process_reward_model.step_loss(world.function(ProcessRewardModel(learning_rate=1.0), "loss"))
    groups = singles()

    def prepare(share: Sequence[int], _: Learner) -> Update:
        return Update(loss, process_reward_model.weighted(Experience(tuple(groups[i] for i in share))))

    return Case(groups, prepare, scalar=True)


def goals_reached(world: World, target: ValueTarget) -> Case:
    """Of every group one completion reached the goal, and the one that the goal was taken from does not count."""
    cfg = Value(learning_rate=1.0, group_size=GROUP_SIZE, target=target)
    groups = world.groups
    one_hot = torch.eye(GROUP_SIZE)
    examples = [
        value.ValueExample(g, one_hot[i].tolist(), (one_hot[i - 1] == 0).tolist()) for i, g in enumerate(groups)
    ]

    def prepare(share: Sequence[int], _: Learner) -> Update:
        return Update(value.goal_value_loss(cfg), value.weighted([examples[i] for i in share]))

    return Case(groups, prepare, scalar=True)


def penalty_of(world: World, cfg: Grpo | Ppo | Trpo) -> KlPenalty:
    return KlPenalty(cfg.kl, world.reference() if cfg.kl.beta else None)


def grouped(world: World, fn: str = "clipped_surrogate", advantage: str = "group_normalised", **settings: Any) -> Case:
    args = settings.pop("args", {})
    cfg = Grpo(
        learning_rate=1.0,
        group_size=GROUP_SIZE,
        sampling=SAMPLING,
        loss=Function(fn=fn),
        advantage=Function(fn=advantage, args=args),
        **settings,
    )
    groups = world.groups
    penalty = penalty_of(world, cfg)
    surrogate = world.function(cfg, "loss")
    loss = grpo.surrogate_loss(surrogate, cfg, penalty, EntropyBonus(cfg))
    stats = LogitStats(SAMPLING.temperature, entropy=cfg.entropy_coef > 0)

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        policy, rollout = learner.model, rollout_of(groups, share)
        estimator = AdvantageEstimator(world, cfg, policy, None)
        correction = SamplerCorrection(world, cfg, policy)
        experience = grpo.assemble(rollout, 0, cfg, correction, estimator, penalty)
        return Update(loss, coupling(surrogate, cfg, learner)(weighted(experience, cfg)), stats)

    return Case(groups, prepare)


def with_critic(world: World, critic: bool) -> Case:
    cfg = Ppo(
        learning_rate=1.0,
        group_size=GROUP_SIZE,
        sampling=SAMPLING,
        kl=Kl(beta=0.05),
        on_truncation=OnTruncation.bootstrap,
        entropy_coef=0.01,
        critic=Critic(clip=0.2),
    )
    groups = world.groups
    penalty = penalty_of(world, cfg)
    loss = ppo.surrogate_loss(world.function(cfg, "loss"), cfg, penalty, EntropyBonus(cfg))
    stats = LogitStats(SAMPLING.temperature, entropy=True)

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        # The values are those of a critic that has moved since.
        critic_then, correction = world.scalar(step=SAMPLER), SamplerCorrection(world, cfg, learner.model)
        experience = ppo.assemble(rollout_of(groups, share), cfg, correction, critic_then, penalty)
        experience = weighted(experience, cfg)
        return Update(ppo.critic_loss_of(cfg), experience) if critic else Update(loss, experience, stats)

    return Case(groups, prepare, scalar=critic)


def fisher_product(learner: Learner, update: Update) -> Measured:
    """F·v for a random v, and what is measured of the policy a step away."""
    here = learner.flat_weights()
    v = torch.randn(here.shape, generator=torch.Generator().manual_seed(5), dtype=here.dtype).to(here.device)

    def divergence_gradient(offset: Tensor) -> Tensor:
        learner.set_weights(here + offset)
        return gradient(learner, update._replace(loss=trpo.divergence))[0]

    # Longer than the stage's own offset, which is so short that the difference blows the gradients' rounding up.
    product = finite_difference(divergence_gradient, v, epsilon=0.5)
    learner.set_weights(here + v * (0.5 / v.norm()))
    metrics = learner.measure(update.loss, update.experience, update.stats)
    learner.set_weights(here)
    return product, metrics


def trust_region(world: World, measure: Callable[[Learner, Update], Measured]) -> Case:
    cfg = Trpo(
        learning_rate=1.0,
        group_size=GROUP_SIZE,
        sampling=SAMPLING,
        advantage=Function(fn="leave_one_out"),
        weight="sequence_sum",
        cg_iterations=3,  # a product is a difference of gradients: each one blows the rounding of those before up
    )
    groups = world.groups
    penalty, stats = penalty_of(world, cfg), LogitStats(SAMPLING.temperature, distribution=True)

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        policy, rollout = learner.model, rollout_of(groups, share)
        estimator = AdvantageEstimator(world, cfg, policy, None)
        correction = SamplerCorrection(world, cfg, policy)
        experience = trpo.assemble(rollout, 0, cfg, correction, estimator, penalty)
        experience = weighted(experience, cfg)
        old_NV = learner.evaluate_no_grad(lambda output, _part: output.distribution_NV, experience, stats)
        return Update(trpo.surrogate, experience.with_actions(old_NV=old_NV), stats)

    def step(learner: Learner, update: Update) -> object:
        return trpo.trust_region_update(learner, learner.model, update.experience, cfg)

    return Case(groups, prepare, measure=measure, step=step)


def sampled_pairs(world: World) -> Case:
    cfg = OnlineDpo(learning_rate=1.0, group_size=GROUP_SIZE, sampling=SAMPLING, min_gap=0.5)
    objective = PairObjective(world.function(cfg, "loss"), temperature=SAMPLING.temperature)
    groups = world.groups

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        experience = online_dpo.assemble(rollout_of(groups, share), cfg, world.reference())
        return Update(objective.loss(), objective.prepared(experience, learner), objective.stats)

    return Case(groups, prepare, whole_groups=True)


def distilled(world: World, **settings: Any) -> Case:
    cfg = Distill(learning_rate=1.0, group_size=GROUP_SIZE, sampling=SAMPLING, teacher="base", **settings)
    lessons = Lessons(world.reference(), None, "distill")
    loss = distill.distillation_loss(world.function(cfg, "surrogate"), cfg)
    divergence = distill.Divergence(world.function(cfg, "loss"), cfg, lessons)
    groups = world.groups

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        policy, rollout = learner.model, rollout_of(groups, share)
        estimator, correction = AdvantageEstimator(world, cfg, policy, None), SamplerCorrection(world, cfg, policy)
        experience = distill.assemble(rollout, 0, cfg, correction, estimator, divergence, learner)
        return Update(loss, weighted(experience, cfg), divergence.stats)

    return Case(groups, prepare)


def met_pairs(world: World) -> Case:
    """Pairs of each completion and one of another policy, here its neighbours, with a bonus for exploring."""
    against = {"against": Against(), "explore": 0.3}
    cfg = OnlineDpo(learning_rate=1.0, group_size=GROUP_SIZE, sampling=SAMPLING, **against)
    objective = PairObjective(world.function(cfg, "loss"), temperature=SAMPLING.temperature)
    groups = world.groups

    def turned(group: Group) -> Group:
        return replace(group, completions=(*group.completions[1:], group.completions[0]))

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        others = rollout_of([turned(g) for g in groups], share)
        rollout = Met(**vars(rollout_of(groups, share)), others=others)
        experience = online_dpo.assemble(rollout, cfg, world.reference())
        loss = online_dpo.exploring(objective.loss(), cfg.explore)
        return Update(loss, objective.prepared(experience, learner), objective.stats)

    return Case(groups, prepare, whole_groups=True)


IN_LOSS = Kl(beta=0.1, placement=KlPlacement.loss, estimator=KlEstimator.k3)
CASES: dict[str, Callable[[World], Case]] = {
    "sft nll": lambda w: supervised(w, "nll", "token_mean"),
    "sft dft": lambda w: supervised(w, "dynamic_fine_tuning", "sequence_mean"),
    "sft distillation": lambda w: supervised(w, "jensen_shannon", "constant_length", teacher=True),
    "dpo dpo, nll": lambda w: paired(w, "dpo", nll=0.3),
    "dpo plackett_luce": ranked_policy,
    "dpo aot": lambda w: paired(w, "aot"),
    "dpo aot, modified": lambda w: paired(w, "aot_unpaired", ["length_desensitised", "confidence"]),
    "dpo bco": lambda w: paired(w, "bco"),
    "dpo sum, nll, gold": summed,
    "kto kto": unpaired,
    "reward_model pairs": lambda w: scored(w, "bradley_terry", pairs()),
    "reward_model plackett_luce": lambda w: scored(w, "plackett_luce", ranked()),
    "process_reward_model": scored_steps,
    "value bootstrap": lambda w: goals_reached(w, ValueTarget.bootstrap),
    "value contrastive": lambda w: goals_reached(w, ValueTarget.contrastive),
    "grpo token_mean": lambda w: grouped(w),
    "grpo sequence_mean": lambda w: grouped(w, weight="sequence_mean"),
    "grpo gspo": lambda w: grouped(w, "sequence_clipped", weight="sequence_mean"),
    "grpo kl in loss": lambda w: grouped(w, kl=IN_LOSS),
    "grpo kl in reward": lambda w: grouped(w, kl=Kl(beta=0.1), advantage="leave_one_out", weight="sequence_sum"),
    "grpo entropy": lambda w: grouped(w, entropy_coef=0.1, weight="constant_length"),
    "grpo whiten": lambda w: grouped(w, whiten=True, advantage="length_weighted_baseline"),
    "grpo batch std": lambda w: grouped(w, args={"std_over": "batch"}),
    "grpo rewards apart": lambda w: grouped(w, advantage="per_reward_normalised"),
    "grpo by step": lambda w: grouped(w, advantage="process_normalised"),
    "grpo target": lambda w: grouped(w, "target_policy", weight="sequence_mean"),
    "grpo correction": lambda w: grouped(w, correction=Correction(mode=CorrectionMode.truncate, cap=1.1)),
    "ppo policy": lambda w: with_critic(w, critic=False),
    "ppo critic": lambda w: with_critic(w, critic=True),
    "trpo gradient": lambda w: trust_region(w, gradient),
    "trpo fisher": lambda w: trust_region(w, fisher_product),
    "online_dpo dpo": sampled_pairs,
    "distill jensen_shannon": lambda w: distilled(w, loss=Function(fn="jensen_shannon")),
    "distill top_k, completion": lambda w: distilled(w, top_k=3, credit="completion", weight="sequence_sum"),
    "distill sampled, rewards": lambda w: distilled(w, estimate="sampled", credit="completion", reward_coef=0.5),
    "online_dpo xpo": met_pairs,
}
"""Stage and variant, with what makes the case."""
