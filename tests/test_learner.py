"""An update's gradient depends on what the update holds and on nothing else; its step is AdamW's; it can be resumed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from accelerate import Accelerator
from exactness import sample_groups
from families import VOCABULARY, EndTokenOnly, tiny
from torch import Tensor, nn

from rlpost.errors import DivergedError
from rlpost.experience import Experience
from rlpost.groups import Completion, Group, completions
from rlpost.learner import Learner
from rlpost.objectives.preference import dpo, pairs_of
from rlpost.objectives.supervised import nll
from rlpost.objectives.surrogates import clipped_surrogate
from rlpost.objectives.weights import pair_mean, weigh
from rlpost.policy import adapters
from rlpost.policy.attention import FLAT
from rlpost.policy.check import use_attention
from rlpost.policy.load import remove_dropout
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.recipe.schema import Grpo, Lora
from rlpost.stages.rollouts import Beta
from rlpost.stages.surrogate import surrogate_loss, weighted

EVERYTHING = 10**6


def make_policy(family: str = "gpt2", dtype: torch.dtype = torch.float64, flat: bool = True, lora: bool = False):
    model = tiny(family, dtype)
    remove_dropout(model)
    use_attention(model, FLAT if flat else "sdpa")
    if lora:
        model = adapters.add_policy_adapter(model.requires_grad_(False), Lora(r=2, alpha=4.0))
    return Policy(model, EndTokenOnly(), flat=flat).eval()


def make_learner(policy: Policy, **settings) -> Learner:
    return Learner(policy, Accelerator(), **{"learning_rate": 1e-3, "max_grad_norm": 0.0, **settings})


# --- The gradient of an update


@dataclass(frozen=True)
class Problem:
    """An update that can be put together in any order."""

    groups: Sequence[Group]
    values: Mapping[str, Sequence[Tensor]]
    """name -> [actions of the group] for each group."""
    prepare: Callable[[Experience, Learner], Experience]
    """Adds the weights."""
    loss: Callable
    temperature: float = 1.0
    entropy: bool = False
    whole_groups: bool = False

    def experience(self, order: Sequence[int]) -> Experience:
        values = {name: torch.cat([per_group[g] for g in order]) for name, per_group in self.values.items()}
        return Experience(tuple(self.groups[g] for g in order)).with_actions(**values)


def spread_by_group(groups: Sequence[Group], x_N: Tensor) -> list[Tensor]:
    return list(torch.split(x_N, [sum(c.actions for c in g.completions) for g in groups]))


def noise(n: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def supervised(weight: str = "token_mean") -> Problem:
    def prepare(experience: Experience, learner: Learner) -> Experience:
        totals = learner.totals(experience)
        return experience.with_actions(weight=weigh(weight, experience.rows, totals.actions, totals.completions, 20))

    def loss(scores, part):
        loss_N = nll(scores.logp_N)
        return (loss_N * part["weight"]).sum(), {"nll": loss_N}

    return Problem(sample_groups(VOCABULARY), {}, prepare, loss)


def reinforcement(family: str = "gpt2", **settings) -> Problem:
    """Advantages of each completion; old log-probabilities near the policy's, so that some ratios are clipped."""
    cfg = Grpo(**{"learning_rate": 1e-3, "weight": "token_mean", **settings})
    cfg.sampling.temperature = 0.8
    groups = sample_groups(VOCABULARY)
    rows = Experience(tuple(groups)).rows
    exact = logprobs(make_policy(family), groups, temperature=0.8)
    values = {
        "old_logp": exact + noise(rows.actions, 1, 0.3),
        "sampled_logp": exact,
        "reference": exact + noise(rows.actions, 2, 0.5),
        "advantage": rows.spread(noise(rows.completions, 3)),
    }
    return Problem(
        groups,
        {name: spread_by_group(groups, x) for name, x in values.items()},
        lambda experience, learner: weighted(experience, cfg, learner),
        surrogate_loss(clipped_surrogate, cfg, Beta(cfg.kl)),
        temperature=0.8,
        entropy=cfg.entropy > 0,
    )


def preference(family: str = "gpt2") -> Problem:
    """DPO and the chosen completions' nll."""
    source = sample_groups(VOCABULARY)
    every = [c for c in completions(source) if c.actions]
    groups = [replace(g, completions=(every[i], every[-1 - i])) for i, g in enumerate(source[:5])]
    exact = logprobs(make_policy(family), groups)

    def prepare(experience: Experience, learner: Learner) -> Experience:
        pairs = len(experience.groups)
        chosen_N = experience.rows.spread(torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(pairs))
        experience = experience.with_actions(chosen=chosen_N / learner.total(int(chosen_N.sum())))
        return experience.with_groups(pair=pair_mean(pairs, learner.totals(experience).groups))

    def loss(scores, part):
        pairs = pairs_of(scores.logp_N, part["reference"], part.rows)
        chosen_nll = -(scores.logp_N * part["chosen"]).sum()
        return (dpo(pairs) * part["pair"]).sum() + 0.3 * chosen_nll, {"margin": pairs.margin_P}

    reference = spread_by_group(groups, exact + noise(len(exact), 4, 0.5))
    return Problem(groups, {"reference": reference}, prepare, loss, whole_groups=True)


PROBLEMS = {
    "sft token_mean": lambda _: supervised("token_mean"),
    "sft sequence_mean": lambda _: supervised("sequence_mean"),
    "grpo": reinforcement,
    "grpo with entropy": lambda family: reinforcement(family, entropy=0.1, weight="sequence_mean"),
    "dpo with nll": preference,
}


def update(problem: Problem, policy: Policy, budget: int, order: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
    """The gradient of the update as one vector, and its metrics; `policy` takes no step to speak of."""
    learner = make_learner(policy, learning_rate=1e-300, tokens_per_pass=budget, whole_groups=problem.whole_groups)
    experience = problem.prepare(problem.experience(order), learner)
    metrics = learner.update(problem.loss, experience, temperature=problem.temperature, entropy=problem.entropy)
    gradient = torch.cat([p.grad.flatten().double() for p in policy.parameters()])
    return gradient, metrics


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [("gpt2", torch.float64, 1e-12), ("llama", torch.float64, 1e-6), ("llama", torch.float32, 1e-5)],
    ids=["gpt2-float64", "llama-float64", "llama-float32"],
)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_the_same_however_the_update_is_cut_ordered_and_computed(name, family, dtype, tolerance):
    problem = PROBLEMS[name](family)
    shared = make_policy(family, dtype)
    padded = make_policy(family, dtype, flat=False)
    straight = list(range(len(problem.groups)))
    shuffled = random.Random(1).sample(straight, len(straight))
    expected, expected_metrics = update(problem, shared, EVERYTHING, straight)
    assert expected.norm() > 1e-3
    ways = [(shared, 1, straight), (shared, 45, shuffled), (padded, EVERYTHING, straight), (padded, 45, shuffled)]
    for policy, budget, order in ways:
        gradient, metrics = update(problem, policy, budget, order)
        assert (gradient - expected).norm() <= tolerance * expected.norm(), (budget, order)
        assert metrics == pytest.approx(expected_metrics, rel=10 * tolerance, abs=10 * tolerance)


def test_a_mean_of_means_would_have_been_seen():
    """Two completions of 100 and 4 actions: at token_mean the long one has 100/104 of the weight, cut or not."""
    long, short = (Completion((5,) * n, (True,) * n) for n in (100, 4))
    groups = [Group((1, 2), (long,)), Group((3,), (short,))]
    policy = make_policy()

    def loss(scores, part):
        sign_N = part.rows.spread(torch.tensor([1.0 if c.actions == 100 else -1.0 for c in completions(part.groups)]))
        return (0.0 * scores.logp_N + sign_N * part["weight"]).sum(), {"sign": sign_N}

    problem = replace(supervised(), groups=groups, loss=loss)
    for budget in (1, EVERYTHING):
        _, metrics = update(problem, policy, budget, [0, 1])
        assert metrics["loss"] == pytest.approx(96 / 104)
        assert metrics["sign"] == pytest.approx(96 / 104)


def test_leaving_out_completions_of_advantage_zero_changes_nothing():
    problem = reinforcement()
    policy = make_policy()
    order = range(len(problem.groups))
    learner = make_learner(policy, learning_rate=1e-300)
    advantages = [x if g in (0, 3) else torch.zeros_like(x) for g, x in enumerate(problem.values["advantage"])]
    whole = replace(problem, values={**problem.values, "advantage": advantages}).experience(order)
    needed = tuple(g in (0, 3) for g in order for _ in problem.groups[g].completions)
    found = []
    for experience in (whole, replace(whole, needed_S=needed)):
        metrics = learner.update(problem.loss, problem.prepare(experience, learner), temperature=0.8)
        found.append((torch.cat([p.grad.flatten() for p in policy.parameters()]), metrics["loss"]))
    (everything, loss), (part, part_loss) = found
    assert (part - everything).norm() <= 1e-12 * everything.norm()
    assert part_loss == pytest.approx(loss, rel=1e-12)


# --- The step


def simple(policy: Policy, seed: int = 0) -> Experience:
    groups = sample_groups(VOCABULARY, seed=seed)[:2]
    experience = Experience(tuple(groups))
    return experience.with_actions(weight=torch.full((experience.rows.actions,), 0.1, dtype=torch.float64))


def weighted_nll(scores, part):
    return -(scores.logp_N * part["weight"]).sum(), {"nll": -scores.logp_N}


def nothing_needed(experience: Experience) -> Experience:
    return replace(experience, needed_S=(False,) * experience.rows.completions)


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in tensors.items()}


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def test_the_step_is_adamw_with_decay_on_matrices_alone():
    policy = make_policy()
    learner = make_learner(policy, learning_rate=0.01, weight_decay=0.5, betas=(0.8, 0.9))
    before = snapshot(learner.weights())
    learner.update(weighted_nll, simple(policy))
    seen = {"matrix": 0, "vector": 0}
    for name, p in policy.named_parameters():
        kind = "matrix" if p.ndim >= 2 else "vector"
        seen[kind] += 1
        decay = 0.01 * 0.5 if kind == "matrix" else 0.0
        # The first step: both bias-corrected moments are the gradient's own, g / (|g| + eps).
        expected = before[name] * (1 - decay) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        assert torch.allclose(p, expected, rtol=1e-9, atol=1e-12), name
    assert min(seen.values()) > 5


def test_an_update_in_which_nothing_is_needed_still_follows_the_momentum():
    policy = make_policy()
    learner = make_learner(policy, learning_rate=0.01, betas=(0.8, 0.9))
    learner.update(weighted_nll, simple(policy))
    first = {name: p.grad.clone() for name, p in policy.named_parameters()}
    before = snapshot(learner.weights())
    metrics = learner.update(weighted_nll, nothing_needed(simple(policy)))
    assert metrics == {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.01}
    assert learner.updates == 2
    for name, p in policy.named_parameters():
        mean, square = 0.8 * 0.2 * first[name], 0.9 * 0.1 * first[name] ** 2
        step = (mean / (1 - 0.8**2)) / ((square / (1 - 0.9**2)).sqrt() + 1e-8)
        assert torch.allclose(p, before[name] - 0.01 * step, rtol=1e-9, atol=1e-12), name


def test_an_update_in_which_nothing_is_needed_changes_nothing_without_momentum():
    policy = make_policy()
    learner = make_learner(policy)
    before = snapshot(learner.weights())
    learner.update(weighted_nll, nothing_needed(simple(policy)))
    assert_same(learner.weights(), before)


def test_gradients_are_scaled_down_to_the_norm_and_never_up():
    policy = make_policy()
    whole = make_learner(policy, learning_rate=1e-300).update(weighted_nll, simple(policy))["grad_norm"]
    for limit in (0.5 * whole, 2.0 * whole):
        metrics = make_learner(policy, learning_rate=1e-300, max_grad_norm=limit).update(weighted_nll, simple(policy))
        assert metrics["grad_norm"] == pytest.approx(whole, rel=1e-12)  # as it was before
        left = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters()))
        assert left == pytest.approx(min(limit, whole), rel=1e-5)


def test_the_learning_rate_is_the_peak_times_the_factor_of_the_update():
    policy = make_policy()
    learner = make_learner(policy, learning_rate=0.5, factor=lambda update: 1 / (update + 1))
    rates = [learner.update(weighted_nll, nothing_needed(simple(policy)))["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.5, 0.25, 0.5 / 3])


def test_only_what_requires_a_gradient_is_trained():
    policy = make_policy(lora=True)
    learner = make_learner(policy, learning_rate=0.1)
    before = snapshot(dict(policy.named_parameters()))
    for _ in range(2):  # the factor that begins at zero keeps the other one's first gradient at zero
        learner.update(weighted_nll, simple(policy))
    assert all("lora_" in name for name in learner.weights())
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name


def poisoned(scores, part):
    return weighted_nll(scores, part)[0] * math.nan, {}


def overflowing(scores, part):
    return (scores.logp_N * 1e200).square().sum() * 1e200, {}


@pytest.mark.parametrize("loss", [poisoned, overflowing])
def test_a_gradient_that_is_not_finite_changes_nothing(loss):
    policy, untouched = make_policy(), make_policy()
    learner, other = make_learner(policy), make_learner(untouched)
    for each in (learner, other):
        each.update(weighted_nll, simple(policy))
    with pytest.raises(DivergedError, match=r"update 2: the gradient of model\.\S+ is not finite"):
        learner.update(loss, simple(policy, seed=1))
    assert learner.updates == 1
    assert_same(learner.weights(), other.weights())
    assert_same(learner.optimizer_state(), other.optimizer_state())
    for each in (learner, other):
        each.update(weighted_nll, simple(policy, seed=1))
    assert_same(learner.weights(), other.weights())


# --- Resuming


def assert_resumes(make: Callable[[], Policy], losses: Sequence[Callable], at: int) -> None:
    """A learner that loads after `at` updates ends where one that went on ends."""

    def settings(policy: Policy) -> Learner:
        return make_learner(policy, learning_rate=0.01, factor=lambda u: 1 / (u + 1), weight_decay=0.1)

    learner = settings(make())
    saved = {}
    for number, loss in enumerate(losses):
        if number == at:
            saved = {"weights": snapshot(learner.weights()), "optimizer": snapshot(learner.optimizer_state())}
            saved["updates"] = learner.updates
        learner.update(loss, simple(learner.model, seed=number))
    policy = make()
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(1.0)  # a resumed process has other weights until it loads
    resumed = settings(policy)
    resumed.load(**saved)
    for number, loss in list(enumerate(losses))[at:]:
        resumed.update(loss, simple(policy, seed=number))
    assert resumed.updates == len(losses)
    assert_same(resumed.weights(), learner.weights())
    assert_same(resumed.optimizer_state(), learner.optimizer_state())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_learner_that_was_saved_and_loaded_goes_on_bit_for_bit(lora):
    assert_resumes(lambda: make_policy("llama", torch.float32, lora=lora), [weighted_nll] * 4, at=2)


def test_a_parameter_that_an_update_does_not_reach_goes_on_as_well():
    """An expert that no token was routed to: its gradient is zero, in a new process too, where it was never set."""

    def make() -> Policy:
        policy = make_policy()
        policy.model.expert = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        return policy

    def routed(scores, part):
        total, metrics = weighted_nll(scores, part)
        return total + routed.policy.model.expert.square().sum(), metrics

    policies = []

    def remembered() -> Policy:
        policies.append(make())
        routed.policy = policies[-1]
        return policies[-1]

    assert_resumes(remembered, [routed, weighted_nll, weighted_nll], at=1)


def test_another_models_weights_are_not_loaded():
    learner = make_learner(make_policy())
    with pytest.raises(AssertionError, match="no such parameter"):
        learner.load({**learner.weights(), "no such parameter": torch.zeros(1)}, {}, 1)
