"""Claims about losses of preferences: each one's gradient at the table policy against a derivative taken by hand.

Pairs are of completions of the tree; Δ = logp − reference of a completion, h = Δ_w − Δ_l, σ the logistic function.

Axes: P pairs, 2 = (chosen, rejected), L leaves, K completions of a ranked group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rlpost.objectives import preference
from rlpost.objectives.coupled import linearised
from rlpost.objectives.preference import PairBatch, pairs_of
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.reward_model import bradley_terry, plackett_luce, process_reward
from rlpost.objectives.unpaired import Unpaired, kto
from rlpost.oracle import truth
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import Row, Section, exact

BETA, EPSILON, TAU, SHIFT = 0.7, 0.2, 0.4, 0.3
MOST_PAIRS = 200

Slopes = tuple[Tensor, Tensor]
"""[P] by logp of the chosen and of the rejected completion."""


class Drawn:
    """Pairs of leaves with everything that losses are made of, by plain sums."""

    def __init__(self, problem: Problem) -> None:
        tree = problem.tree
        first_P, second_P = torch.triu_indices(tree.leaves, tree.leaves, 1)
        some_P = torch.arange(0, len(first_P), max(1, len(first_P) // MOST_PAIRS))
        # The later leaf is chosen in every other pair, so that neither is always the longer one.
        swap_P = (torch.arange(len(some_P)) % 2).bool()
        a_P, b_P = first_P[some_P], second_P[some_P]
        self.leaf_P2 = torch.stack([torch.where(swap_P, b_P, a_P), torch.where(swap_P, a_P, b_P)], 1)
        logp_L = truth.leaf_logp(tree, problem.logp_XV.detach())
        reference_L = truth.leaf_logp(tree, problem.reference_XV)
        self.logp_P2, self.reference_P2 = logp_L[self.leaf_P2], reference_L[self.leaf_P2]
        self.length_P2 = tree.length_L[self.leaf_P2].double()
        self.delta_w, self.delta_l = (self.logp_P2 - self.reference_P2).unbind(1)
        self.h = self.delta_w - self.delta_l
        self.length_w, self.length_l = self.length_P2.unbind(1)
        self.mean_w, self.mean_l = (self.logp_P2 / self.length_P2).unbind(1)
        self.h_mean = self.delta_w / self.length_w - self.delta_l / self.length_l

    def slopes(self, loss: Callable[[PairBatch], Tensor]) -> Tensor:
        """[P, 2] of the summed loss by the log-probabilities."""
        moving_P2 = self.logp_P2.clone().requires_grad_()
        return torch.autograd.grad(loss(PairBatch(moving_P2, self.reference_P2, self.length_P2)).sum(), moving_P2)[0]


def pair_section(problem: Problem) -> Section:
    """Losses on pairs, on single completions, and on ranked groups."""
    drawn = Drawn(problem)
    rows = [
        exact(f"gradient of {name}", relative_error(drawn.slopes(loss), torch.stack(slopes, 1)), "by hand")
        for name, loss, slopes in (*_of_margin(drawn), *_of_means(drawn), *_of_sides(drawn))
    ]
    rows += [*_coupled_rows(drawn), _kto_row(drawn), *_scored_rows(drawn), _table_row(problem, drawn)]
    return Section("losses of preferences: relative error of the gradient", tuple(rows))


Claims = Iterator[tuple[str, Callable[[PairBatch], Tensor], Slopes]]


def _of_margin(d: Drawn) -> Claims:
    """What depends on h alone pulls both completions by as much."""
    u = BETA * d.h
    s, soft = u.sigmoid(), (u / TAU).sigmoid()
    turn = soft * (1 - soft) / TAU

    def both(slope_P: Tensor) -> Slopes:
        return BETA * slope_P, -BETA * slope_P

    smoothed = -(1 - EPSILON) * (1 - s) + EPSILON * s
    unbiased = (-(1 - EPSILON) * (1 - s) - EPSILON * s) / (1 - 2 * EPSILON)
    found = turn * s.log() - (1 - soft) * (1 - s) + (turn - soft) * (-u).exp()
    nearer = s * (1 - s) * (u - torch.logit(torch.tensor(1 - EPSILON, dtype=torch.float64)))
    off = (2 * (d.h - 1 / (2 * BETA)), -2 * (d.h - 1 / (2 * BETA)))
    yield "dpo", partial(preference.dpo, beta=BETA), both(s - 1)
    yield "dpo, ε=0.2", partial(preference.dpo, beta=BETA, epsilon=EPSILON), both(smoothed)
    yield "dpo_robust", partial(preference.dpo_robust, beta=BETA, epsilon=EPSILON), both(unbiased)
    yield "hinge", partial(preference.hinge, beta=BETA), both(-(u < 1).double())
    yield "ipo, summed", partial(preference.ipo, beta=BETA, summed=True), off
    yield "exo", partial(preference.exo, beta=BETA, epsilon=EPSILON), both(nearer)
    yield "discopop", partial(preference.discopop, beta=BETA, temperature=TAU), both(found)


def _of_means(d: Drawn) -> Claims:
    """What depends on means per action pulls a long completion's total less."""
    off = 2 * (d.h_mean - 1 / (2 * BETA))
    even = BETA * ((BETA * d.h_mean).sigmoid() - 1)
    lead = BETA * ((BETA * (d.mean_w - d.mean_l) - SHIFT).sigmoid() - 1)
    plain = BETA * ((BETA * (d.logp_P2[:, 0] - d.logp_P2[:, 1])).sigmoid() - 1)
    p_w, p_l = d.mean_w.exp(), d.mean_l.exp()
    odds = (p_w / (1 - p_w)).log() - (p_l / (1 - p_l)).log()
    pull = BETA * (odds.sigmoid() - 1)
    yield "ipo", partial(preference.ipo, beta=BETA), (off / d.length_w, -off / d.length_l)
    yield (
        "length_normalised",
        partial(preference.length_normalised, beta=BETA),
        (even / d.length_w, -even / d.length_l),
    )
    yield "simpo", partial(preference.simpo, beta=BETA, gamma=SHIFT), (lead / d.length_w, -lead / d.length_l)
    for alpha in (TAU, -TAU):
        shape_w, shape_l = ((1 - (-alpha * mean).exp()) / alpha for mean in (d.mean_w, d.mean_l))
        bent = BETA * ((BETA * (shape_w - shape_l) - SHIFT).sigmoid() - 1)
        yield (
            f"alphapo, α={alpha:g}",
            partial(preference.alphapo, beta=BETA, gamma=SHIFT, alpha=alpha),
            (bent * p_w**-alpha / d.length_w, -bent * p_l**-alpha / d.length_l),
        )
    yield "cpo", partial(preference.cpo, beta=BETA, alpha=SHIFT), (plain - SHIFT / d.length_w, -plain)
    yield (
        "orpo",
        partial(preference.orpo, beta=BETA),
        ((pull / (1 - p_w) - 1) / d.length_w, -pull / (1 - p_l) / d.length_l),
    )


def _of_sides(d: Drawn) -> Claims:
    """What looks at each completion by itself."""
    s_w, s_l, s = (BETA * d.delta_w).sigmoid(), (BETA * d.delta_l).sigmoid(), (BETA * d.h).sigmoid()
    up_w, up_l, up = BETA * s_w * (1 - s_w), BETA * s_l * (1 - s_l), BETA * s * (1 - s)
    far_w, far_l = (BETA * d.delta_w - SHIFT).sigmoid(), (BETA * d.delta_l - SHIFT).sigmoid()
    own = (BETA * (d.delta_w + d.delta_l)).mean() / 2
    at_w, at_l = (BETA * d.delta_w - own).sigmoid(), (BETA * d.delta_l - own).sigmoid()
    half = 1 / (2 * BETA)
    yield "nca", partial(preference.nca, beta=BETA), (BETA * (1.5 * s_w - 1), 0.5 * BETA * s_l)
    yield "bco, δ=0.3", partial(preference.bco, beta=BETA, delta=SHIFT), (BETA * (far_w - 1), BETA * far_l)
    yield "bco", partial(preference.bco, beta=BETA), (BETA * (at_w - 1), BETA * at_l)
    yield "sppo", partial(preference.sppo, beta=BETA), (2 * (d.delta_w - half), 2 * (d.delta_l + half))
    yield "apo_zero", partial(preference.apo_zero, beta=BETA), (-up_w, up_l)
    yield "apo_down", partial(preference.apo_down, beta=BETA), (up_w - up, up)


def _coupled_rows(d: Drawn) -> list[Row]:
    """Equals in rank, looked for one by one; and that a slope taken at once is the loss's own."""
    margin, reference = (x_P2[:, 0] - x_P2[:, 1] for x_P2 in (d.logp_P2, d.reference_P2))

    def by_rank(x_P: Tensor, other_P: Tensor) -> tuple[Tensor, Tensor]:
        """(the element of `other_P` with the rank of each of `x_P`, and which it is)."""
        own, others = (sorted(range(len(y)), key=y.tolist().__getitem__) for y in (x_P, other_P))
        which = dict(zip(own, others, strict=True))
        index = torch.tensor([which[i] for i in range(len(x_P))])
        return other_P[index], index

    twin, _ = by_rank(margin, reference)
    pull = BETA * ((BETA * (margin - twin)).sigmoid() - 1)
    found = d.slopes(partial(preference.aot, beta=BETA))
    rival, which = by_rank(d.delta_w, d.delta_l)
    push = BETA * ((BETA * (d.delta_w - rival)).sigmoid() - 1)
    loose = torch.stack([push, torch.zeros_like(push).index_add(0, which, -push)], 1)
    apart = d.slopes(partial(preference.aot_unpaired, beta=BETA))

    def by_leaf(slope_P2: Tensor) -> Tensor:
        """Several rejected completions may be the same leaf, and which of them has which rank is open."""
        leaf_P = d.leaf_P2[:, 1]
        together_L = slope_P2.new_zeros(int(leaf_P.max()) + 1).index_add(0, leaf_P, slope_P2[:, 1])
        return torch.cat([slope_P2[:, 0], together_L])

    value, slope_P2 = linearised(
        lambda x_P2: preference.bco(PairBatch(x_P2, d.reference_P2, d.length_P2), beta=BETA).sum(), d.logp_P2
    )
    whole = preference.bco(PairBatch(d.logp_P2, d.reference_P2, d.length_P2), beta=BETA).sum()
    both = relative_error(slope_P2, d.slopes(partial(preference.bco, beta=BETA)))
    return [
        exact("gradient of aot", relative_error(found, torch.stack([pull, -pull], 1)), "by hand"),
        exact("gradient of aot_unpaired", relative_error(by_leaf(apart), by_leaf(loose)), "by hand"),
        exact("linearised: value and slope of a whole update", max(both, float((value / whole - 1).abs()))),
    ]


def _kto_row(d: Drawn) -> Row:
    """Two kinds of completions against the mean of mismatched ones, which is not below 0 and has no gradient."""
    other = d.delta_l - d.delta_l.mean() + SHIFT
    good = torch.arange(len(d.delta_w)) % 3 == 0
    pairs = []
    for mismatched, z in ((other, SHIFT), (-other, 0.0)):
        moving = d.delta_w.clone().requires_grad_()
        loss = kto(Unpaired(moving, mismatched, good), beta=BETA, desirable=1.5, undesirable=0.5)
        (slope,) = torch.autograd.grad(loss.sum(), moving)
        s = (BETA * (d.delta_w - z)).sigmoid()
        by_hand = torch.where(good, -1.5, 0.5).double() * BETA * s * (1 - s)
        value = torch.where(good, 1.5 * (1 - s), 0.5 * s)
        pairs.append((torch.cat([slope, loss.detach()]), torch.cat([by_hand, value])))
    return exact("loss and gradient of kto, z > 0 and z = 0", [relative_error(*pair) for pair in pairs], "by hand")


def _scored_rows(d: Drawn) -> list[Row]:
    """Orders of whole groups, counted out; scores with a margin; labelled steps."""
    score_P3 = torch.stack([d.delta_w, d.delta_l, d.delta_w.roll(1)], 1)
    rank_P3 = torch.stack([torch.full_like(d.h, x) for x in (0.2, 0.9, 0.5)], 1)
    # The best of those that are left is picked by its weight among them.
    ordered = -_chance(score_P3.exp(), (1, 2, 0)).log()
    tie_P3 = torch.stack([torch.full_like(d.h, x) for x in (0.9, 0.9, 0.5)], 1)
    e_P3 = score_P3.exp()
    tied = -(e_P3[:, :2] / (e_P3[:, :2] + e_P3[:, 2:])).log().sum(1)
    absent_P3 = torch.where(torch.tensor([False, False, True]), torch.nan, rank_P3)
    alone = preference.dpo(PairBatch(d.logp_P2.flip(1), d.reference_P2.flip(1), d.length_P2), beta=1.0)
    lead = d.logp_P2[:, 0] - d.logp_P2[:, 1] - d.h.abs()
    scored = -lead.sigmoid().log() + 0.1 * (d.logp_P2[:, 0] + d.logp_P2[:, 1]) ** 2
    label = torch.frac(torch.arange(len(d.h)).double() * 0.37)
    s = d.h.sigmoid()
    entropy = -label * s.log() - (1 - label) * (1 - s).log()
    return [
        exact(
            "plackett_luce, three rewards", relative_error(plackett_luce(score_P3, rank_P3), ordered), "Plackett–Luce"
        ),
        exact(
            f"dpo_plackett_luce, β={BETA:g}",
            relative_error(preference.dpo_plackett_luce(score_P3 / BETA, rank_P3, beta=BETA), ordered),
        ),
        exact(
            "plackett_luce, two equal rewards",
            relative_error(plackett_luce(score_P3, tie_P3), tied),
            "no order of equals",
        ),
        exact(
            "plackett_luce, one of three unscored",
            relative_error(plackett_luce(score_P3, absent_P3), alone),
            "dpo of the two",
        ),
        exact("bradley_terry", relative_error(bradley_terry(d.logp_P2, d.h.abs(), centre=0.1), scored), "by hand"),
        exact("process_reward", relative_error(process_reward(d.h, label), entropy), "by hand"),
    ]


def _chance(weight_PK: Tensor, order: tuple[int, ...]) -> Tensor:
    """[P] that completions are picked in this order."""
    chance_P = torch.ones_like(weight_PK[:, 0])
    for k, i in enumerate(order):
        chance_P = chance_P * weight_PK[:, i] / weight_PK[:, list(order[k:])].sum(1)
    return chance_P


def _table_row(problem: Problem, d: Drawn) -> Row:
    """Pairs made from actions are the pairs of whole completions, and lose nothing on their way through a table."""
    tree = problem.tree
    begin_L = tree.rows.start_S.tolist()
    leaves, lengths = d.leaf_P2.flatten().tolist(), tree.length_L.tolist()
    index_N = torch.tensor([begin_L[leaf] + k for leaf in leaves for k in range(lengths[leaf])])
    rows = Ragged([lengths[leaf] for leaf in leaves])
    made = pairs_of(problem.old_N[index_N], problem.reference_N[index_N], rows, problem.old_N[index_N])
    back = PairBatch.from_table(made.table_PC)
    found = torch.cat([back.delta_P2, back.length_P2, back.margin_P[:, None], back.mean_delta_P2], 1)
    means = torch.stack([d.delta_w / d.length_w, d.delta_l / d.length_l], 1)
    true = torch.cat([torch.stack([d.delta_w, d.delta_l], 1), d.length_P2, d.h[:, None], means], 1)
    return exact("pairs_of, and back from a table", relative_error(found, true), "sums over actions")
