"""What answers the model's turns, whatever its kind: a function, a class, tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlpost.environments.episode import Episode


class Responder(Protocol):
    """Answers the turns of some episodes."""

    def begin(self, episodes: Sequence[Episode]) -> None:
        """Give episodes their prompts, which are the same for all of a prompt's; called once, before any turn."""
        ...

    def ask(self, episodes: Sequence[Episode]) -> None:
        """Add a reply to each of these, whose last turn is the model's, or end it.

        Raises:
            RewardError: the environment failed, and its failures stop the run.
        """
        ...

    async def ask_one(self, episode: Episode) -> None:
        """The same for one of many that are under way."""
        ...

    def end(self, episodes: Sequence[Episode]) -> None:
        """Free what is kept of these, which are over."""
        ...
