"""Claims that advantages, credit, KL terms and weights are what their formulas say: written out in plain Python.

Expected gradients prove what an estimator is the gradient of; for a biased one there is nothing to compare with but its
definition. Lists of numbers and `statistics`, group by group, on groups of completions of the tree.

Axes: P groups, G completions each, N actions of all leaves, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from statistics import fmean, stdev

import torch
from torch import Tensor

from rlpost.objectives import advantages, credit, kl, turns, weights
from rlpost.objectives.ragged import Ragged, has_signal
from rlpost.oracle.claims_credit import steps_of_two
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import Row, Section, exact

GROUPS, SIZE = 40, 4
EPS, BETA = 1e-4, 0.3
GAMMA, LAM = 0.9, 0.8
Group = list[float]


def definition_section(problem: Problem) -> Section:
    """By hand, in the order of objectives/."""
    rows = [*_advantage_rows(problem), *_credit_rows(problem), *_step_rows(problem), *_turn_rows(problem)]
    rows += [*_kl_rows(problem), *_weight_rows(problem)]
    return Section("formulas written out: relative error", tuple(rows))


def _drawn(problem: Problem) -> Tensor:
    """[P, G] some leaves; one group is all the same."""
    generator = torch.Generator().manual_seed(0)
    leaf_PG = torch.randint(problem.tree.leaves, (GROUPS, SIZE), generator=generator)
    leaf_PG[0] = leaf_PG[0, 0]
    return leaf_PG


def _advantage_rows(problem: Problem) -> list[Row]:
    leaf_PG = _drawn(problem)
    # Of either sign, and so are the groups' means.
    reward_PG = problem.reward_L[leaf_PG] - problem.reward_L.mean()
    # Every third group has a completion without a reward.
    reward_PG[::3, 1] = torch.nan
    length_PG = problem.tree.length_L[leaf_PG].double()
    everything = [x for x in reward_PG.flatten().tolist() if x == x]
    signals = sum(len(set(g)) > 1 for g in _scored(reward_PG))

    def normalised(g: Group) -> Group:
        return [(x - fmean(g)) / (stdev(g) + EPS) for x in g]

    def likely(g: Group) -> Group:
        return [(x - fmean(g)) / fmean(g) if fmean(g) > 0 else 0.0 for x in g]

    def soft(g: Group) -> Group:
        powers = [math.exp(x / BETA) for x in g]
        return [x - BETA * math.log(_others(powers, i)) for i, x in enumerate(g)]

    def best_of_two(g: Group) -> Group:
        return [2 * (_best(g, i, True) - _best(g, i, False)) for i in range(len(g))]

    forms: dict[str, tuple[Tensor, Callable[[Group], Group]]] = {
        "group_mean": (advantages.group_mean(reward_PG), lambda g: [x - fmean(g) for x in g]),
        "group_normalised": (advantages.group_normalised(reward_PG), normalised),
        "group_normalised over the batch": (
            advantages.group_normalised(reward_PG, std_over="batch"),
            lambda g: [(x - fmean(g)) / (stdev(everything) + EPS) for x in g],
        ),
        "leave_one_out": (advantages.leave_one_out(reward_PG), lambda g: [x - _others(g, i) for i, x in enumerate(g)]),
        "soft_leave_one_out": (advantages.soft_leave_one_out(reward_PG, beta=BETA), soft),
        "max_likelihood": (advantages.max_likelihood(reward_PG), likely),
        "nonzero_rescaled": (
            advantages.nonzero_rescaled(reward_PG),
            lambda g: [(x - fmean(g)) * GROUPS / signals for x in g],
        ),
        "pass_at_k k=2": (advantages.pass_at_k(reward_PG, k=2), best_of_two),
    }
    rows = [exact(name, relative_error(found, _by_group(reward_PG, form))) for name, (found, form) in forms.items()]
    weighted = torch.stack(
        [_spread(r, _weighted(r.tolist(), n.tolist())) for r, n in zip(reward_PG, length_PG, strict=True)]
    )
    found = advantages.length_weighted_baseline(reward_PG, length_PG)
    split_PGK = torch.stack([reward_PG * 0.25, reward_PG.sin()], 2)
    apart = [_by_group(x_PG, normalised) for x_PG in split_PGK.unbind(2)]
    summed_PG = torch.where(reward_PG.isnan(), torch.nan, apart[0] + 2 * apart[1])
    flat = [x for x in summed_PG.flatten().tolist() if x == x]
    both_PG = torch.where(reward_PG.isnan(), 0.0, (summed_PG - fmean(flat)) / (stdev(flat) + EPS))
    both_PG = torch.where(has_signal(summed_PG)[:, None], both_PG, 0.0)
    normalised_PG = advantages.per_reward_normalised(split_PGK, torch.tensor([1.0, 2.0]))
    return [
        *rows,
        exact("length_weighted_baseline", relative_error(found, weighted)),
        exact("per_reward_normalised", relative_error(normalised_PG, both_PG), tolerance=1e-11),
        *_running_rows(reward_PG),
    ]


def _running_rows(reward_PG: Tensor) -> list[Row]:
    """What has a baseline from elsewhere, and the whitening of a whole update."""
    scored = [x for x in reward_PG.flatten().tolist() if x == x]
    mean = advantages.ema(0.4, reward_PG, 0.9)
    assert mean is not None
    spread = math.sqrt(fmean((x - fmean(scored)) ** 2 for x in scored) + 1e-8)
    white_N = torch.tensor([(x - fmean(scored)) / spread for x in scored], dtype=torch.float64)
    found = advantages.whiten(torch.tensor(scored, dtype=torch.float64))
    greedy_PG = advantages.greedy_baseline(reward_PG, torch.arange(GROUPS).double() * 0.01)
    less_PG = (reward_PG - 0.01 * torch.arange(GROUPS).double()[:, None]).nan_to_num()
    return [
        exact("ema", abs(mean - (0.9 * 0.4 + 0.1 * fmean(scored)))),
        exact("ema_baseline", relative_error(advantages.ema_baseline(reward_PG, 0.4), (reward_PG - 0.4).nan_to_num())),
        exact("greedy_baseline", relative_error(greedy_PG, less_PG)),
        exact("whiten", relative_error(found, white_N)),
    ]


def _scored(reward_PG: Tensor) -> list[Group]:
    return [[x for x in g if x == x] for g in reward_PG.tolist()]


def _by_group(reward_PG: Tensor, form: Callable[[Group], Group]) -> Tensor:
    """[P, G] a form of each group's scored rewards; 0 where there is none, or where all are equal."""
    return torch.stack(
        [
            _spread(r, form(g) if len(set(g)) > 1 else [0.0] * len(g))
            for r, g in zip(reward_PG, _scored(reward_PG), strict=True)
        ]
    )


def _spread(reward_G: Tensor, scored: Sequence[float]) -> Tensor:
    out = torch.zeros_like(reward_G)
    out[~reward_G.isnan()] = torch.tensor(scored, dtype=torch.float64)
    return out


def _others(g: Group, i: int) -> float:
    return fmean(g[:i] + g[i + 1 :])


def _best(g: Group, i: int, own: bool) -> float:
    """The mean best of all pairs with completion i, or of those without."""
    return fmean(max(g[j] for j in pair) for pair in combinations(range(len(g)), 2) if (i in pair) is own)


def _weighted(r: Group, n: Group) -> Group:
    known = [(x, k) for x, k in zip(r, n, strict=True) if x == x]
    baseline = sum(x * k for x, k in known) / sum(k for _, k in known)
    return [x - baseline if len({x for x, _ in known}) > 1 else 0.0 for x, _ in known]


def _credit_rows(problem: Problem) -> list[Row]:
    """Discounted sums, each written out from its own action to the end."""
    tree, rows = problem.tree, problem.tree.rows
    reward_N = (problem.prefix_N.double() * 0.7).sin()
    value_N = problem.value_X[tree.state_N].cos()
    beyond_L = torch.where(tree.cut_L, problem.reward_L.cos(), 0.0)
    found_N, return_N = credit.gae(reward_N, value_N, rows, gamma=GAMMA, gae_lambda=LAM, bootstrap_S=beyond_L)
    to_go_N = credit.return_to_go(reward_N, rows, gamma=GAMMA)
    shaped_N = credit.potential_shaping(value_N, rows, gamma=GAMMA)
    gae, to_go, shaped = [], [], []
    lengths = rows.lengths_S.tolist()
    for r, v, end in zip(*(torch.split(x_N, lengths) for x_N in (reward_N, value_N)), beyond_L.tolist(), strict=True):
        ahead = [*v.tolist()[1:], end]
        deltas = [x + GAMMA * b - a for x, a, b in zip(r.tolist(), v.tolist(), ahead, strict=True)]
        for t in range(len(deltas)):
            gae.append(sum((GAMMA * LAM) ** k * d for k, d in enumerate(deltas[t:])))
            to_go.append(sum(GAMMA**k * x for k, x in enumerate(r.tolist()[t:])))
        shaped += [GAMMA * b - a for a, b in pairwise([*v.tolist(), 0.0])]
    by_hand = (torch.tensor(x, dtype=torch.float64) for x in (gae, to_go, shaped))
    names = (f"gae, γ={GAMMA:g}, λ={LAM:g}, bootstrapped", f"return_to_go, γ={GAMMA:g}", "potential_shaping")
    pairs = zip(names, (found_N, to_go_N, shaped_N), by_hand, strict=True)
    rows_ = [exact(name, relative_error(found, true)) for name, found, true in pairs]
    return [*rows_, exact("gae's return", relative_error(return_N - value_N, found_N), "A + V")]


def _step_rows(problem: Problem) -> list[Row]:
    """Rewards of steps: spread, on the last action, the worst one, and normalised over groups of completions."""
    rows = Ragged(problem.tree.length_L[_drawn(problem)].flatten())
    steps = steps_of_two(rows)
    reward_K = (torch.arange(len(steps.last_K)).double() * 0.7).sin()
    by_row = [x.tolist() for x in torch.split(reward_K, steps.count_S.tolist())]
    even, last, worst = [], [], []
    for own, n in zip(by_row, rows.lengths_S.tolist(), strict=True):
        sizes = [min(2, n - 2 * k) for k in range(len(own))]
        even += [x / k for x, k in zip(own, sizes, strict=True) for _ in range(k)]
        last += [x if j == k - 1 else 0.0 for x, k in zip(own, sizes, strict=True) for j in range(k)]
        at = own.index(min(own))
        worst += [
            x if i == at and j == k - 1 else 0.0
            for i, (x, k) in enumerate(zip(own, sizes, strict=True))
            for j in range(k)
        ]
    normal: list[float] = []
    for g in range(0, rows.completions, SIZE):
        together = [x for own in by_row[g : g + SIZE] for x in own]
        spread = stdev(together) if len(together) > 1 else 0.0
        normal += [(x - fmean(together)) / (spread + EPS) if len(set(together)) > 1 else 0.0 for x in together]
    z_N = credit.on_last(torch.tensor(normal, dtype=torch.float64), steps)
    found = (
        credit.spread_evenly(reward_K, steps),
        credit.on_last(reward_K, steps),
        credit.least(reward_K, steps),
        credit.process_normalised(reward_K, steps, SIZE),
    )
    true = [torch.tensor(x, dtype=torch.float64) for x in (even, last, worst)]
    true.append(torch.cat([x.flip(0).cumsum(0).flip(0) for x in torch.split(z_N, rows.lengths_S.tolist())]))
    names = ("spread_evenly", "on_last", "least", "process_normalised")
    end_S = rows.lengths_S.double().cos()
    value_K = reward_K.cos()
    by_value = [x.tolist() for x in torch.split(value_K, steps.count_S.tolist())]
    gained: list[float] = []
    for own, end, n in zip(by_value, end_S.tolist(), rows.lengths_S.tolist(), strict=True):
        ahead = [*own[1:], end]
        gained += [ahead[at // 2] - own[at // 2] for at in range(n)]
    tried_N = credit.monte_carlo_values(value_K, end_S, steps)
    later = [
        sum(GAMMA**k * x for k, x in enumerate(own[t:]))
        for own in (x.tolist() for x in torch.split(true[0], rows.lengths_S.tolist()))
        for t in range(len(own))
    ]
    discounted_N = credit.process(reward_K, steps, how="even", gamma=GAMMA)
    more = {
        "monte_carlo_values": (tried_N, gained),
        f"process, evenly, γ={GAMMA:g}": (discounted_N, later),
    }
    listed = [exact(name, relative_error(f_N, t_N)) for name, f_N, t_N in zip(names, found, true, strict=True)]
    return listed + [
        exact(name, relative_error(f_N, torch.tensor(t, dtype=torch.float64))) for name, (f_N, t) in more.items()
    ]


def _turn_rows(problem: Problem) -> list[Row]:
    """Groups turn by turn, and GiGPO's groups of equal states; a state here is whether a turn's number is odd."""
    rows = Ragged(problem.tree.length_L[_drawn(problem)].flatten())
    steps = steps_of_two(rows)
    reward_K = (torch.arange(len(steps.last_K)).double() * 0.7).sin()
    state_K = torch.cat([torch.arange(n) % 2 for n in steps.count_S.tolist()])
    alone, normal, both = [], [], []
    by_row = [x.tolist() for x in torch.split(reward_K, steps.count_S.tolist())]
    for g in range(0, rows.completions, SIZE):
        group = by_row[g : g + SIZE]
        to_go = [[sum(GAMMA**k * x for k, x in enumerate(own[t:])) for t in range(len(own))] for own in group]
        totals = [sum(own) for own in group]
        for total, own in zip(totals, to_go, strict=True):
            for t, x in enumerate(own):
                same = [other[t] for other in to_go if len(other) > t]
                state = [y for other in to_go for k, y in enumerate(other) if k % 2 == t % 2]
                alone.append(x - (sum(same) - x) / max(len(same) - 1, 1))
                normal.append(_standard(x, same))
                both.append(_standard(total, totals) + 0.7 * _standard(x, state))
    forms = {
        "turn_leave_one_out": (turns.turn_leave_one_out(reward_K, steps, SIZE, gamma=GAMMA), alone),
        "turn_normalised": (turns.turn_normalised(reward_K, steps, SIZE, gamma=GAMMA), normal),
        "gigpo": (turns.gigpo(reward_K, steps, state_K, SIZE, omega=0.7, gamma=GAMMA), both),
    }
    return [
        exact(f"{name}, γ={GAMMA:g}", relative_error(found_N, steps.spread(torch.tensor(true, dtype=torch.float64))))
        for name, (found_N, true) in forms.items()
    ]


def _standard(x: float, among: Group) -> float:
    return (x - fmean(among)) / (stdev(among) + EPS) if len(set(among)) > 1 else 0.0


def _kl_rows(problem: Problem) -> list[Row]:
    """Each estimator from the ratio itself, the centred term of the reward, and the controller of its coefficient."""
    leaf_M = _drawn(problem).flatten()
    lengths, begin = problem.tree.length_L[leaf_M].tolist(), problem.tree.rows.start_S[leaf_M].tolist()
    index_A = torch.tensor([b + k for b, n in zip(begin, lengths, strict=True) for k in range(n)])
    given = problem.old_N[index_A], problem.reference_N[index_A]
    u_A = (given[1] - given[0]).exp()
    found_A = kl.kl_in_reward(*given, Ragged(lengths), SIZE)
    sums = [float(x.sum()) for x in torch.split(-u_A.log(), lengths)]
    centred = []
    for m, piece in enumerate(torch.split(-u_A.log(), lengths)):
        group = sums[m // SIZE * SIZE : (m // SIZE + 1) * SIZE]
        centred.append(piece.flip(0).cumsum(0).flip(0) - _others(group, m % SIZE))
    moved = [kl.adaptive(0.2, x, target=4.0, horizon=100.0, count=8) for x in (1.0, 4.2, 9.0)]
    by_hand = [0.2 * (1 + e * 8 / 100) for e in (-0.2, 0.05, 0.2)]
    return [
        exact("k1", relative_error(kl.k1(*given), -u_A.log())),
        exact("k2", relative_error(kl.k2(*given), u_A.log() ** 2 / 2)),
        exact("k3", relative_error(kl.k3(*given), u_A - 1 - u_A.log()), tolerance=1e-11),
        exact("kl_in_reward, centred over the others of the group", relative_error(found_A, torch.cat(centred))),
        exact(
            "adaptive β below, at and above its target",
            max(abs(a / b - 1) for a, b in zip(moved, by_hand, strict=True)),
        ),
    ]


def _weight_rows(problem: Problem) -> list[Row]:
    """Counts of the update that a part belongs to, one completion of which has no actions."""
    lengths = [0, *problem.tree.length_L.tolist()]
    rows, learned, total, longest = Ragged(lengths), len(lengths) - 1, sum(lengths), problem.tree.depth
    forms: dict[str, Callable[[int], float]] = {
        "token_mean": lambda _: 1 / total,
        "sequence_mean": lambda n: 1 / (learned * n),
        "sequence_sum": lambda _: 1 / learned,
        "constant_length": lambda _: 1 / (learned * longest),
    }
    errors = []
    for name, form in forms.items():
        true = torch.tensor([form(n) for n in lengths for _ in range(n)], dtype=torch.float64)
        part = weights.weigh(name, rows, 2 * total, 2 * learned, longest)
        own = weights.weigh(name, rows, rows.actions, rows.learned, longest)
        errors += [relative_error(own, true), relative_error(2 * part, true)]
    return [exact("weights of a whole update, and of half of one", max(errors))]
