"""Claims about supervised losses, distillation and modifiers of pairs: closed forms, and sums over whole completions.

The teacher is the reference; its completions are what is learned.

Axes: X states, V tokens, L leaves, N actions of all leaves, P pairs; M, r of low-rank adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives import preference_modifiers as modifiers
from rlpost.objectives import supervised
from rlpost.objectives.preference import PairBatch, pairs_of
from rlpost.objectives.ragged import Ragged
from rlpost.oracle import truth
from rlpost.oracle.estimators import descent
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import Row, Section, exact

SMOOTHING, ALPHA, MIX = 0.2, 0.3, 0.3


def supervised_section(problem: Problem) -> Section:
    """Losses of given completions, of distributions, and what is done to pairs before their loss."""
    rows = [*_token_rows(problem), *_distribution_rows(problem), *_modifier_rows(problem), *_adapter_rows()]
    return Section("supervised losses and modifiers of pairs: relative error", tuple(rows))


def _token_rows(problem: Problem) -> list[Row]:
    """The likelihood of the teacher's completions rises along the gradient of KL(teacher || policy)."""
    tree = problem.tree
    given_N = tree.rows.spread(truth.leaf_logp(tree, problem.reference_XV).exp())
    p_N = problem.old_N.exp()
    said_N = tree.rows.spread(torch.arange(tree.leaves) % 2 == 0)
    learned = problem.expected_gradient(descent(supervised.nll, problem.old_N, given_N))
    true = problem.true_gradient(lambda logp_XV: truth.kl(tree, problem.reference_XV, logp_XV))

    def labelled(logp_N: Tensor) -> Tensor:
        return supervised.likelihood_by_label(logp_N, said_N, alpha=ALPHA)

    by_label_N = torch.where(said_N, -1.0, ALPHA * p_N / (1 - p_N))
    cost_N = torch.where(said_N, -p_N.log(), -ALPHA * (1 - p_N).log())
    found = [
        descent(loss, problem.old_N, torch.ones_like(p_N))
        for loss in (supervised.dynamic_fine_tuning, supervised.unlikelihood, labelled)
    ]
    by_hand = (-p_N, p_N / (1 - p_N), by_label_N)
    names = ("dynamic_fine_tuning", "unlikelihood", "likelihood_by_label")
    # A probability near 1 leaves few digits of 1 − p.
    rows = [exact("nll of a teacher's completions", relative_error(learned, true), "∇KL(teacher || policy)")]
    rows += [
        exact(f"{name}: coefficient of ∇logp", relative_error(f_N, true_N), "by hand", 1e-10)
        for name, f_N, true_N in zip(names, found, by_hand, strict=True)
    ]
    return [
        *rows,
        exact("likelihood_by_label: loss", relative_error(labelled(problem.old_N), cost_N), "by hand", 1e-10),
    ]


def _distribution_rows(problem: Problem) -> list[Row]:
    """Over the vocabulary in every state; with states as the right one visits them, the KL of whole completions."""
    tree = problem.tree
    student_XV, teacher_XV = problem.logp_XV.detach(), problem.reference_XV
    visits_X, taught_X = truth.visits(tree, student_XV), truth.visits(tree, teacher_XV)
    p_XV, q_XV = student_XV.exp(), teacher_XV.exp()
    m_XV = MIX * q_XV + (1 - MIX) * p_XV
    shannon_X = (MIX * q_XV * (q_XV / m_XV).log() + (1 - MIX) * p_XV * (p_XV / m_XV).log()).sum(1)
    target_NV = torch.full((tree.rows.actions, tree.vocabulary), SMOOTHING / tree.vocabulary, dtype=torch.float64)
    target_NV[torch.arange(tree.rows.actions), tree.token_N] += 1 - SMOOTHING
    at_NV = student_XV[tree.state_N]
    smooth_N = supervised.label_smoothing(problem.old_N, at_NV, epsilon=SMOOTHING)
    reverse = visits_X @ supervised.reverse_kl(student_XV, teacher_XV)
    forward = taught_X @ supervised.forward_kl(student_XV, teacher_XV)
    shannon = supervised.jensen_shannon(student_XV, teacher_XV, mix=MIX)
    never_XV = torch.where(torch.arange(tree.vocabulary) == 1, -torch.inf, student_XV).log_softmax(1)
    left_XV, said_XV = never_XV[:, [0, *range(2, tree.vocabulary)]], teacher_XV[:, [0, *range(2, tree.vocabulary)]]
    without_X = (left_XV.exp() * (left_XV - said_XV)).sum(1)
    ways = (
        ("reverse_kl over the student's states", reverse, truth.kl(tree, student_XV, teacher_XV), "KL of completions"),
        ("forward_kl over the teacher's states", forward, truth.kl(tree, teacher_XV, student_XV), "KL of completions"),
        ("jensen_shannon", shannon, shannon_X, "by probabilities"),
        ("label_smoothing", smooth_N, -(target_NV * at_NV).sum(1), "cross-entropy"),
        ("reverse_kl of what never says a token", supervised.reverse_kl(never_XV, teacher_XV), without_X, "finite"),
    )
    return [exact(name, relative_error(found, true), expected) for name, found, true, expected in ways]


def _modifier_rows(problem: Problem) -> list[Row]:
    """f′ of each divergence at the ratio itself; excess actions counted one by one."""
    tree = problem.tree
    # Leaves and their mirror: pairs of unlike lengths, the longer one on either side.
    leaf_P2 = torch.stack([torch.arange(tree.leaves), torch.arange(tree.leaves).flip(0)], 1)
    lengths, begin = tree.length_L[leaf_P2].flatten().tolist(), tree.rows.start_S[leaf_P2].flatten().tolist()
    index_N = torch.tensor([b + k for b, n in zip(begin, lengths, strict=True) for k in range(n)])
    logp_N, reference_N = problem.old_N[index_N], problem.reference_N[index_N]
    rows = Ragged(lengths)
    agree_N = (2 * problem.logp_XV.detach()).logsumexp(1)[tree.state_N[index_N]]
    pairs = pairs_of(logp_N, reference_N, rows, agree_N)
    delta_P2 = rows.sum(logp_N - reference_N).view(-1, 2)
    u_P2 = delta_P2.exp()
    forms = {
        "reverse_kl": u_P2.log(),
        "forward_kl": 1 - 1 / u_P2,
        "jensen_shannon": (2 * u_P2 / (1 + u_P2)).log(),
        "alpha": (1 - u_P2**-ALPHA) / ALPHA,
    }
    kinds = [
        exact(
            f"f_divergence, {kind}",
            relative_error(modifiers.f_divergence(pairs, kind=kind, alpha=ALPHA).delta_P2, true_P2),  # type: ignore[arg-type]
            "f′(π/ref)",
            1e-11,
        )
        for kind, true_P2 in forms.items()
    ]
    return [*kinds, *_length_rows(pairs, rows, logp_N - reference_N), *_confidence_rows(pairs, rows, logp_N, agree_N)]


def _length_rows(pairs: PairBatch, rows: Ragged, gap_N: Tensor) -> list[Row]:
    counted = []
    pieces = torch.split(gap_N, rows.lengths_S.tolist())
    for own, other in zip(pieces, [pieces[i ^ 1] for i in range(len(pieces))], strict=True):
        counted.append(sum(float(x) * (1.0 if k < len(other) else ALPHA) for k, x in enumerate(own)))
    found_P2 = modifiers.length_desensitised(pairs, alpha=ALPHA).delta_P2
    times_N = modifiers.length_multipliers(rows, ALPHA)
    by_hand = torch.tensor(counted, dtype=torch.float64)
    return [
        exact("length_desensitised", relative_error(found_P2.flatten(), by_hand), "action by action"),
        exact("length_multipliers", relative_error(rows.sum(times_N * gap_N), by_hand), "the same"),
    ]


def _confidence_rows(pairs: PairBatch, rows: Ragged, logp_N: Tensor, agree_N: Tensor) -> list[Row]:
    """A weight of each pair: how likely both are per action, plain and against a draw of the policy's own."""
    weights = []
    for batch, own_N in (
        (pairs, logp_N - agree_N),
        (PairBatch(pairs.logp_P2, pairs.reference_P2, pairs.length_P2), logp_N),
    ):
        found_P = modifiers.confidence(batch).weight_P
        assert found_P is not None
        mean_P2 = (rows.sum(own_N) / rows.lengths_S).view(-1, 2)
        weights.append(relative_error(found_P, mean_P2.sum(1).exp().clamp(max=1)))
    return [exact("confidence, of draws and plain", weights, "exp of the means' sum")]


def _adapter_rows() -> list[Row]:
    """A mixture of low-rank products, and the nearest one of lower rank (Eckart and Young)."""
    generator = torch.Generator().manual_seed(0)
    a_p, b_p, a_r, b_r = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 5), (4, 2), (3, 5), (4, 3))
    )
    a, b = modifiers.mix_lora(a_p, b_p, a_r, b_r, ALPHA)
    mixed = modifiers.mix(b_p @ a_p, b_r @ a_r, ALPHA)
    true = ALPHA * (b_p @ a_p) + (1 - ALPHA) * (b_r @ a_r)
    small_a, small_b, lost = modifiers.recompressed(a, b, 2)
    u, s, v = torch.linalg.svd(true)
    nearest = (u[:, :2] * s[:2]) @ v[:2]
    share = float(s[2:].norm() / s.norm())
    return [
        exact("mix, and mix_lora's product", [relative_error(x, true) for x in (mixed, b @ a)], "α·π + (1 − α)·ref"),
        exact("recompressed to rank 2: product", relative_error(small_b @ small_a, nearest), "the nearest"),
        exact("recompressed to rank 2: what it says is lost", abs(lost / share - 1)),
    ]
