"""A moving reference: every so often share·policy + (1 − share)·reference (TR-DPO, arXiv:2404.09656).

With full fine-tuning it is a second model whose weights are mixed; with LoRA, an adapter on the policy's base whose
products are. The adapter has several times the policy's rank, since mixing adds ranks up; what exceeds it is cut off,
and the error of that is returned.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlpost.errors import ModelError
from rlpost.objectives.preference_modifiers import mix, mix_lora, recompressed
from rlpost.policy import adapters
from rlpost.policy.adapter_files import read_adapter, same_model
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.reference import same_base
from rlpost.policy.score import logprobs
from rlpost.policy.sharded import like
from rlpost.types import Group

if TYPE_CHECKING:
    from peft import LoraConfig

ROOM = 4
"""Times the policy's rank that the reference's adapter may have."""


class MovingReference:
    """A reference whose weights can be mixed with the policy's."""

    def __init__(self, policy: Policy, checkpoint: Path, settings: Model) -> None:
        """Start from `checkpoint`; with LoRA, that is the policy's base or an adapter on it.

        Raises:
            ModelError: it holds another kind of model or adapter than the policy, or one that cannot be mixed.
        """
        self._policy = policy
        self._frozen: Policy | None = None
        if not policy.has_adapter:
            # Loaded as trainable, so that an adapter is merged into its weights as it was into the policy's.
            self._frozen = load_policy(checkpoint, settings, bfloat16=policy.in_bfloat16, device=policy.device)
            self._frozen.requires_grad_(False)
            if _shapes(self._frozen) != _shapes(policy):
                raise ModelError(
                    f"{checkpoint}: another model than the policy, so it cannot follow it; leave out refresh"
                )
            return
        first = _adapter_of(checkpoint, policy)
        config = adapters.saved_config(policy.model, adapters.POLICY)
        self._rank = config.r * ROOM
        config.r, config.lora_alpha = self._rank, config.lora_alpha * ROOM
        policy.model.add_adapter(adapters.REFERENCE, config)
        self._write(self._padded(first))

    @property
    def frozen(self) -> Policy | None:
        """The second model, with full fine-tuning."""
        return self._frozen

    def logprobs(self, groups: Iterable[Group], temperature: float = 1.0) -> Tensor:
        """[N] log-probability of every action of the groups, without gradient, on the CPU."""
        if self._frozen is not None:
            return logprobs(self._frozen, groups, temperature=temperature)
        with self._policy.acting_as(adapters.REFERENCE):
            return logprobs(self._policy, groups, temperature=temperature)

    @torch.no_grad()
    def move(self, share: float) -> float:
        """Move towards the policy; returns the largest relative error of cutting a product to the adapter's rank."""
        if self._frozen is not None:
            own = dict(self._policy.named_parameters())
            for name, p in self._frozen.named_parameters():
                p.copy_(mix(own[name], p, share))
            return 0.0
        policy = adapters.adapter_state(self._policy.model, adapters.POLICY)
        reference = self.weights()
        mixed, lost = dict(reference), 0.0
        for name in (n for n in reference if "lora_A" in n):
            other = name.replace("lora_A", "lora_B")
            a, b = mix_lora(policy[name], policy[other], reference[name], reference[other], share)
            mixed[name], mixed[other], error = recompressed(a, b, self._rank)
            lost = max(lost, error)
        self._write(self._padded(mixed))
        return lost

    def weights(self) -> dict[str, Tensor]:
        """Its weights by name."""
        if self._frozen is not None:
            return {name: p.detach() for name, p in self._frozen.named_parameters()}
        return adapters.adapter_state(self._policy.model, adapters.REFERENCE)

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore what `weights()` returned."""
        if self._frozen is None:
            self._write(weights)
            return
        for name, p in self._frozen.named_parameters():
            p.copy_(like(weights[name], p))

    def _write(self, state: dict[str, Tensor]) -> None:
        adapters.add_adapter(self._policy.model, adapters.REFERENCE, state)

    def _padded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors padded with zeros to the adapter's rank."""
        full = {}
        for name, x in state.items():
            axis = 0 if "lora_A" in name else 1
            missing = list(x.shape)
            missing[axis] = self._rank - x.shape[axis]
            full[name] = torch.cat([x, x.new_zeros(missing)], axis)
        return full


def _shapes(policy: Policy) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in policy.named_parameters()}


def _adapter_of(checkpoint: Path, policy: Policy) -> dict[str, Tensor]:
    """The weights of a checkpoint's adapter on the policy's base; zeros for the base itself."""
    config = adapters.saved_config(policy.model, adapters.POLICY)
    own = adapters.adapter_state(policy.model, adapters.POLICY)
    if _scale(config) is None or not all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in own):
        raise ModelError(
            "refresh mixes plain low-rank adapters, and this one has more (DoRA, rank-stabilised or single scales, "
            "whole modules, embeddings or tokens); leave out refresh"
        )
    if same_model(checkpoint, policy.base):
        return {name: torch.zeros_like(x) for name, x in own.items()}
    if not same_base(checkpoint, policy):
        raise ModelError(f"{checkpoint}: no adapter on {policy.base}, so it cannot follow one; leave out refresh")
    saved = read_adapter(checkpoint)
    fits = {name: x.shape for name, x in saved.weights.items()} == {name: x.shape for name, x in own.items()}
    if not fits or _scale(saved.config) != _scale(config):
        raise ModelError(f"{checkpoint}: an adapter of another shape than the policy's; leave out refresh")
    return saved.weights


def _scale(config: LoraConfig) -> float | None:
    """The factor on an adapter's products; None if it has more than plain low ranks."""
    more = (config.use_dora, config.use_rslora, config.rank_pattern, config.alpha_pattern)
    if any((*more, config.modules_to_save, config.trainable_token_indices)):
        return None
    return float(config.lora_alpha / config.r)
