"""The reference policy: the checkpoint a stage started from, or the one that the recipe names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from rlpost.errors import ModelError
from rlpost.policy import adapters
from rlpost.policy.adapter_files import base_of, is_adapter, read_adapter_config, same_model
from rlpost.policy.check import probe_groups
from rlpost.policy.load import load_policy
from rlpost.policy.logprobs import Distributions
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.types import Group


class Reference:
    """Log-probabilities under a frozen policy.

    With LoRA it is another adapter (or none) on the same base; with full fine-tuning, a frozen second model.
    """

    def __init__(self, policy: Policy, adapter: str | None) -> None:
        """Use `reference_policy` to make one.

        Args:
            policy: the trained policy if `adapter` says which adapter of it to use, else the frozen model itself.
            adapter: an adapter's name; None for the bare base.
        """
        self._policy = policy
        self._adapter = adapter

    @property
    def policy(self) -> Policy:
        """The model that gives them: the trained policy's, or one of its own."""
        return self._policy

    def acting(self) -> AbstractContextManager[None]:
        """Its adapter is the active one of `policy` inside; what runs there has no gradient."""
        return self._policy.acting_as(self._adapter) if self._policy.has_adapter else nullcontext()

    def logprobs(self, groups: Iterable[Group], temperature: float = 1.0) -> Tensor:
        """[N] log-probability of every action of the groups, without gradient, on the CPU."""
        with self.acting():
            return logprobs(self._policy, groups, temperature=temperature)

    def distributions(self, groups: Sequence[Group]) -> Distributions:
        """For some of the groups' actions: [n, V] log-probabilities of the whole vocabulary, without gradient.

        The output head runs later, when the policy's own adapter is active again: neither may change it.
        """
        policy = self._policy
        was_training = policy.training
        policy.eval()
        with self.acting():
            found = policy.distributions(policy.batch(groups))
        policy.train(was_training)
        return found


def reference_policy(
    policy: Policy, checkpoint: Path, start: Path, settings: Model, name: str = adapters.REFERENCE
) -> Reference:
    """The reference for a stage whose `policy` was just loaded from `start` and has not been trained yet.

    Args:
        policy: as loaded; with LoRA its base serves the reference as well.
        checkpoint: what the reference is: `start`, the base model, or an earlier stage's result.
        start: the checkpoint `policy` was loaded from.
        settings: the recipe's `model` section, for loading a frozen copy.
        name: of its adapter on the policy's base.

    Raises:
        ModelError: if the checkpoint cannot be loaded.
    """
    if policy.has_adapter and same_model(checkpoint, policy.base):
        return Reference(policy, None)
    if policy.has_adapter and checkpoint == start:
        state = adapters.adapter_state(policy.model, adapters.POLICY)
        adapters.add_adapter(policy.model, name, state)
        return _proven_copy(policy, checkpoint, name)
    if policy.has_adapter and same_base(checkpoint, policy):
        adapters.add_saved_adapter(policy.model, name, checkpoint)
        return Reference(policy, name)
    frozen = load_policy(checkpoint, settings, bfloat16=policy.in_bfloat16, device=policy.device, trainable=False)
    return frozen_reference(frozen)


def _proven_copy(policy: Policy, checkpoint: Path, name: str) -> Reference:
    """The reference that is a copy of the policy's adapter; its log-probabilities are compared with the policy's.

    Raises:
        ModelError: they differ.
    """
    reference = Reference(policy, name)
    groups = probe_groups(policy.vocabulary, policy.max_positions)
    if not torch.equal(reference.logprobs(groups), logprobs(policy, groups)):
        raise ModelError(
            f"{checkpoint}: a copy of its adapter gives other log-probabilities, so it cannot be the reference; "
            "merge it into its base with peft's merge_and_unload and name the merged folder"
        )
    return reference


def frozen_reference(policy: Policy) -> Reference:
    """A model as it is, as a reference: one of its own, or the policy itself."""
    return Reference(policy, adapters.POLICY if policy.has_adapter else None)


def same_base(checkpoint: Path, policy: Policy) -> bool:
    """True if `checkpoint` is an adapter that can be added to the policy's base, next to the policy's own.

    Copies of modules or tokens that an adapter has besides low ranks must be of the same ones in both: peft cannot wrap
    one module in two ways.
    """
    if not (policy.has_adapter and is_adapter(checkpoint) and same_model(base_of(checkpoint), policy.base)):
        return False
    own, other = policy.model.peft_config[adapters.POLICY], read_adapter_config(checkpoint)
    return (set(own.modules_to_save or ()), own.trainable_token_indices) == (
        set(other.modules_to_save or ()),
        other.trainable_token_indices,
    )
