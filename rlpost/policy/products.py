"""Linear layers that read the same input, as one product: forward, and the gradients of input, weights and adapters.

Weights that are joined are moved next to each other in memory once, so that the joined matrix is a view of them: no
copy is made, and an optimiser's step changes both.

Axes: T tokens, I inputs, O outputs of all layers, o those of one, r an adapter's rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.policy import adapters
from rlpost.policy.fast_layers import prefers_onednn, product
from rlpost.policy.recognise import NotRecognised, linear_of


@dataclass(frozen=True)
class Adapter:
    """One low-rank adapter of a layer: scale · B(Ax) is added to its result."""

    a: Tensor
    """[r, I]."""
    b: Tensor
    """[o, r]."""
    scale: float


@dataclass(frozen=True)
class Layer:
    """One linear layer with the adapters that are active."""

    weight: Tensor
    """[o, I]."""
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()

    def parameters(self) -> list[Tensor]:
        """Weight, bias, and each adapter's A and B."""
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own + [x for adapter in self.adapters for x in (adapter.a, adapter.b)]


@dataclass
class Joined:
    """Layers of one input."""

    layers: Sequence[Layer]
    bfloat16: bool = False
    """The product of the layers' weights runs in it."""
    _weight: Tensor | None = field(default=None, repr=False)

    def parameters(self) -> list[Tensor]:
        """Of all layers."""
        return [p for layer in self.layers for p in layer.parameters()]

    @property
    def weight_OI(self) -> Tensor:
        """All weights, one below the other."""
        if self._weight is None:
            joined = adjacent([layer.weight for layer in self.layers])
            self._weight = joined.bfloat16() if self.bfloat16 else joined
        return self._weight

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        """X times the transpose of a weight."""
        if x.dtype == torch.float32 and x.device.type == "cpu" and len(x) and prefers_onednn():
            return product(x, weight)
        return nn.functional.linear(x, weight)

    def _slices(self) -> Iterator[tuple[Layer, slice]]:
        first = 0
        for layer in self.layers:
            yield layer, slice(first, first := first + len(layer.weight))

    def forward(self, x_TI: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[T, O], and what the gradients need besides the input."""
        y_TO, kept = self._times(x_TI, self.weight_OI), []
        for layer, at in self._slices():
            if layer.bias is not None:
                y_TO[:, at] += layer.bias
            for adapter in layer.adapters:
                low_Tr = x_TI @ adapter.a.t().to(x_TI.dtype)
                y_TO[:, at].addmm_(low_Tr, adapter.b.t().to(x_TI.dtype), alpha=adapter.scale)
                kept.append(low_Tr)
        return y_TO, kept

    def backward(
        self, grad_TO: Tensor, x_TI: Tensor, kept: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of the input, and of `parameters()` as far as they are wanted."""
        grad_TI, of_kept = self.input_gradient(grad_TO)
        return grad_TI, self.gradients(grad_TO, x_TI, kept, of_kept, wanted)

    def input_gradient(self, grad_TO: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[T, I], and the gradients of what `forward` kept."""
        grad_TI, of_kept = self._times(grad_TO, self.weight_OI.t()), []
        for layer, at in self._slices():
            for adapter in layer.adapters:
                grad_Tr = (grad_TO[:, at] @ adapter.b.to(grad_TO.dtype)).mul_(adapter.scale)
                grad_TI.addmm_(grad_Tr, adapter.a.to(grad_TO.dtype))
                of_kept.append(grad_Tr)
        return grad_TI, of_kept

    def gradients(
        self,
        grad_TO: Tensor,
        x_TI: Tensor,
        kept: Sequence[Tensor],
        of_kept: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """Of `parameters()`, as far as they are wanted, in the parameters' types."""
        found: list[Tensor | None] = []
        lows, of_lows, wants = iter(kept), iter(of_kept), iter(wanted)
        # One product for all weights; it is there to be read by the first that is wanted.
        every: Tensor | None = None
        for layer, at in self._slices():
            if wants_weight := next(wants):
                every = (grad_TO.t() @ x_TI).to(layer.weight.dtype) if every is None else every
            found.append(every[at] if wants_weight and every is not None else None)
            if layer.bias is not None:
                found.append(grad_TO[:, at].sum(0, dtype=layer.bias.dtype) if next(wants) else None)
            for adapter in layer.adapters:
                low_Tr, grad_Tr, own = next(lows), next(of_lows), grad_TO[:, at]
                found.append((grad_Tr.t() @ x_TI).to(adapter.a.dtype) if next(wants) else None)
                of_b = (own.t() @ low_Tr).to(adapter.b.dtype).mul_(adapter.scale) if next(wants) else None
                found.append(of_b)
        return found


def adjacent(weights: Sequence[Tensor]) -> Tensor:
    """[ΣO, I] the weights, one below the other in memory; they are moved there if they do not lie so.

    Args:
        weights: [O, I] each, of one type, on one device.
    """
    first = weights[0]
    if len(weights) == 1:
        return first.detach()
    end = first.data_ptr()
    for w in weights:
        if w.data_ptr() != end or not w.is_contiguous():
            break
        end += w.numel() * w.element_size()
    else:
        rows = sum(len(w) for w in weights)
        if first.untyped_storage().data_ptr() == weights[-1].untyped_storage().data_ptr():
            return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
    whole = torch.cat([w.detach() for w in weights])
    for w, part in zip(weights, whole.split_with_sizes([len(w) for w in weights]), strict=True):
        w.data = part
    return whole


def layer_of(module: Any) -> Layer:
    """A linear layer and its active adapters.

    Raises:
        NotRecognised: it is something else, or its adapters are more than a product (dropout, DoRA, merged).
    """
    base = linear_of(module)
    return Layer(base.weight, base.bias, tuple(_adapters(module)) if adapters.is_lora(module) else ())


def _adapters(module: Any) -> Iterator[Adapter]:
    from peft.tuners.lora import Linear

    if module.merged or type(module) is not Linear:
        raise NotRecognised("an adapter is merged or of another kind")
    if module.disable_adapters:
        return
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        dropout = module.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
            raise NotRecognised("an adapter has dropout")
        if name in module.lora_variant or module.lora_A[name].bias is not None or module.lora_B[name].bias is not None:
            raise NotRecognised("an adapter is more than two matrices")
        yield Adapter(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))
