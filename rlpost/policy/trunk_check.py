"""The check at load of layers in one operation each: states and gradients beside those of the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf

import torch
from torch import Tensor, nn

from rlpost.policy.check import FAILURES
from rlpost.policy.fused_check import changed
from rlpost.policy.policy import Policy
from rlpost.policy.recognise import NotRecognised
from rlpost.policy.trunk import Trunk
from rlpost.types import Group

EXACT = 1e-4
"""Largest difference, as a share of the length of the model's own states or gradients, that counts as rounding."""
ROUGH = 5e-2
"""The same of bfloat16 beside float32, where the model's own forward is as near."""
Gradients = dict[str, Tensor | None]
"""States, and gradients by name; None where there is none."""


def why_no_trunk(policy: Policy, groups: Sequence[Group]) -> str:
    """Why a policy's flat rows may not be read layer by layer in one operation each, or empty if they may.

    Compared are the states after all tokens, and gradients of the embedding, of every parameter of one axis, of every
    adapter, and of all parameters of the first and the last layer, which go through every operation of every layer.

    Args:
        policy: it decides by itself how it reads rows, which this leaves as it was.
        groups: some prompts with completions of random tokens.
    """
    if policy.device.type != "cpu":
        return "it is not on a CPU"
    with as_it_was(policy):
        policy.eval()  # dropout of an adapter
        layout = policy.batch(groups).passes[0].layout
        if layout is None:
            return "it does not read flat rows"
        try:
            if not Trunk(policy.causal_lm).serves(layout):
                return "its attention is more than a softmax of scores"
        except NotRecognised as reason:
            return str(reason)
        policy.model.requires_grad_(True)
        with changed(policy.causal_lm):
            try:
                return _what_differs(policy, groups)
            except FAILURES as error:
                # Parts that have the names and not the shapes (rotary positions of half a head) fail in many ways.
                return f"its layers do not run in one operation each ({type(error).__name__})"


def _what_differs(policy: Policy, groups: Sequence[Group]) -> str:
    """By more than rounding, or empty: in the weights' precision, and in bfloat16 if products run in it."""
    halves = policy.in_bfloat16

    def found(half: bool, trunk: bool) -> Gradients:
        policy.in_bfloat16, policy.trunk, policy.blocks = half, trunk, trunk
        return _states_and_gradients(policy, groups)

    with _widened(policy):
        own = found(False, False)
        different = _beyond(gaps(own, found(False, True)), EXACT)
    if different or not halves:
        return different
    # Sums in bfloat16 may be far from those in float32, in the model's own forward too: no further than there.
    least = {name: max(ROUGH, 2 * gap) for name, gap in gaps(own, found(True, False)).items()}
    return _beyond(gaps(own, found(True, True)), least)


@contextmanager
def _widened(policy: Policy) -> Iterator[None]:
    """Weights in half precision are float32 inside."""
    narrow = {p: p.dtype for p in policy.model.parameters() if p.dtype.itemsize < 4}
    for p in narrow:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, dtype in narrow.items():
            p.data = p.data.to(dtype)


@contextmanager
def as_it_was(policy: Policy) -> Iterator[None]:
    """How a policy reads rows, what it trains, and whether it does, are restored afterwards."""
    before = policy.trunk, policy.blocks, policy.kernels, policy.in_bfloat16, policy.training
    wanted = {n: p.requires_grad for n, p in policy.model.named_parameters()}
    try:
        yield
    finally:
        policy.trunk, policy.blocks, policy.kernels, policy.in_bfloat16, training = before
        policy.train(training)
        for name, p in policy.model.named_parameters():
            p.requires_grad_(wanted[name])


def gaps(own: Gradients, other: Gradients) -> dict[str, float]:
    """Lengths of differences, as shares of the length of one's own; infinite where one is missing."""

    def gap(a: Tensor | None, b: Tensor | None) -> float:
        if a is None or b is None:
            return 0.0 if a is b else inf
        return float((a - b).norm() / a.norm().clamp_min(1e-30))

    return {name: gap(a, other[name]) for name, a in own.items()}


def _beyond(gaps: Mapping[str, float], most: float | Mapping[str, float]) -> str:
    """The first that is larger than it may be, or empty."""
    for name, gap in gaps.items():
        if gap == inf:
            return f"its gradient of {name} is missing in one operation a layer"
        if not gap < (most if isinstance(most, float) else most[name]):
            return f"in one operation a layer, {name} differs from that of its own forward by {gap:.1e}"
    return ""


def _states_and_gradients(policy: Policy, groups: Sequence[Group]) -> Gradients:
    """By name; None where there is no gradient."""
    with torch.enable_grad():
        states = policy._states(policy.batch(groups))
        cotangent = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
        named = _checked(policy)
        gradients = torch.autograd.grad((states * cotangent).sum(), list(named.values()), allow_unused=True)
    return {"states": states.detach(), **dict(zip(named, gradients, strict=True))}


def _checked(policy: Policy) -> dict[str, nn.Parameter]:
    layers = policy.causal_lm.base_model.layers
    ends = {id(p) for layer in (layers[0], layers[-1]) for p in layer.parameters()}
    embedding = id(policy.causal_lm.get_input_embeddings().weight)
    return {
        n: p
        for n, p in policy.model.named_parameters()
        if p.ndim == 1 or "lora_" in n or id(p) in ends or id(p) == embedding
    }
