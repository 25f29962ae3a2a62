"""How an update is cut into parts that fit into memory, one pass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlpost import ranks
from rlpost.errors import OutOfMemoryError
from rlpost.train.experience import Experience


class SharesPrompts(Protocol):
    """What a cut depends on of a model."""

    @property
    def shares_prompts(self) -> bool:
        """A prompt is computed once for its completions."""
        ...


class Microbatches:
    """The token budget of a pass. It is lowered where memory is short, which changes a gradient by rounding alone."""

    def __init__(self, model: SharesPrompts, tokens: int, *, whole_groups: bool) -> None:
        """Passes of at most `tokens`, or of one completion (`whole_groups`: one group)."""
        self._model = model
        self._whole = whole_groups
        self.tokens = tokens
        """The budget."""

    def parts(self, experience: Experience, rank: int | None = None) -> list[Experience]:
        """The parts of a rank's share; by default of this one's."""
        return self._cut(experience, ranks.index() if rank is None else rank, self.tokens)

    def lower(self, experiences: Sequence[Experience], short: Sequence[int], where: str) -> None:
        """Halve the budget until the ranks that ran out of memory make more passes, smaller ones.

        Args:
            experiences: the update, the same on all ranks, which all come here.
            short: the ranks whose memory was too short.
            where: in the stage, for the message.

        Raises:
            OutOfMemoryError: the share of one of them cannot be cut further.
        """
        before = [self._passes(experiences, rank, self.tokens) for rank in short]
        found = self.tokens
        while found > 1:
            found //= 2
            if all(self._passes(experiences, r, found) > n for r, n in zip(short, before, strict=True)):
                self.tokens = found
                return
        unit = "group" if self._whole else "completion with its prompt"
        raise OutOfMemoryError(
            f"{where}: out of memory in a pass of one {unit}, which cannot be cut; nothing was changed by it. Lower "
            "max_length, sampling.max_new_tokens or model.lora.r, or set model.gradient_checkpointing=true; the run "
            "goes on from its last checkpoint"
        )

    def _passes(self, experiences: Sequence[Experience], rank: int, tokens: int) -> int:
        return sum(len(self._cut(experience, rank, tokens)) for experience in experiences)

    def _cut(self, experience: Experience, rank: int, tokens: int) -> list[Experience]:
        own = experience.share(rank, ranks.count(), whole_groups=self._whole)
        return own.cut(tokens, whole_groups=self._whole, shared_prompts=self._model.shares_prompts)
