"""The seam behind which completions are sampled, and through which they are steered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rlpost.engine.params import Sampling
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Tokens


class Engine(Protocol):
    """Samples completions of prompts from a policy."""

    def sync(self, policy: Policy) -> None:
        """Sample from `policy` as it is now."""
        ...

    def generate(
        self,
        prompts: Sequence[Tokens],
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


class Steering(Protocol):
    """Beside the rows of one call: told every token, asked before each."""

    def weigh(self, logits_BV: Tensor, going_B: Tensor) -> Tensor:
        """[B, V] what to add to the rows' log-probabilities before a token is drawn; −inf leaves a token out.

        Args:
            logits_BV: of the next token, cut to the tokens there are.
            going_B: False for rows that have ended and are still in the batch; their weights are 0.

        Raises:
            EngineError: a row that goes on has no token left.
        """
        ...

    def append(self, ids_B: Tensor) -> None:
        """The token that each row was given."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Only these rows (ascending) go on."""
        ...


class Guide(Protocol):
    """Leads completions somewhere; of an engine, it needs every token's logits."""

    def begin(self, prompts: Sequence[Tokens], prompt_of_row: Sequence[int], limits: Sequence[int]) -> Steering:
        """Follow rows that are about to continue their prompts.

        Args:
            prompts: token ids.
            prompt_of_row: [B] the prompt each row continues, ascending, none left out.
            limits: [B] the most tokens that each row is given.
        """
        ...
