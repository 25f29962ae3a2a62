"""A reference that follows the policy: every so often share·policy + (1 − share)·reference (TR-DPO, arXiv:2404.09656).

With full fine-tuning it is a second model whose weights are mixed; with LoRA, an adapter on the policy's base whose
products are. The adapter has room for several times the policy's rank, since mixing stacks ranks; what does not fit
is cut off, and how much that was is said.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlpost.groups import Group
from rlpost.objectives.preference_modifiers import mix, mix_lora, recompressed
from rlpost.policy import adapters
from rlpost.policy.load import load_policy
from rlpost.policy.policy import Policy
from rlpost.policy.reference import same_base
from rlpost.policy.score import logprobs
from rlpost.recipe.schema import Model

ROOM = 4
"""Times the policy's rank that the reference's adapter may have."""


class Following:
    """A reference with weights of its own, in the shape that mixing needs."""

    def __init__(self, policy: Policy, checkpoint: Path, settings: Model) -> None:
        """Begin as what `checkpoint` holds; with LoRA, that is the policy's base or an adapter on it."""
        self._policy = policy
        self._frozen: Policy | None = None
        if not policy.has_adapter:
            # As if to be trained: an adapter is merged into the weights then, as it was in the policy's.
            self._frozen = load_policy(checkpoint, settings, bfloat16=policy.in_bfloat16, device=policy.device)
            self._frozen.requires_grad_(False)
            return
        config = copy.deepcopy(policy.model.peft_config[adapters.POLICY])
        self._rank = config.r * ROOM
        config.r, config.lora_alpha = self._rank, config.lora_alpha * ROOM
        policy.model.add_adapter(adapters.REFERENCE, config)
        self._write(self._padded(_adapter_of(checkpoint, policy)))

    def logprobs(self, groups: Sequence[Group], temperature: float = 1.0) -> Tensor:
        """[N] log-probability of every action of the groups, without gradient, on the CPU."""
        if self._frozen is not None:
            return logprobs(self._frozen, groups, temperature=temperature)
        with self._policy.acting_as(adapters.REFERENCE):
            return logprobs(self._policy, groups, temperature=temperature)

    @torch.no_grad()
    def follow(self, share: float) -> float:
        """Move towards the policy; returns the largest relative error of a product that had to be cut to its room."""
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
        """What it consists of, by name."""
        if self._frozen is not None:
            return {name: p.detach() for name, p in self._frozen.named_parameters()}
        return adapters.adapter_state(self._policy.model, adapters.REFERENCE)

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Go on from `weights()`."""
        if self._frozen is None:
            self._write(weights)
            return
        for name, p in self._frozen.named_parameters():
            p.copy_(weights[name])

    def _write(self, state: dict[str, Tensor]) -> None:
        adapters.add_adapter(self._policy.model, adapters.REFERENCE, state)

    def _padded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors of fewer ranks than there is room for, filled up with zeros."""
        full = {}
        for name, x in state.items():
            axis = 0 if "lora_A" in name else 1
            missing = list(x.shape)
            missing[axis] = self._rank - x.shape[axis]
            full[name] = torch.cat([x, x.new_zeros(missing)], axis)
        return full


def _adapter_of(checkpoint: Path, policy: Policy) -> dict[str, Tensor]:
    """The weights of a checkpoint's adapter on the policy's base; zeros for the base itself."""
    if same_base(checkpoint, policy):
        saved: dict[str, Tensor] = load_file(checkpoint / "adapter_model.safetensors")
        return saved
    assert str(checkpoint) == policy.base, f"{checkpoint} is no adapter on {policy.base}"
    return {name: torch.zeros_like(x) for name, x in adapters.adapter_state(policy.model, adapters.POLICY).items()}
