"""The seam behind which completions are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlpost.groups import Completion
from rlpost.policy.policy import Policy
from rlpost.recipe.schema import Sampling


class Engine(Protocol):
    """Samples completions of prompts from a policy."""

    def sync(self, policy: Policy) -> None:
        """Sample from `policy` as it is now."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        streams: Sequence[int],
        greedy: bool = False,
    ) -> list[tuple[Completion, ...]]:
        """`n` completions of each prompt.

        A completion depends on the policy, its prompt, its prompt's stream and its index among the n, and on
        nothing else: not on other prompts, on n, or on how many rows run at once.

        Args:
            prompts: token ids, none empty.
            n: completions a prompt, at least 1.
            sampling: how tokens are drawn.
            streams: one 64-bit seed a prompt.
            greedy: take the most likely token instead of drawing one; `sampling.temperature=0` does the same.

        Raises:
            EngineError: if a completion would not fit the model, or its logits are not numbers.
        """
        ...
