"""An update's gradient depends on what the update holds and on nothing else; its step is AdamW's; it can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from exactness import sample_groups
from families import VOCABULARY, EndTokenOnly, tiny
from torch import Tensor, nn

from rlpost.errors import DivergedError
from rlpost.objectives.weights import token_mean
from rlpost.policy import adapters
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.load import remove_dropout
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, Term
from rlpost.types import Completion, Group, completions

EVERYTHING = 10**6


def make_policy(
    family: str = "gpt2",
    dtype: torch.dtype = torch.float64,
    flat: bool = True,
    lora: bool = False,
    wide: bool = False,
    r: int = 2,
    dropout: float = 0.0,
):
    model = tiny(family, dtype, wide=wide)
    remove_dropout(model)
    use_attention(model, FLAT if flat else "sdpa")
    if lora:
        model = adapters.add_policy_adapter(model.requires_grad_(False), Lora(r=r, alpha=4.0, dropout=dropout))
    return Policy(model, EndTokenOnly(), flat=flat).eval()


def make_learner(policy: Policy, **settings) -> Learner:
    return Learner(policy, **{"learning_rate": 1e-3, "max_grad_norm": 0.0, **settings})


# --- The gradient of an update; how it is cut in every stage is in test_invariance.py


@pytest.mark.parametrize("budget", [1, EVERYTHING])
def test_a_mean_of_means_would_have_been_seen(budget):
    """Two completions of 100 and 4 actions: at token_mean the long one has 100/104 of the weight, cut or not."""
    long, short = (Completion((5,) * n, (True,) * n) for n in (100, 4))
    experience = Experience((Group((1, 2), (long,)), Group((3,), (short,))))
    learner = make_learner(make_policy(), max_tokens_per_microbatch=budget)
    experience = experience.with_actions(weight=token_mean(experience.rows, experience.rows.actions))

    def loss(scores, part):
        sign_N = part.rows.spread(torch.tensor([1.0 if c.actions == 100 else -1.0 for c in completions(part.groups)]))
        return (0.0 * scores.logp_N + sign_N * part["weight"]).sum(), {"sign": sign_N}

    metrics = learner.gradient(loss, experience)
    assert metrics["loss"] == pytest.approx(96 / 104)
    assert metrics["sign"] == pytest.approx(96 / 104)


@pytest.mark.parametrize("budget", [1, EVERYTHING])
def test_an_update_of_two_terms_has_the_sum_of_their_gradients_and_the_metrics_of_each(budget):
    policy = make_policy()
    learner = make_learner(policy, learning_rate=1e-300, max_tokens_per_microbatch=budget)
    one, other = simple(policy), simple(policy, seed=1)
    lines, gradients = [], []
    for experience in (one, other):
        lines.append(learner.update(weighted_nll, experience))
        gradients.append(learner.flat_gradient())
    both = [Term(weighted_nll, one, factor=0.75), Term(weighted_nll, other, factor=0.25, name="other")]
    line = learner.update_on(both)
    wanted = 0.75 * gradients[0] + 0.25 * gradients[1]
    assert float((learner.flat_gradient() - wanted).norm() / wanted.norm()) < 1e-12
    assert line["nll"] == pytest.approx(lines[0]["nll"], rel=1e-12)
    assert line["other/nll"] == pytest.approx(lines[1]["nll"], rel=1e-12)
    assert line["other/loss"] == pytest.approx(lines[1]["loss"], rel=1e-12)
    assert line["loss"] == pytest.approx(0.75 * lines[0]["loss"] + 0.25 * lines[1]["loss"], rel=1e-12)
    assert len({lines[0]["nll"], lines[1]["nll"]}) == 2


def test_a_term_of_factor_zero_is_not_computed():
    def never(scores, part):
        raise AssertionError

    policy = make_policy()
    learner = make_learner(policy, learning_rate=1e-300)
    wanted = learner.update(weighted_nll, simple(policy))
    tokens = learner.trained_tokens
    terms = [Term(weighted_nll, simple(policy)), Term(never, simple(policy, seed=1), factor=0.0, name="other")]
    assert learner.update_on(terms) == wanted
    assert learner.trained_tokens == 2 * tokens


def test_completions_without_actions_are_not_counted():
    """Unscored ones have none: a mean over completions does not divide by them."""
    said, unscored = (Completion((5, 6), (acted,) * 2) for acted in (True, False))
    experience = Experience((Group((1,), (said, unscored, said)), Group((2,), (unscored,))))
    assert (experience.rows.actions, experience.rows.learned) == (4, 2)


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


def test_gradients_whose_norm_alone_is_beyond_all_numbers_change_nothing():
    policy = make_policy()
    learner = make_learner(policy)
    before = snapshot(learner.weights())

    def huge(scores, part):
        return 1e200 * weighted_nll(scores, part)[0], {}

    with pytest.raises(DivergedError, match="update 1: "):
        learner.update(huge, simple(policy))
    assert all(p.grad.isfinite().all() for p in policy.parameters())
    assert_same(learner.weights(), before)


def test_the_step_is_as_long_as_the_rate_of_its_update():
    policies = [make_policy(), make_policy()]
    slow = make_learner(policies[0], learning_rate=0.5, factor=lambda _: 0.02)
    other = make_learner(policies[1], learning_rate=0.01)
    for learner, policy in zip((slow, other), policies, strict=True):
        learner.update(weighted_nll, simple(policy))
    assert_same(slow.weights(), other.weights())


def test_a_model_is_in_training_mode_for_its_gradient_alone():
    policy, seen = make_policy(), []

    def watching(scores, part):
        seen.append(policy.training)
        return weighted_nll(scores, part)

    make_learner(policy).update(watching, simple(policy))
    assert seen == [True]
    assert not policy.training


# --- Resuming


def assert_resumes(make: Callable[[], Policy], losses: Sequence[Callable], at: int, settings: Mapping = {}) -> None:
    """A learner that loads after `at` updates ends where one that went on ends."""

    def begun(policy: Policy) -> Learner:
        how = {"learning_rate": 0.01, "factor": lambda u: 1 / (u + 1), "weight_decay": 0.1, **settings}
        return make_learner(policy, **how)

    learner = begun(make())
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
    resumed = begun(policy)
    kept = snapshot(saved["optimizer"])
    resumed.load(**saved)
    for number, loss in list(enumerate(losses))[at:]:
        resumed.update(loss, simple(policy, seed=number))
    assert resumed.updates == len(losses)
    assert_same(resumed.weights(), learner.weights())
    assert_same(resumed.optimizer_state(), learner.optimizer_state())
    assert_same(saved["optimizer"], kept)  # what was given is not what moves


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
