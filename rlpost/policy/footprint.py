"""How much memory a model takes, by its configuration alone: weights, what training keeps, what sampling keeps.

Layers are built on the meta device, which holds no numbers. What trunk.py keeps for the backward pass is counted by the
shapes of its layers; of a model that keeps its own forward, by running it there.

Axes: T tokens, D hidden width, H query heads, K key heads, F width of the feed-forward part, d of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlpost.kernels.build import why_none
from rlpost.policy import adapters
from rlpost.policy.fused import LARGEST
from rlpost.policy.logprobs import LOGITS_AT_ONCE
from rlpost.policy.params import Model
from rlpost.policy.recognise import NotRecognised, layer_matrices
from rlpost.policy.tile_attention import BLOCK, KEPT_KEYS
from rlpost.policy.trunk import Block, Trunk

SINGLE = 4
"""Bytes of a float32."""
PROBE = 128
"""Tokens of the rows that a model's own forward is measured on: so many, and twice."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model, alone or with an adapter."""

    base: int
    """Weights without an adapter."""
    adapter: int
    matrices: tuple[int, ...]
    """Sizes, in numbers, of the trained matrices of layers; the optimiser keeps moments of each in its own form."""
    others: int
    """Trained numbers elsewhere."""
    kept: float
    """A token of a pass, until its backward pass."""
    at_work: float
    """A token of a pass beside that, in the layer whose turn it is, forward or backward."""
    joined: int
    """The largest gradient of weights that are one product."""
    halves: int
    """Copies of the weights in bfloat16 that a pass holds."""
    read: float
    """A token of a pass without gradient, in the layer whose turn it is."""
    cached: int
    """A token in the decoding cache."""
    packed: int
    """Weights packed for decoding; 0 where they are not."""
    score: int
    """A token of a pass, of each key that it sees in a row of up to `KEPT_KEYS`; 0 where scores are not kept."""
    vocabulary: int
    logit: int
    """One logit with what its gradient takes."""

    @property
    def trained(self) -> int:
        """Trained numbers."""
        return sum(self.matrices) + self.others

    def a_token(self, longest: int) -> float:
        """Bytes a token of a pass over rows of about `longest` tokens."""
        keys = (longest + BLOCK) / 2 if longest <= KEPT_KEYS else 0
        return self.kept + self.at_work + self.score * keys

    def head(self, positions: int) -> int:
        """Logits at so many positions, with their gradients; beyond `LOGITS_AT_ONCE` a tile at a time."""
        logits = positions * self.vocabulary
        return self.logit * (logits if logits <= LOGITS_AT_ONCE else LOGITS_AT_ONCE // 4)


def footprint(config: Any, settings: Model, *, bfloat16: bool, cpu: bool) -> Footprint:
    """Of the model of a recipe, to be trained.

    Args:
        config: the model's configuration in transformers.
        settings: the recipe's `model` section.
        bfloat16: the precision, already decided.
        cpu: it runs on a CPU, where layers may be written out and compiled.
    """
    model = _built(config, settings)
    lm = model.get_base_model() if adapters.are_in(model) else model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    layers = layer_matrices(lm, trained)
    base = sum(p.numel() for n, p in model.named_parameters() if not adapters.belongs(n, adapters.POLICY))
    of_adapter = sum(p.numel() for n, p in model.named_parameters() if adapters.belongs(n, adapters.POLICY))
    size = 2 if bfloat16 and settings.lora is not None else SINGLE
    product = 2 if bfloat16 else SINGLE
    text = config.get_text_config()
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    head = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    compiled = cpu and settings.fast and not why_none()
    kept, at_work, joined = _layers(model, settings, product, cpu=cpu)
    written = joined > 0
    # Recomputed layers keep them one at a time.
    scored = 1 if settings.gradient_checkpointing else text.num_hidden_layers
    widest = max((p.numel() for p in lm.parameters() if p.ndim == 2), default=0)
    # Final states, those at scored positions, and their gradients.
    ends = 6 * text.hidden_size * SINGLE
    cached = 2 * heads * head * text.num_hidden_layers * (SINGLE if cpu else product)
    packed = base * (product if written else 0)
    return Footprint(
        base=base * size,
        adapter=of_adapter * SINGLE,
        matrices=tuple(p.numel() for n, p in trained.items() if n in layers),
        others=sum(p.numel() for n, p in trained.items() if n not in layers),
        kept=kept + ends,
        at_work=at_work,
        joined=(joined or widest) * SINGLE if settings.lora is None else 0,
        halves=base * 2 if bfloat16 and settings.lora is None else 0,
        read=at_work,
        cached=cached,
        packed=packed if packed <= LARGEST else 0,
        score=0 if (compiled and written) or not cpu else SINGLE * text.num_attention_heads * scored,
        vocabulary=int(text.vocab_size),
        logit=product if compiled and written else 3 * SINGLE + (2 if bfloat16 else 0),
    )


def _built(config: Any, settings: Model) -> Any:
    """The model on the meta device, with its adapter."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        if settings.lora is None:
            return model
        return adapters.add_policy_adapter(model.requires_grad_(False), settings.lora)


def _layers(model: Any, settings: Model, product: int, *, cpu: bool) -> tuple[float, float, int]:
    """Bytes a token that all layers keep, and that one works with; and numbers of the largest joined weight, or 0."""
    lm = model.get_base_model() if adapters.are_in(model) else model
    if cpu and settings.fast and not settings.gradient_checkpointing:
        try:
            trunk = Trunk(lm, bfloat16=product == 2)
        except NotRecognised:
            pass
        else:
            blocks = trunk.blocks
            return (
                sum(_kept(b, product) for b in blocks),
                max(_at_work(b, product) for b in blocks),
                max(j.weight_OI.numel() for b in blocks for j in b.products),
            )
    model.train()
    whole = _own_forward(model, product, checkpointing=False)
    one = whole / lm.config.get_text_config().num_hidden_layers
    if not settings.gradient_checkpointing:
        return whole, one, 0
    return _own_forward(model, product, checkpointing=True), 2 * one, 0


def _kept(block: Block, product: int) -> float:
    """What trunk.py keeps of a layer: its input, the middle, and products in their own precision."""
    width, inner, *_ = block.widths
    attended = block.heads.query * block.heads.width
    ranks = sum(a.a.shape[0] for j in block.products for layer in j.layers for a in layer.adapters)
    qkv = sum(len(layer.weight) for layer in block.into.layers)
    normed = qkv - block.heads.key * block.heads.width if block.head_norms is not None else 0
    products = qkv + attended + 2 * inner + ranks + normed
    return SINGLE * (2 * width + block.heads.query) + product * products


def _at_work(block: Block, product: int) -> float:
    """Beside it in the backward pass of the feed-forward part: three gradients of its width, and four of the stream."""
    width, inner, *_ = block.widths
    return product * 4 * inner + SINGLE * 4 * width


def _own_forward(model: Any, product: int, *, checkpointing: bool) -> float:
    """Bytes a token that the model's own forward keeps, without scores, which grow with a row's square."""
    lm = model.get_base_model() if adapters.are_in(model) else model
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.enable_input_require_grads()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def a_token(tokens: int) -> float:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, tokens, tokens, device="meta")
        with _counting() as found, torch.autocast("cpu", torch.bfloat16, enabled=product == 2):
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return sum(size for storage, size in found.items() if storage not in weights) / tokens

    return 2 * a_token(PROBE) - a_token(2 * PROBE)


@contextmanager
def _counting() -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd saves inside."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            storage = x.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
