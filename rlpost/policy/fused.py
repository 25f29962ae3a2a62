"""One decoding step of a pre-norm transformer in few operations: the model's own weights, packed once a version.

A transformers layer runs some forty small operations a token and four to seven products; at the sizes of a decoding
step most of its time goes into calling them. Here the projections that read the same input are one product (q, k, v;
gate, up), a norm's weight is multiplied into the product behind it, an adapter is added to its layer's weight, and on a
CPU the weights lie as oneDNN wants them. Attention and cache are those of the flat decoder.

What is recognised: RMSNorm, linear q, k, v (with or without biases and head norms), rotary positions, SwiGLU and
residuals, with every parameter accounted for. Anything else keeps the model's own forward (`NotRecognised` says why),
and fused_check.py compares the two at load.

Axes: B rows, D hidden width, H query heads, K key heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlpost.objectives.ragged import widen
from rlpost.policy import adapters
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.cache import PromptedLayer, PromptedLayout
from rlpost.policy.fused_blocks import Affine, CompiledStep, FusedBlock, TorchStep, compiled_serves
from rlpost.policy.policy import Policy
from rlpost.policy.recognise import NotRecognised, linear_of, norm_of, part, window_of
from rlpost.policy.tile_attention import Heads

LARGEST = 2**30
"""Bytes of packed weights, at most: beyond, products take the time and a second copy is not worth its memory."""

FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles depend on the position alone, not on the longest row."""


class FusedModel:
    """A model's decoding step with its weights of one version."""

    def __init__(self, model: Any, *, bfloat16: bool = False) -> None:
        """Pack the weights of a model.

        Args:
            model: a transformers causal language model, or a peft model around one.
            bfloat16: products run in it, as under autocast; else in the weights' precision.

        Raises:
            NotRecognised: the model has something that is not recognised, or is too large.
        """
        reader = _Reader(model)
        lm = reader.lm
        trunk = lm.base_model
        self.bytes = sum(p.numel() for p in lm.parameters()) * (2 if bfloat16 else lm.dtype.itemsize)
        if self.bytes > LARGEST:
            raise NotRecognised(f"{self.bytes / 2**30:.1f} GiB of weights are more than a second copy is worth")
        with torch.no_grad():
            self._embedding = reader.table(part(trunk, "embed_tokens"))
            blocks = [reader.block(layer) for layer in part(trunk, "layers")]
            norm, eps = reader.norm(part(trunk, "norm"))
            head = reader.linear([lm.get_output_embeddings()], norm)
            dtype = torch.bfloat16 if bfloat16 else lm.dtype
            self._step: CompiledStep | TorchStep
            if compiled_serves(blocks, dtype):
                self._step = CompiledStep(blocks, head, eps, dtype)
            else:
                self._step = TorchStep(blocks, head, eps, dtype)
        self._rotary = part(trunk, "rotary_emb")
        self._table: tuple[Tensor, Tensor] | None = None
        """[positions, d] cosines and sines that have been needed so far, where they depend on nothing else."""
        reader.all_read()

    def step(
        self, ids_B: Tensor, position_B: Tensor, layers: Sequence[PromptedLayer], layout: PromptedLayout
    ) -> Tensor:
        """[B, V] logits after one more token a row, which is added to the cache."""
        x = widen(F.embedding(ids_B, self._embedding))
        return self._step(x, *self._angles(x, position_B), layers, layout)

    def _angles(self, x: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B, d] cosines and sines of the rows' positions."""
        if getattr(self._rotary, "rope_type", None) not in FIXED:
            cos, sin = self._rotary(x[:, None], position_B[:, None])
            return cos[:, 0], sin[:, 0]
        needed = int(position_B.max()) + 1
        if self._table is None or len(self._table[0]) < needed:
            every = torch.arange(2 * needed, device=x.device)[None]
            cos, sin = self._rotary(x[:1, None], every)
            self._table = cos[0], sin[0]
        cos, sin = self._table
        return cos.index_select(0, position_B), sin.index_select(0, position_B)


def fused_model(policy: Policy) -> FusedModel | None:
    """The policy's weights packed, or None where its adapter has something that is not recognised."""
    try:
        return FusedModel(policy.model, bfloat16=policy.in_bfloat16)
    except NotRecognised:
        return None


class _Reader:
    """Reads a model's weights, and knows which parameters nobody has read."""

    def __init__(self, model: Any) -> None:
        self.lm = model.get_base_model() if adapters.are_in(model) else model
        self._adapters = adapters.parts(model, adapters.POLICY) if adapters.are_in(model) else []
        others = set(model.peft_config).difference(self._adapters) if adapters.are_in(model) else set()
        self._left = {
            id(p): n for n, p in self.lm.named_parameters() if not any(adapters.belongs(n, other) for other in others)
        }

    def all_read(self) -> None:
        """Raise NotRecognised if a parameter, a buffer or a hook is left that the step would ignore."""
        if self._left:
            raise NotRecognised(f"{next(iter(self._left.values()))} has no place in the fused step")
        for name, module in self.lm.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise NotRecognised(f"{name} has a hook")
            if any(True for _ in module.buffers(recurse=False)) and module is not self.lm.base_model.rotary_emb:
                raise NotRecognised(f"{name} has a buffer")

    def table(self, module: Any) -> Tensor:
        """The embedding's weight."""
        if type(module) is not nn.Embedding:
            raise NotRecognised(f"the embedding is {type(module).__name__}")
        return self._take(module.weight)

    def norm(self, module: Any) -> tuple[Tensor, float]:
        """The weight and ε of an RMSNorm."""
        weight, eps = norm_of(module)
        return self._take(weight), eps

    def linear(self, modules: Sequence[Any], norm: Tensor | None = None) -> Affine:
        """Linear layers of one input as one, after a norm with that weight."""
        found = [self._weight(m) for m in modules]
        weight = torch.cat([w for w, _ in found]) if len(found) > 1 else found[0][0]
        if norm is not None:
            weight = weight * norm
        biases = [b for _, b in found]
        if all(b is None for b in biases):
            return Affine(weight, None)
        full = [w.new_zeros(len(w)) if b is None else b for w, b in found]
        return Affine(weight, torch.cat(full))

    def block(self, layer: Any) -> FusedBlock:
        """One layer; attribute names as in Llama and the families that follow it."""
        attention, mlp = part(layer, "self_attn"), part(layer, "mlp")
        first, first_eps = self.norm(part(layer, "input_layernorm"))
        second, second_eps = self.norm(part(layer, "post_attention_layernorm"))
        width = int(part(attention, "head_dim"))
        q, k, v = (part(attention, f"{name}_proj") for name in "qkv")
        norms = None
        if getattr(attention, "q_norm", None) is not None:
            norms = self.norm(attention.q_norm), self.norm(part(attention, "k_norm"))
        return FusedBlock(
            self.linear([q, k, v], first),
            self.linear([part(attention, "o_proj")]),
            self.linear([part(mlp, "gate_proj"), part(mlp, "up_proj")], second),
            self.linear([part(mlp, "down_proj")]),
            (first_eps, second_eps),
            norms,
            AttentionOptions(part(attention, "scaling"), window_of(attention)),
            Heads(linear_of(q).out_features // width, linear_of(k).out_features // width, width),
        )

    def _weight(self, module: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear layer, with the policy's adapter added."""
        base = linear_of(module)
        weight, bias = self._take(base.weight), None if base.bias is None else self._take(base.bias)
        for name in self._adapters if adapters.is_lora(module) else ():
            if name in module.lora_A:
                for side in (module.lora_A, module.lora_B):
                    self._take(side[name].weight)
                weight = weight + module.get_delta_weight(name)
        return weight, bias

    def _take(self, parameter: Tensor) -> Tensor:
        self._left.pop(id(parameter), None)
        return parameter.detach()
