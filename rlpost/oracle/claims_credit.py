"""Claims about credit per action: values, steps, shaping, all with the whole tree as the sample.

Axes: X states, V tokens, L leaves, N actions of all leaves, K steps of all leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives import credit
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.surrogates import policy_gradient
from rlpost.oracle.estimators import Drawn, ascent
from rlpost.oracle.multisets import multisets
from rlpost.oracle.problem import SIZES, Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact, skipped

LAMBDAS = (0.0, 0.5, 0.95, 1.0)
WRONG = 0.3
"""The value estimate for every state."""
GROUPS = " / ".join(f"G={size}" for size in SIZES)
STEP = 2
"""Actions a step; a completion's last step may have fewer."""


def credit_section(problem: Problem) -> Section:
    """Values and λ, Monte-Carlo values, steps."""
    rows = [*_gae_rows(problem), *_return_rows(problem), *_monte_carlo_rows(problem), *_process_rows(problem)]
    return Section("credit per action: relative error where exact, cosine with the truth where biased", tuple(rows))


def gradient(problem: Problem, advantage_N: Tensor) -> Tensor:
    """[F] expected policy gradient when every leaf is drawn with its probability."""
    rows = problem.tree.rows
    weight_N = rows.spread(problem.probability_L)
    return problem.expected_gradient(ascent(policy_gradient, problem.old_N, problem.old_N, advantage_N, rows, weight_N))


def _gae_rows(problem: Problem) -> list[Row]:
    """With the true V, each temporal difference has mean zero given the past, so every λ is exact.

    With a wrong V, λ = 1 alone forgives: there V is a baseline and nothing else.
    """
    tree = problem.tree
    values = {"true": problem.value_X[tree.state_N], "wrong": torch.full_like(problem.old_N, WRONG)}
    placed_N = credit.reward_on_last_action(problem.reward_L, tree.rows)

    def found(value: str, lam: float) -> Tensor:
        advantage_N, _ = credit.gae(placed_N, values[value], tree.rows, gamma=1.0, gae_lambda=lam)
        return gradient(problem, advantage_N)

    true = problem.reward_gradient
    listed = "/".join(f"{lam:g}" for lam in LAMBDAS)
    below = "/".join(f"{lam:g}" for lam in LAMBDAS[:-1])
    return [
        exact(
            f"GAE with the true V, λ={listed}",
            [relative_error(found("true", lam), true) for lam in LAMBDAS],
            "exact for every λ",
        ),
        biased(
            f"GAE with V={WRONG} everywhere, λ={below}", [cosine(found("wrong", lam), true) for lam in LAMBDAS[:-1]]
        ),
        exact(f"GAE with V={WRONG} everywhere, λ=1", relative_error(found("wrong", 1.0), true)),
    ]


def _return_rows(problem: Problem) -> list[Row]:
    """GAE(1, 1) + V is the return, whatever V says; a value after the limit is a reward paid there."""
    tree = problem.tree
    placed_N = credit.reward_on_last_action(problem.reward_L, tree.rows)
    value_N = problem.value_X[tree.state_N].sin()
    _, return_N = credit.gae(placed_N, value_N, tree.rows, gamma=1.0, gae_lambda=1.0)
    beyond_L = torch.where(tree.cut_L, problem.reward_L.cos(), 0.0)
    paid = problem.rewarded(problem.reward_L + beyond_L)
    advantage_N, _ = credit.gae(
        placed_N, paid.value_X[tree.state_N], tree.rows, gamma=1.0, gae_lambda=0.95, bootstrap_S=beyond_L
    )
    to_go = exact(
        "GAE(1, 1) + V against the return to go", relative_error(return_N, credit.return_to_go(placed_N, tree.rows))
    )
    limit = relative_error(gradient(problem, advantage_N), paid.reward_gradient)
    return [to_go, exact("GAE bootstrapped at the length limit, λ=0.95", limit, "exact for r + V beyond the limit")]


def steps_of_two(rows: Ragged) -> credit.Steps:
    """Every second action of a completion ends a step, and so does its last."""
    at_N = torch.arange(rows.actions) - rows.spread(rows.start_S)
    return credit.Steps(rows, at_N % STEP == STEP - 1)


def _monte_carlo_rows(problem: Problem) -> list[Row]:
    """The mean of K rollouts has mean V and, for rewards of 0 and 1, variance V(1 − V)/K: here from the root.

    The advantage is linear in the values and the rollouts know nothing of the completion, so its expectation is the
    advantage with the true V: exact, whatever a step's length, as the end of a step is a state.
    """
    tree = problem.tree
    steps = steps_of_two(tree.rows)
    value_K = problem.value_X[tree.state_N[steps.first_K]]
    advantage_N = credit.monte_carlo_values(value_K, problem.reward_L, steps)
    error = relative_error(gradient(problem, advantage_N), problem.reward_gradient)
    return [*_rollout_rows(problem), exact("monte_carlo_values, steps of two actions", error)]


def _rollout_rows(problem: Problem, rollouts: int = 2) -> list[Row]:
    name = f"mean of {rollouts} rollouts with 0/1 rewards: mean and variance"
    expected = "V and V(1 − V)/K, exact"
    success = problem.binary()
    sets = multisets(problem.probability_L.log(), rollouts)
    if sets is None:
        return [skipped(name, "too many pairs of rollouts", expected)]
    estimate_P = success.reward_L[sets.leaf_PG].mean(1)
    mean = float(sets.probability_P @ estimate_P)
    variance = float(sets.probability_P @ (estimate_P - mean) ** 2)
    value = float(success.value_X[0])
    true = value * (1 - value) / rollouts
    return [exact(name, [abs(mean / value - 1), abs(variance / true - 1)], expected)]


def _process_rows(problem: Problem) -> list[Row]:
    """How a step's reward is spread over the step changes no completion's return, but it does change the credit.

    On the step's last token it is exact. Spread evenly, a part of it stands before actions that earned it. In the min
    form, an action after the worst step has no credit for there being no worse one.
    """
    tree, steps = problem.tree, steps_of_two(problem.tree.rows)
    reward_K = earned(problem.prefix_N[steps.last_K])
    total_L = tree.rows.sum(credit.on_last(reward_K, steps))
    least_L = tree.rows.sum(credit.least(reward_K, steps))
    first_L = tree.rows.start_S
    even_N, last_N, least_N = (credit.process(reward_K, steps, how=how) for how in ("even", "last", "least"))
    spread = relative_error(torch.cat([even_N[first_L], last_N[first_L]]), torch.cat([total_L, total_L]))
    true, least = problem.rewarded(total_L).reward_gradient, problem.rewarded(least_L).reward_gradient
    return [
        exact(
            "process reward: return, evenly spread and on the last token", spread, "the same, Σ of the steps' rewards"
        ),
        exact("process, on the step's last token", relative_error(gradient(problem, last_N), true)),
        biased("process, evenly over the step", cosine(gradient(problem, even_N), true)),
        biased("process, min form, against E[worst step]", cosine(gradient(problem, least_N), least)),
        biased("process_normalised, " + GROUPS, _normalised(problem, true), "biased by spread"),
    ]


def _normalised(problem: Problem, true: Tensor) -> list[float | None]:
    """[each group size] cosine of the group-normalised process form with the gradient of the steps' total."""
    found: list[float | None] = []
    for size in SIZES:
        sets = problem.groups(size)
        if sets is None:
            found.append(None)
            continue
        drawn = Drawn(problem.tree, sets)
        steps = steps_of_two(drawn.rows)
        prefix_K = problem.prefix_N[drawn.action_A[steps.last_K]]
        advantage_A = credit.process_normalised(earned(prefix_K), steps, size)
        logp_A = problem.old_N[drawn.action_A]
        coefficient_A = ascent(policy_gradient, logp_A, logp_A, advantage_A, drawn.rows, 1 / size)
        found.append(cosine(problem.expected_gradient(drawn.expected(coefficient_A)), true))
    return found


def earned(prefix_K: Tensor) -> Tensor:
    """[K] a reward in [0, 1) that a step's own tokens earn: of the prefix at its end and nothing else."""
    return torch.frac((prefix_K.double() + 1) * 0.6180339887498949)
