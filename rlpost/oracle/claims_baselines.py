"""Claims about baselines that know more than rewards: what each leaves of the gradient, and what varies least.

The score of an action is ∂ log p(action)/∂ logits. A table has logits of its own for every state, and a completion
passes through a state once, so scores of its actions are orthogonal and their squared norms add up.

Axes: X states, V tokens, L leaves, N actions of all leaves, T positions; P sampled groups, G completions each.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor

from rlpost.objectives import advantages, baselines
from rlpost.objectives.regression import advantage_regression
from rlpost.objectives.surrogates import policy_gradient
from rlpost.oracle import truth
from rlpost.oracle.claims_groups import Claim, claim_row
from rlpost.oracle.estimators import Drawn, ascent
from rlpost.oracle.multisets import Multisets
from rlpost.oracle.problem import SIZES, Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact, holds, skipped

BETA = 0.7
MEAN, DECAY = 0.3, 0.8
"""A running mean that earlier steps have left behind, and how slowly it moves."""
MOST = 1 << 22
"""Numbers of all groups' gradients that are kept."""
MEASURED = "as measured"
GROUPS = " / ".join(f"G={size}" for size in SIZES)


class Scores:
    """The actions of a tree, and how far each can move its logits."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.tree, self.rows = problem, problem.tree, problem.tree.rows
        self.logp_XV = problem.logp_XV.detach()
        self.collision_N = (2 * self.logp_XV).logsumexp(1)[self.tree.state_N]
        position_N = torch.arange(self.rows.actions) - self.rows.start_S[self.rows.index_N]
        self.here_NT = torch.nn.functional.one_hot(position_N, self.tree.depth).double()
        """[N, T] 1 at the position of each action."""
        self.probability_N = self.rows.spread(problem.probability_L)
        self.reward_N = self.rows.spread(problem.reward_L)

    @cached_property
    def score_NV(self) -> Tensor:
        """[N, V] by differentiating log-probabilities, token by token."""
        logits_XV = self.logp_XV.clone().requires_grad_()
        of_each = [torch.autograd.grad(logits_XV.log_softmax(1)[:, v].sum(), logits_XV)[0] for v in range(self._tokens)]
        return torch.stack(of_each, 1)[self.tree.state_N, self.tree.token_N]

    @property
    def _tokens(self) -> int:
        return self.tree.vocabulary

    @cached_property
    def norm_N(self) -> Tensor:
        """[N] the squared norm of each action's score."""
        return self.score_NV.square().sum(1)

    @cached_property
    def path_N(self) -> Tensor | None:
        """[N] the same of the actions up to each one together, as a vector of all logits; None where that is long."""
        if self.rows.actions * self.logp_XV.numel() > MOST:
            return None
        found = []
        for piece_NV, state_N in zip(*(self._by_leaf(x) for x in (self.score_NV, self.tree.state_N)), strict=True):
            path_XV = torch.zeros_like(self.logp_XV)
            for score_V, state in zip(piece_NV, state_N.tolist(), strict=True):
                path_XV[state] += score_V
                found.append(path_XV.square().sum())
        return torch.stack(found)

    def constant(self, weight_N: Tensor) -> Tensor:
        """[T] E[r·weight]/E[weight] at each position."""
        shared_NT = (self.probability_N * weight_N)[:, None] * self.here_NT
        return (shared_NT * self.reward_N[:, None]).sum(0) / shared_NT.sum(0)

    def variance(self, baseline_T: Tensor) -> Tensor:
        """Trace of the covariance of one completion's gradient, Σ_t (r − b_t)·score_t."""
        apart_N = self.reward_N - self.here_NT @ baseline_T
        second = (self.probability_N * apart_N.square() * self.norm_N).sum()
        return second - self.problem.reward_gradient.square().sum()

    def _by_leaf(self, x_N: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x_N, self.rows.lengths_S.tolist())


def baseline_section(problem: Problem) -> Section:
    """Norms of scores, the optimal token baseline, baselines from columns and roles, A*-PO."""
    scores = Scores(problem)
    rows = [*_norm_rows(scores), *_token_rows(scores), *_variance_rows(scores), *_outside_rows(problem)]
    rows += [*_value_rows(problem), *_regression_rows(problem)]
    return Section("baselines: relative error where exact, cosine with the truth where biased", tuple(rows))


def _norm_rows(scores: Scores) -> list[Row]:
    found_N = baselines.squared_score(scores.problem.old_N, scores.collision_N)
    summed_N = scores.rows.flatten(scores.rows.pad(found_N).cumsum(1))
    name = "its sum up to an action against that of their scores together"
    together = None if scores.path_N is None else relative_error(summed_N, scores.path_N)
    return [
        exact("squared_score against the derivative by the logits", relative_error(found_N, scores.norm_N)),
        exact(name, together, "exact in a table"),
    ]


def _token_rows(scores: Scores) -> list[Row]:
    """What the others say is settled before an action is drawn; a sum that its own completion is in is not."""
    true, rows = scores.problem.reward_gradient, []
    for accumulate, told in ((True, ""), (False, ", accumulate=False")):
        name = f"optimal_token_baseline{told}, sequence_sum, {GROUPS}"
        found = [_gradient(scores, accumulate, False, size) for size in SIZES]
        cosines = [None if x is None else cosine(x, true) for x in found]
        rows.append(biased(name, cosines, "biased: its own reward is in the baseline"))
        found = [_gradient(scores, accumulate, True, size) for size in SIZES]
        errors = [None if x is None else relative_error(x, true) for x in found]
        rows.append(exact(name.replace(", sequence_sum", ", leave_one_out, sequence_sum"), errors, "exact, scale 1"))
    return [*rows, exact("optimal_token_baseline, group by group", _by_hand(scores), "by hand")]


def _advantage(scores: Scores, drawn: Drawn, accumulate: bool, leave_one_out: bool) -> Tensor:
    """[A] of the actions of all groups."""
    return baselines.optimal_token_baseline(
        scores.problem.reward_L[drawn.sets.leaf_PG],
        scores.problem.old_N[drawn.action_A],
        scores.collision_N[drawn.action_A],
        drawn.rows,
        accumulate=accumulate,
        leave_one_out=leave_one_out,
    )


def _gradient(scores: Scores, accumulate: bool, leave_one_out: bool, size: int) -> Tensor | None:
    """[F] expected gradient of groups of `size`, summed over a completion; None where they are too many."""
    sets = scores.problem.groups(size)
    if sets is None:
        return None
    drawn = Drawn(scores.tree, sets)
    logp_A = scores.problem.old_N[drawn.action_A]
    advantage_A = _advantage(scores, drawn, accumulate, leave_one_out)
    coefficient_A = ascent(policy_gradient, logp_A, logp_A, advantage_A, drawn.rows, 1 / size)
    return scores.problem.expected_gradient(drawn.expected(coefficient_A))


def _by_hand(scores: Scores) -> float:
    """The largest error over a few groups of three, whose completions differ in length, in all four forms."""
    rows, reward_L = scores.rows, scores.problem.reward_L
    step, leaves = max(1, scores.tree.leaves // 5), scores.tree.leaves
    leaf_PG = torch.tensor([[a, (a + step) % leaves, (a + 2 * step) % leaves] for a in range(0, leaves, step)])
    drawn = Drawn(scores.tree, Multisets(leaf_PG, torch.ones(len(leaf_PG))))
    errors = []
    for accumulate in (True, False):
        for alone in (True, False):
            expected = []
            for group in leaf_PG.tolist():
                weights = [_weights(scores.norm_N[rows.index_N == leaf].tolist(), accumulate) for leaf in group]
                reward = [float(reward_L[leaf]) for leaf in group]
                for i, own in enumerate(weights):
                    among = [j for j in range(3) if not (alone and j == i)]
                    expected += [_less(reward, weights, i, among, t) for t in range(len(own))]
            found_A = _advantage(scores, drawn, accumulate, alone)
            errors.append(relative_error(found_A, torch.tensor(expected, dtype=torch.float64)))
    return max(errors)


def _weights(norms: list[float], accumulate: bool) -> list[float]:
    return [sum(norms[: t + 1]) for t in range(len(norms))] if accumulate else norms


def _less(reward: list[float], weights: list[list[float]], i: int, among: list[int], t: int) -> float:
    """The reward of completion i less the baseline of its action t."""
    if len(set(reward)) == 1:
        return 0.0
    there = [j for j in among if len(weights[j]) > t]
    if not there:
        return reward[i] - sum(reward[j] for j in among) / len(among)
    return reward[i] - sum(reward[j] * weights[j][t] for j in there) / sum(weights[j][t] for j in there)


def _variance_rows(scores: Scores) -> list[Row]:
    """Constants of each position: the norm of the action alone is what the gradient's variance is least for."""
    summed_N = scores.rows.flatten(scores.rows.pad(scores.norm_N).cumsum(1))
    own_T, path_T = scores.constant(scores.norm_N), scores.constant(summed_N)
    at_T, bent_T = own_T.clone().requires_grad_(), path_T.clone().requires_grad_()
    (slope_T,) = torch.autograd.grad(scores.variance(at_T), at_T)
    prefix = (scores.probability_N * summed_N * (scores.reward_N - scores.here_NT @ bent_T).square()).sum()
    (bend_T,) = torch.autograd.grad(prefix, bent_T)
    flat_T = torch.full_like(own_T, float(scores.problem.value_X[0]))
    found = [float(scores.variance(b_T)) for b_T in (torch.zeros_like(own_T), flat_T, path_T, own_T)]
    shown, least = " / ".join(f"{x:.4f}" for x in found), found[-1] <= min(found) * (1 + 1e-12)
    alone, together = float(slope_T.norm()) / found[-1], float(bend_T.norm() / prefix.detach())
    return [
        exact("b_t = E[r·w_t]/E[w_t], w_t of action t: slope of the variance", alone, "0"),
        exact("b_t = E[r·W_t]/E[W_t]: slope of E‖(r − b_t)·(scores up to t)‖²", together, "0"),
        holds("variance with no baseline / E[r] / b_t by W_t / b_t by w_t", shown, "the last is the least", least),
        *_group_variances(scores),
    ]


def _group_variances(scores: Scores) -> list[Row]:
    """Trace of the covariance of a group's gradient, of the unbiased estimators."""
    rows = []
    for size in SIZES:
        sets = scores.problem.groups(size)
        name = f"variance of groups: leave_one_out / by W_t / by w_t of the others, G={size}"
        if sets is None or len(sets.leaf_PG) * scores.logp_XV.numel() > MOST:
            rows.append(skipped(name, f"more than {MOST} numbers", MEASURED))
            continue
        drawn = Drawn(scores.tree, sets)
        plain_PG = advantages.leave_one_out(scores.problem.reward_L[sets.leaf_PG])
        forms = [drawn.rows.spread(plain_PG.flatten()), *(_advantage(scores, drawn, x, True) for x in (True, False))]
        found = [_group_variance(scores, drawn, a_A, size) for a_A in forms]
        rows.append(Row(name, " / ".join(f"{x:.4f}" for x in found), MEASURED, ""))
    return rows


def _group_variance(scores: Scores, drawn: Drawn, advantage_A: Tensor, size: int) -> float:
    states = len(scores.logp_XV)
    group_A = torch.arange(len(drawn.sets.leaf_PG)).repeat_interleave(size)[drawn.rows.index_N]
    flat = scores.score_NV.new_zeros(len(drawn.sets.leaf_PG) * states, scores.tree.vocabulary)
    where_A = group_A * states + scores.tree.state_N[drawn.action_A]
    flat.index_add_(0, where_A, advantage_A[:, None] * scores.score_NV[drawn.action_A] / size)
    square_P = flat.view(len(drawn.sets.leaf_PG), -1).square().sum(1)
    return float(drawn.sets.probability_P @ square_P - scores.problem.reward_gradient.square().sum())


def _outside_rows(problem: Problem) -> list[Row]:
    """A mean of earlier steps and a number of the row are settled before anything is drawn.

    A mean that moves before it is subtracted holds the completion's own reward, by (1 − decay)/G.
    """

    def role(problem: Problem, sets: Multisets) -> Tensor:
        mean_P = torch.full((len(sets.leaf_PG),), MEAN, dtype=torch.float64)
        return baselines.role_baseline(problem.reward_L[sets.leaf_PG], mean_P, by="role", decay=DECAY)

    def moved(problem: Problem, sets: Multisets) -> Tensor:
        reward_PG = problem.reward_L[sets.leaf_PG]
        return baselines.role_baseline(reward_PG, DECAY * MEAN + (1 - DECAY) * reward_PG.mean(1), by="role")

    def column(problem: Problem, sets: Multisets) -> Tensor:
        column_P = torch.full((len(sets.leaf_PG),), MEAN, dtype=torch.float64)
        return baselines.column_baseline(problem.reward_L[sets.leaf_PG], column_P, column="optimal_value")

    def one(_: Problem, __: int) -> float:
        return 1.0

    def shrunk(_: Problem, size: int) -> float:
        return 1 - (1 - DECAY) / size

    claims = [
        Claim("role_baseline", role, "sequence_sum", one, "exact, scale 1"),
        Claim("role_baseline, its mean moved first", moved, "sequence_sum", shrunk, "exact, scale 1 − (1 − decay)/G"),
        Claim("column_baseline", column, "sequence_sum", one, "exact, scale 1"),
    ]
    return [claim_row(problem, claim) for claim in claims]


def _value_rows(problem: Problem) -> list[Row]:
    """V* of every completion's probability is `truth`'s soft value; of a few samples it is too low on average."""
    soft = float(truth.soft_values(problem.tree, problem.logp_XV.detach(), problem.reward_L, BETA)[0])
    found: list[str] = []
    by_hand: list[float | None] = []
    low = True
    for size in SIZES:
        sets = problem.groups(size)
        if sets is None:
            found.append("skipped")
            by_hand.append(None)
            continue
        reward_PG = problem.reward_L[sets.leaf_PG]
        value_P = baselines.optimal_value(reward_PG, beta=BETA)
        by_hand.append(relative_error(value_P, BETA * (reward_PG / BETA).exp().mean(1).log()))
        apart = float(sets.probability_P @ value_P) - soft
        found.append(f"{apart:.4f}")
        low = low and apart < 0
    many = _many(problem)
    return [
        exact("optimal_value, group by group", by_hand, "by hand"),
        exact("optimal_value of completions as often as they are likely, against V*", abs(many / soft - 1), "V*", 1e-3),
        holds(f"mean of optimal_value less V*, {GROUPS}", " / ".join(found), "too low", low, _told(by_hand)),
    ]


def _told(errors: list[float | None]) -> str:
    return "not computed" if all(x is None for x in errors) else "holds"


def _many(problem: Problem) -> float:
    """Of a million completions."""
    count_L = (problem.probability_L * 1e6).round().long()
    return float(baselines.optimal_value(problem.reward_L.repeat_interleave(count_L)[None], beta=BETA)[0])


def _regression_rows(problem: Problem) -> list[Row]:
    """A*-PO: the slope of a completion's loss along log π is β·log(π/ref) − (r − V)."""
    tree, rows = problem.tree, problem.tree.rows
    loss = partial(advantage_regression, beta=BETA)
    soft = truth.soft_values(tree, problem.reference_XV, problem.reward_L, BETA)[0]
    best_N = problem.at_actions(truth.soft_optimum(tree, problem.reference_XV, problem.reward_L, BETA))

    def advantage_N(value: float) -> Tensor:
        column_L = torch.full_like(problem.reward_L, value)
        return rows.spread(baselines.column_baseline(problem.reward_L[:, None], column_L, column="v")[:, 0])

    def found(value: float, sampled_L: Tensor) -> Tensor:
        weight_N = rows.spread(sampled_L / rows.lengths_S)
        given = problem.old_N, problem.reference_N, advantage_N(value), rows
        return problem.expected_gradient(ascent(loss, *given, weight_N))

    true = problem.reward_gradient - BETA * problem.kl_gradient
    on_policy = [relative_error(found(value, problem.probability_L), true) for value in (float(soft), MEAN)]
    left_N = ascent(loss, best_N, problem.reference_N, advantage_N(float(soft)), rows)
    before_L = truth.leaf_logp(tree, problem.reference_XV)

    def objective(logp_XV: Tensor) -> Tensor:
        apart_L = truth.leaf_logp(tree, logp_XV) - before_L
        wanted_L = problem.reward_L - soft
        return -(before_L.exp() * (BETA * apart_L - wanted_L) ** 2).sum() / (2 * BETA)

    off = found(float(soft), before_L.exp())
    name = f"advantage_regression, beta={BETA:g}"
    return [
        exact(
            f"on-policy: {name}, sequence_mean, with V* / with 0.3", on_policy, "exact for E[r] − β·KL(policy ‖ ref)"
        ),
        exact(
            f"{name} at the best policy of E[r] − β·KL(policy ‖ ref): slope of each action",
            float(left_N.abs().max() / advantage_N(float(soft)).abs().max()),
            "0, whatever sampled",
        ),
        exact(
            f"off-policy: {name}, sequence_mean",
            relative_error(off, problem.true_gradient(objective)),
            "−∇ Σ b·(β·log(π/ref) − A)²/2β",
        ),
        biased(f"off-policy: {name}, against E[r] − β·KL(policy ‖ ref)", cosine(off, true)),
    ]
