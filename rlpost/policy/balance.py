"""The balance loss of mixture-of-experts models: without it, training lets a few experts take all tokens.

E·Σ_e f_e·P_e over an update (Switch Transformers, arXiv:2101.03961, equations 4 to 6, as transformers has it): f_e is
the share of tokens, over all layers, that choose expert e, and P_e the mean probability that their routers give it.
The shares carry no gradient, but they are of the whole update; so they are counted first, and each part then adds
E·Σ_e f_e·(its tokens' probabilities)/(all tokens), whose sum is the loss however the update is cut.

Axes: E experts, M tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.objectives.ragged import widen
from rlpost.policy.batch import Batch

RECORDED = "router_logits"
"""What transformers calls the routers' logits among the outputs that a model can record."""


@dataclass
class Load:
    """What the routers of some tokens did; tokens count once for each completion and each layer."""

    chosen_E: Tensor
    """How many of them chose each expert."""
    probability_E: Tensor
    """The sum of their probabilities of it, with gradient."""
    tokens: Tensor
    """How many there were."""

    def loss_within(self, whole: Load) -> Tensor:
        """What these tokens add to the loss of the `whole` update that they belong to."""
        share_E = whole.chosen_E / whole.tokens
        return len(share_E) * (share_E * self.probability_E).sum() / whole.tokens


@dataclass
class Heard:
    """The routers' logits of one forward pass, one tensor a layer and pass of the model."""

    layers: list[list[Tensor]] = field(default_factory=list)


class Balance:
    """Listens to a model's routers."""

    def __init__(self, routers: list[tuple[nn.Module, int]], chosen: int, coefficient: float) -> None:
        """Use `balance_of` to make one.

        Args:
            routers: each module whose output has the logits, and where in it.
            chosen: experts a token is sent to.
            coefficient: of the loss.
        """
        self.coefficient = coefficient
        self._routers = routers
        self._chosen = chosen

    @contextmanager
    def listening(self) -> Iterator[Heard]:
        """Inside, forward passes of the model leave their routers' logits."""
        heard = Heard([[] for _ in self._routers])

        def hook(layer: int, index: int) -> Any:
            def keep(_: nn.Module, __: Any, output: Any) -> None:
                heard.layers[layer].append(output[index] if isinstance(output, tuple | list) else output)

            return keep

        hooks = [m.register_forward_hook(hook(at, index)) for at, (m, index) in enumerate(self._routers)]
        try:
            yield heard
        finally:
            for one in hooks:
                one.remove()

    def load(self, heard: Heard, batch: Batch) -> Load:
        """What the routers did with a batch."""
        total: Load | None = None
        for layer in heard.layers:
            # A layer that is skipped, or shared, would not fit the passes.
            assert len(layer) == len(batch.passes), (len(layer), len(batch.passes))
            for logits, p in zip(layer, batch.passes, strict=True):
                own = self._of(widen(logits.reshape(-1, logits.shape[-1])), p.copies_BT.flatten())
                total = own if total is None else _sum(total, own)
        assert total is not None
        return total

    def nothing(self, device: torch.device) -> Load:
        """The load of no tokens."""
        zero = torch.zeros((), device=device)
        return Load(zero, zero, zero)

    def _of(self, logits_ME: Tensor, copies_M: Tensor) -> Load:
        weight_M = copies_M.to(logits_ME.dtype)
        probability_ME = logits_ME.softmax(-1)
        chosen = probability_ME.topk(self._chosen, dim=-1).indices
        chosen_E = torch.zeros_like(logits_ME[0]).index_add_(
            0, chosen.flatten(), weight_M.repeat_interleave(self._chosen)
        )
        return Load(chosen_E.detach(), weight_M @ probability_ME, weight_M.sum())


def _sum(a: Load, b: Load) -> Load:
    return Load(a.chosen_E + b.chosen_E, a.probability_E + b.probability_E, a.tokens + b.tokens)


def add(a: Load, b: Load) -> Load:
    """Both together, without gradient."""
    return Load(a.chosen_E + b.chosen_E, a.probability_E.detach() + b.probability_E.detach(), a.tokens + b.tokens)


def is_mixture(model: Any) -> bool:
    """Whether a transformers model routes tokens among experts."""
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def own_coefficient(model: Any) -> float | None:
    """The balance loss's weight that a model's configuration names."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef")]
    return next((float(x) for x in found if x is not None), None)


def balance_of(model: Any, coefficient: float) -> Balance | None:
    """What listens to the model's routers; None where their logits cannot be had.

    Args:
        model: a transformers causal language model, its layers dressed with adapters or not.
        coefficient: above 0.
    """
    config = model.config.get_text_config()
    chosen = next((n for name in ("num_experts_per_tok", "moe_k") if (n := getattr(config, name, None))), None)
    routers: dict[int, tuple[nn.Module, int]] = {}
    for owner in model.modules():
        recorded = (getattr(owner, "_can_record_outputs", None) or {}).get(RECORDED)
        for recorder in recorded if isinstance(recorded, list | tuple) else [recorded] if recorded else []:
            kind, where = getattr(recorder, "target_class", recorder), getattr(recorder, "layer_name", None) or ""
            for name, module in owner.named_modules():
                if isinstance(kind, type) and isinstance(module, kind) and where in name:
                    routers[id(module)] = (owner.get_submodule(name), getattr(recorder, "index", 0))
    if not routers or chosen is None:
        return None
    return Balance(list(routers.values()), int(chosen), coefficient)
