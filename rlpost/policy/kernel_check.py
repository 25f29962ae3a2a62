"""The check at load of attention where segments lie: states and gradients beside those of tiles.

Tiles were compared with the model's own forward before (check.py). The gradient of the embedding goes through the
gradients of queries, keys and values of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlpost.policy.check import short_windows
from rlpost.policy.policy import Policy
from rlpost.policy.segment_attention import HALF, TILES, Kernels
from rlpost.policy.trunk_check import EXACT, ROUGH, Gradients, as_it_was, gaps
from rlpost.types import Group

FLEX, VARLEN = Kernels(flex=True), Kernels(varlen=True)


def exact_kernels(policy: Policy, groups: Sequence[Group]) -> tuple[Kernels, str]:
    """The kernels that a policy's flat rows may be attended in, and why not all that are meant for its device.

    Args:
        policy: it decides by itself how it reads rows, which this leaves as it was.
        groups: some prompts with completions of random tokens, some of them sharing one.
    """
    if policy.device.type != "cuda" or not policy.flat:
        return TILES, ""
    no_flex = why_not(policy, groups, FLEX)
    # FlashAttention computes in 16 bits alone.
    half = policy.in_bfloat16 or policy.causal_lm.dtype in HALF
    alone = [Group(g.prompt, (c,)) for g in groups for c in g.completions]
    no_varlen = why_not(policy, alone, VARLEN) if half else ""
    return Kernels(flex=not no_flex, varlen=half and not no_varlen), no_flex or no_varlen


def why_not(policy: Policy, groups: Sequence[Group], kernels: Kernels) -> str:
    """Why a policy's flat rows may not be attended in these kernels, or empty if they may."""
    with as_it_was(policy), short_windows(policy.causal_lm):
        policy.eval()  # dropout of an adapter
        policy.trunk = False
        policy.causal_lm.get_input_embeddings().weight.requires_grad_(True)
        try:
            return _what_differs(policy, groups, kernels)
        except Exception as error:
            # Each is compiled for the device, and compilers fail in their own ways: all of them mean tiles.
            line = (str(error).strip().splitlines() or [""])[0][:120]
            return f"{_name(kernels)} does not run on it ({type(error).__name__}: {line})"


def _what_differs(policy: Policy, groups: Sequence[Group], kernels: Kernels) -> str:
    """By more than rounding, or empty: in the weights' precision, and under bfloat16 if the policy runs in it."""
    halves = policy.in_bfloat16

    def found(half: bool, these: Kernels) -> Gradients:
        policy.in_bfloat16, policy.kernels = half, these
        return _states_and_gradient(policy, groups)

    wide = policy.causal_lm.dtype not in HALF
    tiles = found(False, TILES)
    if kernels.flex or not wide:
        # Weights of 16 bits have nothing finer to be compared with that would fit beside them.
        different = _beyond(gaps(tiles, found(False, kernels)), dict.fromkeys(tiles, EXACT if wide else ROUGH), kernels)
        if different or not halves or not wide:
            return different
    least = {name: max(ROUGH, 2 * gap) for name, gap in gaps(tiles, found(True, TILES)).items()}
    return _beyond(gaps(tiles, found(True, kernels)), least, kernels)


def _beyond(found: dict[str, float], most: dict[str, float], kernels: Kernels) -> str:
    """The first gap that is larger than it may be, or empty."""
    wrong = next((name for name, gap in found.items() if not gap < most[name]), None)
    return "" if wrong is None else f"with {_name(kernels)} its {wrong} differ by {found[wrong]:.1e}"


def _name(kernels: Kernels) -> str:
    return "FlexAttention" if kernels.flex else "varlen_attn"


def _states_and_gradient(policy: Policy, groups: Sequence[Group]) -> Gradients:
    """After all tokens, and of the embedding for a random combination of them."""
    embedding: Tensor = policy.causal_lm.get_input_embeddings().weight
    with torch.enable_grad():
        states = policy._states(policy.batch(groups))
        cotangent = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
        (gradient,) = torch.autograd.grad((states * cotangent).sum(), embedding)
    return {"states": states.detach(), "gradients": gradient}
