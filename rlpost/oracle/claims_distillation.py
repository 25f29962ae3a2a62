"""Claims about on-policy distillation: what a divergence in every state that the student visits is the gradient of.

The teacher is the reference; the student samples. Each state's own divergence leaves out that an action decides which
states follow; `divergence_to_go` brings that back.

Axes: X states, V tokens, K of them; N actions of all leaves, A actions of sampled groups, F parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlpost.objectives import distillation, supervised
from rlpost.objectives.kl import k1, kl_in_reward
from rlpost.objectives.surrogates import policy_gradient
from rlpost.oracle import truth
from rlpost.oracle.estimators import Drawn, ascent
from rlpost.oracle.problem import SIZES, Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact, holds

MIX = 0.3
Divergence = Callable[[Tensor, Tensor], Tensor]
"""([X, V] student, [X, V] teacher) -> [X]."""
GROUPS = " / ".join(f"G={size}" for size in SIZES)
DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": lambda student, teacher: supervised.reverse_kl(student, teacher),
    "forward_kl": lambda student, teacher: supervised.forward_kl(student, teacher),
    "jensen_shannon": lambda student, teacher: supervised.jensen_shannon(student, teacher, mix=MIX),
}


def distillation_section(problem: Problem) -> Section:
    """Divergences of whole distributions and of a teacher's likeliest tokens, with and without what follows."""
    rows = [*_kl_rows(problem), *_other_rows(problem), *_top_rows(problem)]
    return Section("on-policy distillation: relative error where exact, cosine with ∇KL where biased", tuple(rows))


def _kl_rows(problem: Problem) -> list[Row]:
    """Against ∇KL(student || teacher) of whole completions, found without sampling."""
    true, reverse = problem.kl_gradient, DIVERGENCES["reverse_kl"]
    alone, both = _own(problem, reverse), [_with_later(problem, reverse, size) for size in SIZES]
    to_go = [_sampled(problem, lambda drawn, kl_A: _to_go(problem, drawn, kl_A.shape[0]), size) for size in SIZES]
    in_state = [_sampled(problem, lambda _, kl_A: kl_A, size) for size in SIZES]
    single, whole = (_variance(problem, sampled=sampled) for sampled in (True, False))
    return [
        exact(f"reverse_kl, and divergence_to_go, {GROUPS}", _errors(both, true), "exact for KL of completions"),
        exact(f"k1 of sampled tokens, from each action on, {GROUPS}", _errors(to_go, true), "the same"),
        biased("reverse_kl of each state alone", cosine(alone, true)),
        exact(f"k1 of sampled tokens, each alone, {GROUPS}", _errors(in_state, alone), "that biased one"),
        Row("variance of the first, G=1, as a share of the second's", f"{whole / single:.4f}", "a number", ""),
    ]


def _other_rows(problem: Problem) -> list[Row]:
    """Of E[Σ_t D_t], the divergence that the student meets on its way."""
    rows = []
    for name in ("forward_kl", "jensen_shannon"):
        divergence = DIVERGENCES[name]
        true = _met(problem, divergence)
        found = [_with_later(problem, divergence, size) for size in SIZES]
        rows += [
            exact(f"{name}, and divergence_to_go, {GROUPS}", _errors(found, true), "exact for E[Σ divergence]"),
            biased(f"{name} of each state alone", cosine(_own(problem, divergence), true)),
        ]
    return rows


def _top_rows(problem: Problem) -> list[Row]:
    """Over the teacher's K likeliest tokens and one class for all others."""
    vocabulary = problem.tree.vocabulary
    student_XV, teacher_XV = problem.logp_XV.detach(), problem.reference_XV
    ids_XK, top_XK = distillation.top_tokens(teacher_XV, max(1, vocabulary - 2))
    every_XK, _ = distillation.top_tokens(teacher_XV, vocabulary - 1)
    reverse = partial(_folded, DIVERGENCES["reverse_kl"], ids_XK)
    found = [_with_later(problem, reverse, size) for size in SIZES]
    whole = [divergence(student_XV, teacher_XV) for divergence in DIVERGENCES.values()]
    top = [_folded(divergence, ids_XK, student_XV, teacher_XV) for divergence in DIVERGENCES.values()]
    lossless = [_folded(divergence, every_XK, student_XV, teacher_XV) for divergence in DIVERGENCES.values()]
    lost = [1 - float(t_X.sum() / w_X.sum()) for t_X, w_X in zip(top, whole, strict=True)]
    below = all(bool((t_X <= w_X + 1e-15).all()) for t_X, w_X in zip(top, whole, strict=True))
    others = distillation.with_others(top_XK)[:, -1]
    by_hand = (1 - top_XK.exp().sum(1)).log()
    return [
        exact(f"top_k, and divergence_to_go, {GROUPS}", _errors(found, _met(problem, reverse)), "E[Σ of the folded]"),
        biased("top_k of each state alone", cosine(_own(problem, reverse), problem.kl_gradient)),
        exact("top_k, all tokens but one", [relative_error(a, b) for a, b in zip(lossless, whole, strict=True)]),
        exact("top_k: all others, by the sum and by 1 − the rest", _apart(others, by_hand), "the same", 1e-9),
        exact("top_k: all others of the student", _apart(_rest(student_XV, ids_XK), _by_mask(student_XV, ids_XK))),
        holds("top_k: a lower bound in every state", _shares(lost), "≥ 0 is lost", below),
    ]


def _folded(divergence: Divergence, ids_XK: Tensor, student_XV: Tensor, teacher_XV: Tensor) -> Tensor:
    return divergence(distillation.fold(student_XV, ids_XK), distillation.fold(teacher_XV, ids_XK))


def _rest(logp_XV: Tensor, ids_XK: Tensor) -> Tensor:
    return distillation.fold(logp_XV, ids_XK)[:, -1].exp()


def _by_mask(logp_XV: Tensor, ids_XK: Tensor) -> Tensor:
    return logp_XV.exp().sum(1) - logp_XV.gather(1, ids_XK).exp().sum(1)


def _apart(found: Tensor, true: Tensor) -> float:
    return float((found - true).abs().max())


def _shares(lost: list[float]) -> str:
    return " / ".join(f"{share:.3f}" for share in lost)


def _own(problem: Problem, divergence: Divergence) -> Tensor:
    """[F] gradient of each state's divergence, states as they were visited."""
    visits_X = truth.visits(problem.tree, problem.logp_XV.detach())
    return problem.true_gradient(lambda logp_XV: (visits_X * divergence(logp_XV, problem.reference_XV)).sum())


def _met(problem: Problem, divergence: Divergence) -> Tensor:
    """[F] gradient of the divergence that a completion meets, visits moving too."""
    return problem.true_gradient(
        lambda logp_XV: truth.visits(problem.tree, logp_XV) @ divergence(logp_XV, problem.reference_XV)
    )


def _with_later(problem: Problem, divergence: Divergence, size: int) -> Tensor | None:
    """[F] expected gradient with what an action adds by the states it leads to."""
    divergence_X = divergence(problem.logp_XV.detach(), problem.reference_XV)

    def later(drawn: Drawn, _: Tensor) -> Tensor:
        divergence_A = divergence_X[problem.tree.state_N[drawn.action_A]]
        return distillation.divergence_to_go(divergence_A, drawn.rows, size)

    found = _sampled(problem, later, size)
    return None if found is None else _own(problem, divergence) + found


def _to_go(problem: Problem, drawn: Drawn, actions: int) -> Tensor:
    assert actions == drawn.rows.actions
    size = drawn.sets.leaf_PG.shape[1]
    return kl_in_reward(problem.old_N[drawn.action_A], problem.reference_N[drawn.action_A], drawn.rows, size)


def _sampled(problem: Problem, cost: Callable[[Drawn, Tensor], Tensor], size: int) -> Tensor | None:
    """[F] expected gradient along which `cost(groups, their k1)` of actions rises; None where groups are too many."""
    sets = problem.groups(size)
    if sets is None:
        return None
    drawn = Drawn(problem.tree, sets)
    logp_A = problem.old_N[drawn.action_A]
    advantage_A = -cost(drawn, k1(logp_A, problem.reference_N[drawn.action_A]))
    coefficient_A = ascent(policy_gradient, logp_A, logp_A, advantage_A, drawn.rows, 1 / size)
    return -problem.expected_gradient(drawn.expected(coefficient_A))


def _errors(found: list[Tensor | None], true: Tensor) -> list[float | None]:
    return [None if g is None else relative_error(g, true) for g in found]


def _variance(problem: Problem, *, sampled: bool) -> float:
    """E‖ĝ‖² − ‖E ĝ‖² of one completion, for a table: each visited state has a row of logits of its own."""
    tree, student_XV = problem.tree, problem.logp_XV.detach()
    p_XV = student_XV.exp()
    kl_N = k1(problem.old_N, problem.reference_N)
    gap_XV = student_XV - problem.reference_XV
    kl_X = (p_XV * gap_XV).sum(1)
    one_hot_NV = torch.eye(tree.vocabulary, dtype=p_XV.dtype)[tree.token_N]
    score_NV = one_hot_NV - p_XV[tree.state_N]
    if sampled:
        row_NV = tree.rows.suffix_sum(kl_N)[:, None] * score_NV
    else:
        own_XV = p_XV * (gap_XV - kl_X[:, None])
        later_N = distillation.divergence_to_go(kl_X[tree.state_N], tree.rows, 1)
        row_NV = own_XV[tree.state_N] + later_N[:, None] * score_NV
    mean_XV = torch.zeros_like(p_XV).index_add(
        0, tree.state_N, row_NV * tree.rows.spread(problem.probability_L)[:, None]
    )
    return float(problem.probability_L @ tree.rows.sum(row_NV.square().sum(1)) - mean_XV.square().sum())
