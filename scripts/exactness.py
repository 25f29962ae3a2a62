"""How exact flat rows with shared prompts are, family by family, against each completion alone.

    python scripts/exactness.py            # every family
    python scripts/exactness.py llama gpt2

The other side of the comparison is the transformers model itself on one unpadded row a completion, eager
attention, without anything of rlpost. Models are tiny and random, windows shorter than the rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from families import FAMILIES, EndTokenOnly, tiny
from torch import Tensor

from rlpost.policy.attention import use_attention
from rlpost.policy.check import Exactness, check_exactness
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, completions


@dataclass(frozen=True)
class Gap:
    """How far flat rows are from rows alone."""

    logp: float
    """Largest difference of a log-probability, in nats."""
    gradient: float
    """‖difference‖ / ‖gradient‖ over all parameters, of a random combination of log-probabilities."""
    exact: Exactness
    """What the check at load says of this model."""


def sample_groups(vocabulary: int, seed: int = 1) -> list[Group]:
    """Groups of many shapes: tool turns in the middle, empty completions, a prompt of one token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (n,), generator=generator).tolist())

    def completion(acts: int, reads: int = 0, acts_again: int = 0) -> Completion:
        action = (True,) * acts + (False,) * reads + (True,) * acts_again
        return Completion(draw(len(action)), action)

    return [
        Group(draw(11), (completion(9), completion(4, 5, 6), completion(0), completion(14))),
        Group(draw(5), (completion(3), completion(17))),
        Group(draw(30), (completion(12), completion(1), completion(0, 3, 2))),
        Group(draw(1), (completion(8), completion(2))),
        Group(draw(7), (completion(10),)),
        Group(draw(4), (completion(0),)),
    ]


def alone_logp(model: Any, groups: Sequence[Group]) -> Tensor:
    """[N] log-probability of every action, one unpadded row a completion."""
    pieces = []
    for group in groups:
        for c in group.completions:
            logits = model(
                torch.tensor(np.concatenate([group.prompt, c.ids]), dtype=torch.long)[None], use_cache=False
            ).logits[0]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            before = torch.arange(len(c.ids)) + len(group.prompt) - 1
            logp = wide.log_softmax(-1)[before, torch.tensor(c.ids, dtype=torch.long)]
            pieces.append(logp[torch.tensor(c.action, dtype=torch.bool)])
    return torch.cat(pieces)


def gradient(logp_N: Tensor, model: Any) -> Tensor:
    """The gradient of Σ c_n·logp_n with random coefficients c, all parameters in one vector."""
    coefficient_N = torch.randn(len(logp_N), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = (coefficient_N * logp_N).sum()
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def measure(family: str, dtype: torch.dtype, share: bool = True) -> Gap:
    """Compare flat rows (prompts shared or not) with rows alone on a tiny model of `family`."""
    model = tiny(family, dtype)
    exact = check_exactness(model, EndTokenOnly())
    groups = sample_groups(model.get_output_embeddings().weight.shape[0])
    if not share:
        groups = [Group(g.prompt, (c,)) for g in groups for c in g.completions]
    use_attention(model, "eager")
    expected = alone_logp(model, groups)
    expected_gradient = gradient(expected, model)
    use_attention(model, "rlpost_flat")
    policy = Policy(model, EndTokenOnly(), flat=True, tiled=exact.tiled)
    found = policy(policy.batch(groups)).logp_N
    assert len(found) == sum(c.actions for c in completions(groups))
    difference = gradient(found, model) - expected_gradient
    return Gap(
        float((found - expected).detach().abs().max()),
        float(difference.norm() / expected_gradient.norm()),
        exact,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=", ".join(FAMILIES))
    columns = ("logp float32", "grad float32", "logp float64", "grad float64")
    print(f"{'family':14}" + "".join(f"{name:>14}" for name in columns) + "  flat  tiled")
    for family in parser.parse_args().families:
        single, double = measure(family, torch.float32), measure(family, torch.float64)
        errors = "".join(f"{x:14.1e}" for x in (single.logp, single.gradient, double.logp, double.gradient))
        print(f"{family:14}{errors}  {single.exact.flat!s:5} {single.exact.tiled}")


if __name__ == "__main__":
    main()
