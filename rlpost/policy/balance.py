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
    """Expert load of some tokens; a token counts once for each completion and each layer."""

    chosen_E: Tensor
    """[E] tokens that chose each expert."""
    probability_E: Tensor
    """[E] sum of the routers' probabilities, with gradient."""
    tokens: Tensor
    """Number of tokens."""

    def loss_within(self, whole: Load) -> Tensor:
        """These tokens' part of the balance loss of the `whole` update."""
        share_E = whole.chosen_E / whole.tokens
        return len(share_E) * (share_E * self.probability_E).sum() / whole.tokens


@dataclass
class RouterLogits:
    """The routers' logits of one forward pass, one tensor a layer and pass of the model."""

    layers: list[list[Tensor]] = field(default_factory=list)


class Balance:
    """The balance loss of one model."""

    def __init__(self, routers: list[tuple[nn.Module, int]], chosen: int, coefficient: float) -> None:
        """Use `balance_of` to make one.

        Args:
            routers: each module whose output holds router logits, and their index in it.
            chosen: experts a token is sent to.
            coefficient: of the loss.
        """
        self.coefficient = coefficient
        self._routers = routers
        self._chosen = chosen

    @contextmanager
    def recording(self) -> Iterator[RouterLogits]:
        """Record the router logits of the model's forward passes inside, as it is trained.

        A teacher on the same weights (the model itself, or another adapter) reads in evaluation mode, within the pass
        of the one that it teaches, and is no load of the update.
        """
        recorded = RouterLogits([[] for _ in self._routers])

        def hook(layer: int, index: int) -> Any:
            def keep(router: nn.Module, _: Any, output: Any) -> None:
                if router.training:
                    recorded.layers[layer].append(output[index] if isinstance(output, tuple | list) else output)

            return keep

        hooks = [m.register_forward_hook(hook(at, index)) for at, (m, index) in enumerate(self._routers)]
        try:
            yield recorded
        finally:
            for one in hooks:
                one.remove()

    def load(self, recorded: RouterLogits, batch: Batch) -> Load:
        """The expert load of a batch."""
        total: Load | None = None
        for layer in recorded.layers:
            # A layer that is skipped, or shared, would not fit the passes.
            assert len(layer) == len(batch.passes), (len(layer), len(batch.passes))
            for logits, p in zip(layer, batch.passes, strict=True):
                own = self._of(widen(logits.reshape(-1, logits.shape[-1])), p.copies_BT.flatten())
                total = own if total is None else _sum(total, own)
        assert total is not None
        return total

    def empty(self, device: torch.device) -> Load:
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
    """The balance loss of the model; None where its router logits cannot be read.

    Args:
        model: a transformers causal language model, with or without adapters.
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
