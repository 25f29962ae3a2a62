"""What makes a step of a gradient: AdamW, AdamW with moments of 8 bits, Muon (docs/adr/0022).

Muon and moments of 8 bits are for the matrices of a model's layers. Embeddings and the output head, whose rows have no
gradient where a token does not occur, gains, biases, value heads and stacked experts have AdamW in float32 beside them.

Low-rank factors are matrices of layers too: x -> Ax -> B(Ax) are two linear layers in a row. Muon's step is the
steepest descent under the spectral norm of a layer's own matrix, so it is taken for A and B each, and scaled to AdamW's
length by the longer side of each; their product's step is not orthogonal. A has no gradient while B is zero, and Muon
then leaves it as it is, as AdamW does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.errors import RecipeError
from rlpost.policy.sharded import apart, is_sharded, like
from rlpost.train.params import OptimizerName

MOMENTUM = 0.95
"""Of Muon, by Nesterov (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""


def must_be_installed(name: OptimizerName, where: str) -> None:
    """Refuse an optimiser whose package is missing.

    Raises:
        RecipeError: with the command that installs the package.
    """
    if name is OptimizerName.adamw_8bit and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"{where}: {name} needs the package bitsandbytes - pip install 'rlpost[bnb]'")


class Optimizer:
    """The optimiser of some parameters: one for the matrices of layers, one for all else, or one for both."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        layers: Set[str],
        name: OptimizerName,
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """Prepare; no moments are made before the first step.

        Args:
            named: the parameters.
            layers: names of those that are matrices of layers.
            name: the optimiser of `layers`.
            betas: of AdamW.
            weight_decay: on matrices only; gains and biases are left alone.
        """
        self._named = named
        own = set() if name is OptimizerName.adamw else layers
        chosen = [p for n, p in named.items() if n in own]
        rest = [p for n, p in named.items() if n not in own]
        matrices = [p for p in rest if p.ndim >= 2]
        others = [p for p in rest if p.ndim < 2]
        # The rate is set at every step.
        self._parts: list[torch.optim.Optimizer] = []
        assert not any(is_sharded(p) for p in chosen), "refused with the recipe"
        if chosen and name is OptimizerName.muon:
            self._parts.append(_muon(chosen, weight_decay))
        elif chosen:
            self._parts.append(_adamw_8bit(chosen, betas, weight_decay))
        if rest:
            groups = [
                *({"params": some, "weight_decay": weight_decay} for some in apart(matrices)),
                *({"params": some, "weight_decay": 0.0} for some in apart(others)),
            ]
            self._parts.append(torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True))

    def step(self, rate: float) -> None:
        """Change the parameters by their gradients, at this learning rate."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        """Moments and counts, keyed `parameter/what`; a number becomes a tensor without axes."""
        return {
            f"{name}/{what}": torch.as_tensor(value)
            for name, p in self._named.items()
            for part in self._parts
            for what, value in part.state.get(p, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors()` returned."""
        found: dict[nn.Parameter, dict[str, Any]] = {}
        for key, value in tensors.items():
            name, what = key.rsplit("/", 1)
            p = self._named[name]
            # A count that is a tensor too: a fused optimiser needs it on the parameter's device.
            number = value.ndim == 0 and not value.is_floating_point()
            moved = like(value, p) if value.shape == p.shape else value
            found.setdefault(p, {})[what] = int(value) if number else moved.to(p.device).clone()
        for part in self._parts:
            part.state.clear()
            part.state.update({p: found[p] for group in part.param_groups for p in group["params"] if p in found})


def _muon(matrices: list[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        matrices, lr=0.0, weight_decay=weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )


def _adamw_8bit(matrices: list[nn.Parameter], betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    # It computes in float32, and would round a wider weight without a word.
    assert all(p.dtype == torch.float32 for p in matrices), "trained weights are float32"
    found: torch.optim.Optimizer = AdamW8bit(matrices, lr=0.0, betas=betas, weight_decay=weight_decay)
    return found
