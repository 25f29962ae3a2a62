"""Compares a learned value network with the exact values on a prompt's enumerated completions.

Axes: X states, B bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlpost import console
from rlpost.data.codec import make_codec
from rlpost.data.encoders import plain_prompt
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.params import ValueTarget
from rlpost.goals.unfold import LEAST, Unfolded, unfold
from rlpost.goals.value_network import ValueNetwork, load_value, read_settings
from rlpost.inference.checkpoint import located
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.run.lookup import parent_of

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Errors of a value network; means are over the states that completions pass through."""

    true_root: float
    learned_root: float
    mean_error: float
    """Mean of |learned − true|."""
    root_mean_square: float
    largest: float
    calibration_error: float
    """Expected calibration error: mean over bins of learned values of |mean learned − mean true|."""
    worth: float
    """Number of sampled completions whose share of reached goals has the same error: E[V(1 − V)] / E[error²]."""
    states: int
    """States that were evaluated for the exact values; the network evaluates one."""
    left_out: float
    """Probability of completions that were not enumerated."""


def compare(true_X: Tensor, learned_X: Tensor, reach_X: Tensor, left_out: float = 0.0) -> Calibration:
    """Compare values in [0, 1] of states that are reached with the given probabilities."""
    weight_X = reach_X / reach_X.sum()
    error_X = learned_X - true_X
    bin_X = (learned_X * BINS).long().clamp(0, BINS - 1)
    gap_B = torch.zeros(BINS, dtype=weight_X.dtype).index_add(0, bin_X, weight_X * error_X)
    square = float(weight_X @ error_X.square())
    return Calibration(
        true_root=float(true_X[0]),
        learned_root=float(learned_X[0]),
        mean_error=float(weight_X @ error_X.abs()),
        root_mean_square=square**0.5,
        largest=float(error_X.abs().max()),
        calibration_error=float(gap_B.abs().sum()),
        worth=float(weight_X @ (true_X * (1 - true_X))) / max(square, 1e-30),
        states=len(true_X),
        left_out=left_out,
    )


def calibrate(network: ValueNetwork, unfolded: Unfolded, goal: GoalSet) -> Calibration:
    """Compare a network's values for `goal` with the exact ones on a prompt's completions.

    A contrastive network gives V up to a factor, which is set by the exact value of the root.
    """
    settings = network.settings
    true_X = unfolded.values(goal, truncated_counts=settings.truncated_counts)
    if settings.avoid:
        true_X = 1 - true_X
    logit_X = network.logits([(unfolded.prompt, state) for state in unfolded.states])
    if settings.target == ValueTarget.contrastive:
        learned_X = (true_X[0] * (logit_X - logit_X[0]).exp()).clamp(max=1)
    else:
        learned_X = torch.sigmoid(logit_X)
    return compare(true_X, learned_X, unfolded.reach_X, unfolded.left_out)


@dataclass(frozen=True)
class PromptCalibration:
    """A prompt and a goal, with a network's calibration on them."""

    prompt: str
    goal: str
    found: Calibration


def calibrations(
    network: str,
    prompts: Sequence[str],
    goals: Sequence[str],
    *,
    depth: int,
    policy: str | None = None,
    least: float = LEAST,
) -> Iterator[PromptCalibration]:
    """Calibrations of a saved network for every prompt and goal: `rlpost goals calibrate`.

    A network that reads its goal is tested on each goal; another one on all of them as one set.

    Args:
        network: a value network: its run's stage, or a checkpoint.
        prompts: their completions are enumerated.
        goals: texts that completions end in.
        depth: tokens of the longest completion.
        policy: whose completions; by default the one that the network was trained for.
        least: states with a smaller probability are not followed.

    Raises:
        ModelError: the network or the policy cannot be loaded.
        DataError: a prompt or a goal has characters that the tokenizer does not know.
        RecipeError: there are too many completions.
    """
    folder = Path(located(network))
    settings = read_settings(folder)  # first, since it raises if the folder has no value network
    model = located(policy) if policy else parent_of(folder)
    base_policy = load_policy(model, Model(), bfloat16=False, device="cpu", trainable=False)
    codec = make_codec(base_policy.tokenizer)
    value = load_value(folder, base_policy, (), avoid=settings.avoid)
    members = [codec.ids(goal, "--goal") for goal in goals]
    one_by_one = [(text, [ids], ids) for text, ids in zip(goals, members, strict=True)]
    for prompt in prompts:
        unfolded = unfold(base_policy, plain_prompt(prompt, codec, "the prompt"), depth, least=least)
        for text, some, named in one_by_one if settings.condition else [(", ".join(goals), members, ())]:
            yield PromptCalibration(prompt, text, calibrate(value.about(named), unfolded, GoalSet(some)))


def print_table(found: Sequence[PromptCalibration]) -> None:
    """Print the table: a line for each prompt and goal."""
    columns = ["prompt", "goal", "true V", "learned", "mean error", "largest", "ECE", "worth"]
    columns += ["states", "not enumerated"]
    rows = []
    for result in found:
        c = result.found
        numbers = (c.true_root, c.learned_root, c.mean_error, c.largest, c.calibration_error)
        worth, left_out = f"{c.worth:.1f}", f"{c.left_out:.0e}"
        rows.append([result.prompt, result.goal, *(f"{x:.4f}" for x in numbers), worth, str(c.states), left_out])
    console.table("a value network against all likely completions", columns, rows)
