"""One optimiser update of every training stage, from the stage's own functions, that can be put together in any order.

A case says which groups an update has and what the stage makes of some of them: those of one process, in its order.
Models are tiny and random. Log-probabilities of reference, teacher and sampler come from models near the trained one,
so that ratios are away from 1 and some of them clipped.

Axes: P prompts, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from families import VOCABULARY, EndTokenOnly, tiny
from torch import Tensor

from rlpost.experience import Experience
from rlpost.groups import Completion, Group, completions
from rlpost.learner import Learner, LossFunction
from rlpost.objectives.trust_region import finite_difference
from rlpost.policy.attention import FLAT
from rlpost.policy.check import use_attention
from rlpost.policy.load import remove_dropout
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference
from rlpost.policy.scalar import ScalarModel
from rlpost.policy.score import logprobs
from rlpost.recipe.functions import Bound, bind
from rlpost.recipe.parts import AtLimit, Correction, CorrectionMode, Critic, Function, Kl, KlEstimator, KlPlacement
from rlpost.recipe.schema import Grpo, Ppo, Sampling, Sft, Trpo
from rlpost.rewards.score import Scores as Rewards
from rlpost.stages import dpo, kto, ppo, process_reward_model, reward_model, sft, surrogate, trpo
from rlpost.stages.advantage import Estimator
from rlpost.stages.online_dpo import best_and_worst
from rlpost.stages.pairwise import PairObjective
from rlpost.stages.rollouts import Beta, Rollout

SAMPLING = Sampling(max_new_tokens=12, temperature=0.8)
GROUP_SIZE = 4
SHAPES = (
    (9, ((7,), (3, 4, 5), (0,), (11,))),
    (4, ((2,), (6,), (9,), (1,))),
    (17, ((5,), (0, 3, 2), (8,), (4,))),
    (1, ((6,), (3,), (10,), (2,))),
)
"""Groups: length of the prompt, and of each completion's runs of actions and of what it reads, in turn."""
RIGHT: list[list[float | None]] = [
    [1.0, 0.5, 0.0, 0.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.5, None, 2.0, 1.0],
    [0.0, 1.0, 0.5, 0.25],
]
"""[P][G] rewards: a group without a signal, a completion without a reward, ties."""
LAYOUTS = ("shared", "apart", "padded")
"""Flat rows with each prompt once, flat rows with a prompt a completion, one padded row a completion."""


class Apart(Policy):
    """Flat rows in which every completion has its own copy of the prompt."""

    shares_prompts = False


class World:
    """The models of one family and precision. To a stage's functions it is the context: functions and a reference."""

    def __init__(self, family: str, dtype: torch.dtype) -> None:
        self.family, self.dtype = family, dtype
        self.policy, self.scalar = cache(self._policy), cache(self._scalar)

    def _policy(self, layout: str = "shared", near: int = 0) -> Policy:
        """The trained model, or with `near` one a small random step away."""
        model = tiny(self.family, self.dtype)
        remove_dropout(model)
        use_attention(model, "sdpa" if layout == "padded" else FLAT)
        generator = torch.Generator().manual_seed(near)
        with torch.no_grad():
            for p in model.parameters() if near else ():
                p.add_(0.015 * torch.randn(p.shape, generator=generator))
        kind = Apart if layout == "apart" else Policy
        return kind(model, EndTokenOnly(), flat=layout != "padded").eval()

    def _scalar(self, layout: str = "shared", near: int = 0) -> ScalarModel:
        model = ScalarModel(self.policy(layout, near))
        with torch.no_grad():
            model.head.weight.copy_(0.1 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(3)))
        return model

    def function(self, function: Function, field: str) -> Bound:
        return bind(function, field, field, Path())

    def reference(self, policy: Policy | None = None, name: str = "start") -> Reference:
        return Reference(self.policy(near=1), None)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Sampled groups, with the sampler's log-probabilities."""
        bare = sampled_groups()
        scored = logprobs(self.policy(near=2), bare, temperature=SAMPLING.temperature)
        pieces = iter(torch.split(scored, [c.actions for c in completions(bare)]))
        return tuple(
            replace(g, completions=tuple(replace(c, logprobs=tuple(next(pieces).tolist())) for c in g.completions))
            for g in bare
        )


def sampled_groups() -> list[Group]:
    """The groups of SHAPES; every third completion was cut off, and a step is three actions."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist())

    def completion(number: int, runs: tuple[int, ...]) -> Completion:
        action = tuple(i % 2 == 0 for i, n in enumerate(runs) for _ in range(n))
        steps = tuple(min(3, sum(action) - first) for first in range(0, sum(action), 3))
        finish = "length" if number % 3 == 0 else "stop"
        return Completion(draw(len(action)), action, finish=finish, steps=steps)

    return [Group(draw(prompt), tuple(completion(i, runs) for i, runs in enumerate(each))) for prompt, each in SHAPES]


def singles() -> list[Group]:
    """Groups of one completion: most of the sampled ones, each labelled, as a whole and by step."""
    kept = [replace(g, completions=(c,)) for g in sampled_groups() for c in g.completions[:3]]
    return [
        replace(g, example={"label": i % 3 > 0, "labels": [0.5 * ((i + k) % 3) for k in range(len(c.steps))]})
        for i, g in enumerate(kept)
        for c in g.completions
    ]


def pairs() -> list[Group]:
    """Groups of two completions, chosen and rejected; some with a margin."""
    return [
        Group(g.prompt, g.completions[first : first + 2], {"margin": 0.5 * (i % 3)})
        for i, g in enumerate(sampled_groups())
        for first in (0, 2)
    ]


def ranked() -> list[Group]:
    """Groups of four completions, and one of two, with scores of which some are equal and one is missing."""
    groups = [replace(g, example={"scores": RIGHT[i]}) for i, g in enumerate(sampled_groups())]
    return [*groups[:-1], Group(groups[-1].prompt, groups[-1].completions[1:3], {"scores": RIGHT[-1][1:3]})]


class Update(NamedTuple):
    """What a learner is given."""

    loss: LossFunction
    experience: Experience
    how: Mapping[str, Any] = {}


Measured = tuple[Tensor, dict[str, float]]
"""A vector as long as the trained parameters, and metrics."""


def gradient(learner: Learner, update: Update) -> Measured:
    """The update's gradient and its metrics."""
    metrics = learner.gradient(update.loss, update.experience, **update.how)
    return learner.flat_gradient(), metrics


@dataclass(frozen=True)
class Case:
    """An update of a stage."""

    groups: Sequence[Group]
    prepare: Callable[[Sequence[int], Learner], Update]
    """What the stage makes of the groups of these numbers, in this order."""
    scalar: bool = False
    """A model of scalars is trained."""
    whole_groups: bool = False
    measure: Callable[[Learner, Update], Measured] = field(default=gradient)


def supervised(world: World, fn: str, weight: str, teacher: bool = False) -> Case:
    cfg = Sft(learning_rate=1.0, weight=weight, max_length=30)
    function = world.function(Function(fn), "sft.loss")
    groups = singles()

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        layout = "shared" if learner.model.flat else "padded"
        how = sft.reading(function, world.policy(layout, near=1) if teacher else None)
        experience = Experience(tuple(groups[i] for i in share))
        return Update(sft.supervised_loss(function), sft.weighted(experience, cfg, learner), how)

    return Case(groups, prepare)


def with_reference(world: World, groups: Sequence[Group], temperature: float = 1.0) -> Experience:
    return Experience(tuple(groups)).with_actions(reference=world.reference().logprobs(groups, temperature))


def paired(world: World, fn: str, modifiers: Sequence[str] = (), nll: float = 0.0) -> Case:
    modify = [world.function(Function(name), "dpo.modifiers").call for name in modifiers]
    objective = PairObjective(world.function(Function(fn), "dpo.loss"), modify, nll)
    groups = pairs()

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        experience = with_reference(world, [groups[i] for i in share])
        return Update(objective.loss(), objective.prepared(experience, learner))

    return Case(groups, prepare, whole_groups=True)


def ranked_policy(world: World) -> Case:
    loss = dpo.ranking_loss(world.function(Function("ranking"), "dpo.loss"))
    groups = ranked()

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        return Update(loss, dpo.prepared_ranking(with_reference(world, [groups[i] for i in share]), learner))

    return Case(groups, prepare, whole_groups=True)


def unpaired(world: World) -> Case:
    function = world.function(Function("kto"), "kto.loss")
    groups = singles()
    others = kto.mismatched(groups, seed=1)

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        update, mismatched = (with_reference(world, [some[i] for i in share]) for some in (groups, others))
        loss = kto.unpaired_loss(function, kto.log_ratios(learner, mismatched))
        return Update(loss, kto.weighted(update, learner))

    return Case(groups, prepare)


def scored(world: World, fn: str, groups: Sequence[Group]) -> Case:
    loss = reward_model.score_loss(world.function(Function(fn), "reward_model.loss"))

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        return Update(loss, reward_model.weighted(Experience(tuple(groups[i] for i in share)), learner))

    return Case(groups, prepare, scalar=True, whole_groups=True)


def scored_steps(world: World) -> Case:
    loss = process_reward_model.step_loss(world.function(Function("process_reward"), "process_reward_model.loss"))
    groups = singles()

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        return Update(loss, process_reward_model.weighted(Experience(tuple(groups[i] for i in share)), learner))

    return Case(groups, prepare, scalar=True)


def rollout_of(groups: Sequence[Group], share: Sequence[int]) -> Rollout:
    """The scored samples of some groups: a reward that also has a value a step, and one for being brief."""
    own = [groups[i] for i in share]
    right = [RIGHT[i] for i in share]
    brief = [[-0.1 * len(c.ids) for c in g.completions] for g in own]
    total = [
        [None if r is None else r + 0.5 * b for r, b in zip(*row, strict=True)] for row in zip(right, brief, strict=True)
    ]
    by_step = [[0.25 * (k % 3) for k in range(len(c.steps))] for c in completions(own)]
    numbers = [[float("nan") if r is None else r for r in row] for row in total]
    reward_PG = torch.tensor(numbers, dtype=torch.float64).view(len(own), GROUP_SIZE)
    rewards = Rewards(total, {"right": right, "brief": brief}, {"right": by_step})
    return Rollout(own, rewards, reward_PG, len(own), {"right": 1.0, "brief": 0.5})


def estimated(world: World, groups: Sequence[Group], cfg: Grpo | Trpo, share: Sequence[int], learner: Learner) -> Experience:
    """What the stage learns from: advantages by its estimator."""
    sparse = isinstance(cfg, Grpo) and not cfg.entropy
    estimator = Estimator(world, cfg, learner.model, None, sparse=sparse)
    return estimator.experience(rollout_of(groups, share), 0, cfg.kl.beta, learner)


def grouped(world: World, fn: str = "clipped_surrogate", advantage: str = "group_normalised", **settings: Any) -> Case:
    args = settings.pop("args", {})
    cfg = Grpo(
        learning_rate=1.0,
        group_size=GROUP_SIZE,
        sampling=SAMPLING,
        loss=Function(fn),
        advantage=Function(advantage, args),
        **settings,
    )
    groups = world.groups
    loss = surrogate.surrogate_loss(world.function(cfg.loss, "grpo.loss"), cfg, Beta(cfg.kl))
    how = {"temperature": SAMPLING.temperature, "entropy": cfg.entropy > 0}

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        experience = estimated(world, groups, cfg, share, learner)
        return Update(loss, surrogate.weighted(experience, cfg, learner), how)

    return Case(groups, prepare)


def with_critic(world: World, critic: bool) -> Case:
    cfg = Ppo(
        learning_rate=1.0,
        group_size=GROUP_SIZE,
        sampling=SAMPLING,
        kl=Kl(beta=0.05),
        at_limit=AtLimit.bootstrap,
        entropy=0.01,
        critic=Critic(clip=0.2),
    )
    groups = world.groups
    loss = surrogate.surrogate_loss(world.function(cfg.loss, "ppo.loss"), cfg, Beta(cfg.kl))
    how = {"temperature": SAMPLING.temperature, "entropy": True}

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        # The values are those of a critic that has moved since.
        old, reference = world.scalar(near=2), world.reference()
        experience = ppo.assemble(rollout_of(groups, share), cfg, old, reference, cfg.kl.beta, learner)
        experience = surrogate.weighted(experience, cfg, learner)
        return Update(ppo.value_of(cfg), experience) if critic else Update(loss, experience, how)

    return Case(groups, prepare, scalar=critic)


def fisher_product(learner: Learner, update: Update) -> Measured:
    """F·v for a random v, and what is measured of the policy a step away."""
    here = learner.flat_weights()
    v = torch.randn(here.shape, generator=torch.Generator().manual_seed(5), dtype=here.dtype)

    def divergence_gradient(offset: Tensor) -> Tensor:
        learner.set_weights(here + offset)
        return gradient(learner, update._replace(loss=trpo.divergence))[0]

    # Longer than the stage's own offset, which is so short that the difference blows the gradients' rounding up.
    product = finite_difference(divergence_gradient, v, epsilon=0.5)
    learner.set_weights(here + v * (0.5 / v.norm()))
    metrics = learner.measure(update.loss, update.experience, **update.how)
    learner.set_weights(here)
    return product, metrics


def trust_region(world: World, measure: Callable[[Learner, Update], Measured]) -> Case:
    cfg = Trpo(group_size=GROUP_SIZE, sampling=SAMPLING, advantage=Function("leave_one_out"), weight="sequence_sum")
    groups = world.groups
    how = {"temperature": SAMPLING.temperature, "read": lambda batch: lambda logp_nV, where: logp_nV}

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        experience = trpo.weighted(estimated(world, groups, cfg, share, learner), cfg, learner)
        old_NV = learner.look(lambda scores, part: scores.read, experience, **how)
        return Update(trpo.surrogate, experience.with_actions(old_NV=old_NV), how)

    return Case(groups, prepare, measure=measure)


def sampled_pairs(world: World) -> Case:
    objective = PairObjective(world.function(Function("dpo"), "online_dpo.loss"))
    groups = world.groups

    def prepare(share: Sequence[int], learner: Learner) -> Update:
        rollout = rollout_of(groups, share)
        best = best_and_worst(rollout.groups, rollout.reward_PG, min_gap=0.5)
        experience = with_reference(world, best, SAMPLING.temperature)
        how = {"temperature": SAMPLING.temperature}
        return Update(objective.loss(), objective.prepared(experience, learner), how)

    return Case(groups, prepare, whole_groups=True)


IN_LOSS = Kl(beta=0.1, placement=KlPlacement.loss, estimator=KlEstimator.k3)
CASES: dict[str, Callable[[World], Case]] = {
    "sft nll": lambda w: supervised(w, "nll", "token_mean"),
    "sft dft": lambda w: supervised(w, "dynamic_fine_tuning", "sequence_mean"),
    "sft distillation": lambda w: supervised(w, "jensen_shannon", "constant_length", teacher=True),
    "dpo dpo, nll": lambda w: paired(w, "dpo", nll=0.3),
    "dpo ranking": ranked_policy,
    "dpo aot": lambda w: paired(w, "aot"),
    "dpo aot, modified": lambda w: paired(w, "aot_unpaired", ["length_desensitised", "confidence"]),
    "dpo bco": lambda w: paired(w, "bco"),
    "kto kto": unpaired,
    "reward_model pairs": lambda w: scored(w, "bradley_terry", pairs()),
    "reward_model ranking": lambda w: scored(w, "ranking", ranked()),
    "process_reward_model": scored_steps,
    "grpo token_mean": lambda w: grouped(w),
    "grpo sequence_mean": lambda w: grouped(w, weight="sequence_mean"),
    "grpo gspo": lambda w: grouped(w, "sequence_clipped", weight="sequence_mean"),
    "grpo kl in loss": lambda w: grouped(w, kl=IN_LOSS),
    "grpo kl in reward": lambda w: grouped(w, kl=Kl(beta=0.1), advantage="leave_one_out", weight="sequence_sum"),
    "grpo entropy": lambda w: grouped(w, entropy=0.1, weight="constant_length"),
    "grpo whiten": lambda w: grouped(w, whiten=True, advantage="length_weighted_baseline"),
    "grpo batch std": lambda w: grouped(w, args={"std_over": "batch"}),
    "grpo rewards apart": lambda w: grouped(w, advantage="per_reward_normalised"),
    "grpo by step": lambda w: grouped(w, advantage="process_normalised"),
    "grpo correction": lambda w: grouped(w, correction=Correction(CorrectionMode.truncate, cap=1.1)),
    "ppo policy": lambda w: with_critic(w, critic=False),
    "ppo critic": lambda w: with_critic(w, critic=True),
    "trpo gradient": lambda w: trust_region(w, gradient),
    "trpo fisher": lambda w: trust_region(w, fisher_product),
    "online_dpo dpo": sampled_pairs,
}
"""Stage and variant, with what makes the case."""
