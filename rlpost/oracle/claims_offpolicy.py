"""Claims about surrogates off the policy that sampled: each one's loss and gradient against their closed form.

Completions come from the reference; r = exp(logp − reference) of an action, A its advantage. With the loss of an action
written as −A·f(r), the coefficient of ∇logp is A·f′(r)·r: a formula a surrogate, without differentiating anything.

Axes: L leaves, N actions of all leaves, S completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from rlpost.objectives import kl, metrics, surrogates
from rlpost.objectives.correction import correction, off_policy_ratio
from rlpost.objectives.surrogates import ratio
from rlpost.oracle import truth
from rlpost.oracle.estimators import Surrogate, ascent
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import Row, Section, exact

LOW, HIGH = 0.3, 0.5
DUAL, DELTA, CUT = 2.0, 1.3, 1.5
TAU = (0.8, 1.6)
"""Of soft_adaptive, by the advantage's sign."""
MOVED, NATS = 0.1, 0.15
GONE = 0.4
"""Nats an action, on average over a completion."""
HALF_LIFE, INFLUENCE = 1.5, (0.2, 0.3)


class Sampled:
    """What is known of the actions that another policy took."""

    def __init__(self, problem: Problem) -> None:
        rows = problem.tree.rows
        self.problem, self.rows = problem, rows
        self.logp_N, self.old_N = problem.old_N, problem.reference_N
        self.r_N = (self.logp_N - self.old_N).exp()
        sign_L = torch.where(torch.arange(problem.tree.leaves) % 2 == 0, 1.0, -1.0).double()
        # Of both signs at every length.
        self.advantage_N = rows.spread(sign_L * (problem.reward_L + 0.1))
        self.weight_N = rows.spread(truth.leaf_logp(problem.tree, problem.reference_XV).exp())

    @property
    def kept_N(self) -> Tensor:
        """[N] bool: PPO's clip leaves the gradient of these."""
        high_N = (self.advantage_N > 0) & (self.r_N > 1 + HIGH)
        low_N = (self.advantage_N < 0) & (self.r_N < 1 - LOW)
        return ~high_N & ~low_N

    def error(self, surrogate: Surrogate, loss_N: Tensor, slope_N: Tensor) -> float:
        """Of the expected gradient and of the loss of every action; `slope_N` is A·f′(r)·r."""
        given = self.logp_N, self.old_N, self.advantage_N, self.rows
        gradients = [
            self.problem.expected_gradient(coefficient_N)
            for coefficient_N in (ascent(surrogate, *given, self.weight_N), slope_N * self.weight_N)
        ]
        losses = surrogate(*given), loss_N
        found, true = (torch.cat(both) for both in zip(gradients, losses, strict=True))
        return relative_error(found, true)


def offpolicy_section(problem: Problem) -> Section:
    """Every surrogate, and the corrections' weights."""
    sampled = Sampled(problem)
    rows = [*_clipped_rows(sampled), *_completion_rows(sampled), *_other_rows(sampled), *_weight_rows(sampled)]
    return Section("off the sampling policy, surrogates: relative error of loss and expected gradient", tuple(rows))


def _row(sampled: Sampled, name: str, surrogate: Callable[..., Tensor], loss_N: Tensor, slope_N: Tensor) -> Row:
    return exact(f"off-policy: {name}", sampled.error(surrogate, loss_N, slope_N), "closed form")


def _clipped_rows(sampled: Sampled) -> list[Row]:
    """PPO's clip: pessimistic, so that an action is let go only where it has gone far enough the way it was pushed."""
    a_N, r_N, kept_N = sampled.advantage_N, sampled.r_N, sampled.kept_N
    clip = partial(surrogates.clipped_surrogate, clip_low=LOW, clip_high=HIGH)
    used_N = torch.where(a_N > 0, r_N.clamp(max=1 + HIGH), r_N.clamp(min=1 - LOW))
    beyond_N = (a_N < 0) & (r_N > DUAL)
    most_N = r_N.clamp(max=DELTA)
    capped_N = torch.where(a_N > 0, most_N.clamp(max=1 + HIGH), most_N.clamp(min=1 - LOW))
    share_N = (~kept_N).double()
    low_N = metrics.clipped_low(sampled.logp_N, sampled.old_N, a_N, clip_low=LOW)
    high_N = metrics.clipped_high(sampled.logp_N, sampled.old_N, a_N, clip_high=HIGH)
    said_N = surrogates.clipped_share(sampled.logp_N, sampled.old_N, a_N, clip_low=LOW, clip_high=HIGH)
    apart = torch.cat([low_N + high_N - share_N, said_N - share_N, (low_N * (a_N > 0)) + (high_N * (a_N < 0))])
    return [
        _row(sampled, "clipped_surrogate", clip, -a_N * used_N, a_N * r_N * kept_N),
        _row(
            sampled,
            f"clipped_surrogate, dual={DUAL:g}",
            partial(clip, dual=DUAL),
            torch.where(beyond_N, -DUAL * a_N, -a_N * used_N),
            a_N * r_N * (kept_N & ~beyond_N),
        ),
        _row(
            sampled,
            f"clipped_surrogate, delta={DELTA:g}",
            partial(clip, delta=DELTA),
            -a_N * capped_N,
            a_N * r_N * (kept_N & (r_N < DELTA)),
        ),
        _masked_row(sampled, -a_N * used_N, a_N * r_N * kept_N),
        _future_row(sampled, used_N, r_N * kept_N),
        exact("clipped_low, clipped_high and clipped_share against where it has no gradient", float(apart.abs().max())),
    ]


def _masked_row(sampled: Sampled, loss_N: Tensor, slope_N: Tensor) -> Row:
    """Of completions that the policy has left behind, those of negative advantage are left out."""
    rows, gone = sampled.rows, []
    for piece in torch.split(sampled.r_N, rows.lengths_S.tolist()):
        gone += [fmean(-math.log(r) for r in piece.tolist()) > GONE] * len(piece)
    kept_N = ~(torch.tensor(gone) & (sampled.advantage_N < 0))
    masked = partial(surrogates.clipped_surrogate, clip_low=LOW, clip_high=HIGH, off_policy_limit=GONE)
    return _row(sampled, f"clipped_surrogate, off_policy_limit={GONE:g}", masked, loss_N * kept_N, slope_N * kept_N)


def _future_row(sampled: Sampled, used_N: Tensor, slope_N: Tensor) -> Row:
    """The clipped surrogate of f·A, f from the log-ratios that follow an action, itself included."""
    influence = []
    for piece in torch.split(sampled.r_N, sampled.rows.lengths_S.tolist()):
        moved = [math.log(r) if r <= DUAL else 0.0 for r in piece.tolist()]
        for t in range(len(moved)):
            later = sum(0.5 ** (k / HALF_LIFE) * x for k, x in enumerate(moved[t:]))
            influence.append(min(max(math.exp(later), 1 - INFLUENCE[0]), 1 + INFLUENCE[1]))
    a_N = sampled.advantage_N * torch.tensor(influence, dtype=torch.float64)
    beyond_N = (a_N < 0) & (sampled.r_N > DUAL)
    weighted = partial(
        surrogates.future_weighted,
        half_life=HALF_LIFE,
        influence_low=INFLUENCE[0],
        influence_high=INFLUENCE[1],
        clip_low=LOW,
        clip_high=HIGH,
        dual=DUAL,
    )
    loss_N = torch.where(beyond_N, -DUAL * a_N, -a_N * used_N)
    return _row(sampled, "future_weighted", weighted, loss_N, a_N * slope_N * ~beyond_N)


def _completion_rows(sampled: Sampled) -> list[Row]:
    """Surrogates whose ratio is a completion's geometric mean."""
    rows, a_N, r_N = sampled.rows, sampled.advantage_N, sampled.r_N
    length_N = rows.spread(rows.lengths_S.double())
    s_N = rows.spread((rows.sum(r_N.log()) / rows.lengths_S).exp())
    used_N = torch.where(a_N > 0, s_N.clamp(max=1 + HIGH), s_N.clamp(min=1 - LOW))
    kept_N = used_N == s_N
    near_N = torch.where(a_N > 0, r_N.log().clamp(max=HIGH), r_N.log().clamp(min=-LOW))
    mean_N = rows.spread((rows.sum(near_N) / rows.lengths_S).exp())
    # All of a completion's actions have the same loss, each with the sum of their weights on its own part of it.
    of_each_N = a_N * mean_N * (near_N == r_N.log())
    sequence = partial(surrogates.sequence_clipped, clip_low=LOW, clip_high=HIGH)
    geometric = partial(surrogates.geometric_mean, clip_low=LOW, clip_high=HIGH)
    assert bool((length_N > 0).all())
    return [
        _row(sampled, "sequence_clipped", sequence, -a_N * used_N, a_N * s_N * kept_N),
        _row(sampled, "geometric_mean", geometric, -a_N * mean_N, of_each_N),
    ]


def _other_rows(sampled: Sampled) -> list[Row]:
    a_N, r_N = sampled.advantage_N, sampled.r_N
    tau_N = torch.where(a_N > 0, torch.full_like(a_N, TAU[0]), TAU[1])
    gate_N = 1 / (1 + (-tau_N * (r_N - 1)).exp())
    moved_N = sampled.logp_N.exp() - sampled.old_N.exp()
    going_N = moved_N * a_N.sign() <= MOVED
    weight_N = r_N.clamp(1 - LOW, 1 + HIGH)
    soft = partial(surrogates.soft_adaptive, tau_positive=TAU[0], tau_negative=TAU[1])
    cut_N = torch.minimum(r_N, torch.full_like(r_N, CUT))
    p_N, q_N = sampled.logp_N.exp(), sampled.old_N.exp()
    nats_N = q_N * (q_N / p_N).log() + (1 - q_N) * ((1 - q_N) / (1 - p_N)).log()
    near_N = (moved_N * a_N.sign() <= 0) | (nats_N <= NATS)
    return [
        _row(
            sampled,
            f"policy_gradient, truncate={CUT:g}",
            partial(surrogates.policy_gradient, truncate=CUT),
            -cut_N * a_N * sampled.logp_N,
            cut_N * a_N,
        ),
        _row(
            sampled,
            "clipped_weight",
            partial(surrogates.clipped_weight, clip_low=LOW, clip_high=HIGH),
            -weight_N * a_N * sampled.logp_N,
            weight_N * a_N,
        ),
        _row(sampled, "soft_adaptive", soft, -4 / tau_N * gate_N * a_N, 4 * gate_N * (1 - gate_N) * r_N * a_N),
        _row(
            sampled,
            "divergence_masked",
            partial(surrogates.divergence_masked, threshold=MOVED),
            -r_N * a_N * going_N,
            r_N * a_N * going_N,
        ),
        _row(
            sampled,
            "divergence_masked, divergence=kl",
            partial(surrogates.divergence_masked, threshold=NATS, divergence="kl"),
            -r_N * a_N * near_N,
            r_N * a_N * near_N,
        ),
    ]


def _weight_rows(sampled: Sampled) -> list[Row]:
    """Importance weights, action by action in plain Python; what is beyond e^20 is not among them on such trees."""
    rows, given = sampled.rows, (sampled.logp_N, sampled.old_N, sampled.rows)
    pieces = torch.split(sampled.r_N, rows.lengths_S.tolist())
    token = [x for piece in pieces for x in piece.tolist()]
    whole = [float(piece.prod()) for piece in pieces for _ in piece]
    found, true = [], []
    for per, w in (("token", token), ("completion", whole)):
        found += [off_policy_ratio(*given, per=per), correction(*given, per=per, cap=CUT)]
        found.append(correction(*given, per=per, cap=CUT, floor=0.5, mode="mask"))
        true += [w, [min(x, CUT) for x in w], [x if 0.5 <= x <= CUT else 0.0 for x in w]]
    error = max(
        relative_error(f, torch.tensor(t, dtype=torch.float64)) for f, t in zip(found, true, strict=True) if any(t)
    )
    size = metrics.without_parts({k: float(x.mean()) for k, x in metrics.effective_sample_parts(found[0]).items()})
    share = sum(token) ** 2 / (len(token) * sum(x * x for x in token))
    far_N = torch.tensor([-50.0, 50.0, 5.0], dtype=torch.float64)
    held = kl.k3(torch.zeros_like(far_N), far_N), ratio(far_N, torch.zeros_like(far_N))
    limits = [math.exp(-20) + 19, math.exp(20) - 21, math.exp(5) - 6, math.exp(-20), math.exp(20), math.exp(5)]
    apart = (torch.cat(held) / torch.tensor(limits, dtype=torch.float64) - 1).abs().max()
    return [
        exact("log-ratios of ±50 in ratio and k3", float(apart), "as of ±20"),
        exact("ratios and corrections, each action and whole completions", error, "by hand", 1e-11),
        exact("policy ratio of every action", relative_error(ratio(*given[:2]), sampled.r_N)),
        exact("effective share of samples", abs(size["effective_samples"] / share - 1), "(Σw)²/(N·Σw²)"),
    ]
