"""How completions are sampled, and by what."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from rlpost.section import Section
from rlpost.usercode.params import Lookup

LOCAL = "local"
"""The name of the engine that decodes with the policy's own model."""
CACHE_GIB = 2.0
DEADLINE = 900.0
"""Seconds after which a call of a user's engine counts as hanging."""

ENGINE = Lookup("engine", "", ("policy",), by_name=True, key="engine")


class Sampling(Section):
    """How completions are sampled."""

    max_new_tokens: int = Field(256, ge=1)
    """Tokens of a completion, at most."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this."""
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of likeliest tokens with this mass."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Keep tokens at least this many times as likely as the likeliest."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion and are left out of it."""

    def problems(self, where: str) -> Iterator[str]:
        """A text that every completion contains."""
        if "" in self.stop:
            yield f"{where}.stop: an empty string stops every completion at once - remove it"


class EngineChoice(Section):
    """What samples completions (docs/engines.md)."""

    engine: str = LOCAL
    """`local`: the policy's own model in its own process; or `file.py:function`, which returns an engine of yours."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that function."""
    deadline: float | None = Field(None, gt=0)
    """Seconds that a call of your engine may take (900 by default)."""
    cache_gib: float = Field(CACHE_GIB, ge=0)
    """GiB of memory in which the local engine keeps what it has computed, for later turns and for completions that are
    gone on from; 0: none."""
    fused: bool = True
    """The local engine decodes on weights that it packs once an update, where that is exact; false: by the model's own
    forward (docs/how-it-works.md#the-fused-decoding-step)."""

    def problems(self, where: str) -> Iterator[str]:
        """What only engines of a user's file have."""
        for key in ("args", "deadline"):
            if self.engine == LOCAL and getattr(self, key):
                yield f"{where}.{key}: is for an engine of file.py:function, not for {LOCAL} - remove it"
