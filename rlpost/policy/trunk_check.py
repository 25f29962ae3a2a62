"""The check at load of layers in one operation each: states and gradients beside those of the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
"""The same in bfloat16, in which two orders of the same sums differ by one or two hundredths."""


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
    with _as_it_was(policy):
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
        halves = [False] * (policy.causal_lm.dtype in (torch.float32, torch.float64)) + [True] * policy.in_bfloat16
        with changed(policy.causal_lm):
            return next(filter(None, (_why_not(policy, groups, half=half) for half in halves)), "")


def _why_not(policy: Policy, groups: Sequence[Group], *, half: bool) -> str:
    """What differs in bfloat16 or not, or empty."""
    policy.in_bfloat16 = half
    found = []
    for trunk in (False, True):
        policy.trunk = policy.blocks = trunk
        try:
            found.append(_states_and_gradients(policy, groups))
        except FAILURES as error:
            # Parts that have the names and not the shapes (rotary positions of half a head) fail in many ways.
            if not trunk:
                raise
            return f"its layers do not run in one operation each ({type(error).__name__})"
    own, other = found
    return _difference(own, other, ROUGH if half else EXACT)


@contextmanager
def _as_it_was(policy: Policy) -> Iterator[None]:
    """How a policy reads rows, what it trains, and whether it does, are restored afterwards."""
    before = policy.trunk, policy.blocks, policy.in_bfloat16, policy.training
    wanted = {n: p.requires_grad for n, p in policy.model.named_parameters()}
    try:
        yield
    finally:
        policy.trunk, policy.blocks, policy.in_bfloat16, training = before
        policy.train(training)
        for name, p in policy.model.named_parameters():
            p.requires_grad_(wanted[name])


def _difference(found: Mapping[str, Tensor | None], others: Mapping[str, Tensor | None], most: float) -> str:
    """What differs by more, or empty."""
    for name, own in found.items():
        other = others[name]
        if own is None or other is None:
            if own is not other:
                return f"its gradient of {name} is missing in one operation a layer"
            continue
        gap = float((own - other).norm() / own.norm().clamp_min(1e-30))
        if not gap < most:
            return f"in one operation a layer, {name} differs from that of its own forward by {gap:.1e}"
    return ""


def _states_and_gradients(policy: Policy, groups: Sequence[Group]) -> dict[str, Tensor | None]:
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
