"""Every loss, advantage, KL and weight of rlpost: pure functions on tensors, per element.

Axes: N action tokens, S completions, P prompts (or pairs), G completions a prompt, L longest completion.
What is averaged, and how, is said once, by a weight (weights.py).
"""

from rlpost.objectives.advantages import (
    group_mean,
    group_normalised,
    leave_one_out,
    return_to_go,
)
from rlpost.objectives.kl import k1, k2, k3, kl_in_reward
from rlpost.objectives.preference import (
    Pairs,
    cpo,
    dpo,
    dpo_robust,
    hinge,
    ipo,
    length_normalised,
    simpo,
)
from rlpost.objectives.rows import Rows
from rlpost.objectives.supervised import dynamic_fine_tuning, nll
from rlpost.objectives.surrogates import clipped_surrogate, clipped_weight, policy_gradient, sequence_clipped
from rlpost.objectives.weights import (
    constant_length,
    pair_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
)

__all__ = [
    "Pairs",
    "Rows",
    "clipped_surrogate",
    "clipped_weight",
    "constant_length",
    "cpo",
    "dpo",
    "dpo_robust",
    "dynamic_fine_tuning",
    "group_mean",
    "group_normalised",
    "hinge",
    "ipo",
    "k1",
    "k2",
    "k3",
    "kl_in_reward",
    "leave_one_out",
    "length_normalised",
    "nll",
    "pair_mean",
    "policy_gradient",
    "return_to_go",
    "sequence_clipped",
    "sequence_mean",
    "sequence_sum",
    "simpo",
    "token_mean",
]
