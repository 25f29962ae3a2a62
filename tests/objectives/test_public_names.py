"""The module's public names: all there is, each once, and those that the methods are known by."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from rlpost import objectives

FOLDER = Path(objectives.__file__).parent
METHODS = {
    "weights": "token_mean sequence_mean sequence_sum constant_length pair_mean part_mean",
    "kl": "k1 k2 k3 k3_weighted kl_from_old kl_in_reward full_kl adaptive",
    "advantages": """group_mean group_normalised leave_one_out greedy_baseline length_weighted_baseline max_likelihood
        pass_at_k nonzero_rescaled per_reward_normalised ema_baseline soft_leave_one_out whiten""",
    "credit": "Steps return_to_go gae monte_carlo_values process process_normalised potential_shaping",
    "turns": "turn_gae turn_leave_one_out turn_normalised gigpo",
    "surrogates": """policy_gradient clipped_surrogate sequence_clipped clipped_weight geometric_mean soft_adaptive
        divergence_masked sequence_soft tapered squared_log_ratio future_weighted""",
    "target_policy": "target_policy",
    "correction": "correction off_policy_ratio",
    "entropy": "action_covariance adaptive_entropy",
    "focus": "top_entropy clip_covariance top_covariance second_moment",
    "mixing": "expert_weight",
    "preference": """PairBatch dpo dpo_robust ipo hinge length_normalised exo nca bco sppo aot aot_unpaired apo_zero
        apo_down discopop simpo orpo cpo dpo_plackett_luce alphapo""",
    "mixed": "WeightedSum",
    "preference_modifiers": "f_divergence length_desensitised confidence mix mix_lora",
    "reward_model": "bradley_terry plackett_luce process_reward",
    "unpaired": "Unpaired kto",
    "supervised": """nll dynamic_fine_tuning confidence_weighted label_smoothing unlikelihood likelihood_by_label
        forward_kl reverse_kl jensen_shannon""",
    "values": "value_loss",
    "trust_region": "conjugate_gradient step_length finite_difference line_search",
    "metrics": "clipped_low clipped_high explained_variance effective_sample_share",
    "ragged": "Ragged",
}
"""File -> what recipes and papers ask for; a rename breaks them."""


def public() -> Iterator[tuple[str, str]]:
    """(file, name) of every function and class of the module that is not private."""
    for file in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield file.stem, node.name


def test_every_public_function_and_class_is_exported():
    for file, name in public():
        # import_module, since the package's `correction` is a function and not the file.
        own = vars(importlib.import_module(f"rlpost.objectives.{file}"))[name]
        assert getattr(objectives, name, None) is own, f"{file}.{name}"


def test_all_lists_them_each_once_in_order():
    assert objectives.__all__ == sorted(name for _, name in public())


def test_the_methods_keep_their_names_and_files():
    found = set(public())
    for file, names in METHODS.items():
        for name in names.split():
            assert (file, name) in found, f"{file}.{name}"
            assert name in objectives.__all__
