"""How completions are sampled, and by what."""

from dataclasses import dataclass, field
from typing import Any, Optional

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045

LOCAL = "local"
"""The name of the engine that decodes with the policy's own model."""
CACHE_GIB = 2.0
DEADLINE = 900.0
"""Seconds after which a call of a user's engine counts as hanging."""


@dataclass
class Sampling:
    """How completions are sampled."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)


@dataclass
class EngineChoice:
    """What samples completions."""

    engine: str = LOCAL
    """`local`: the policy's own model in its own process; or `file.py:function`, which returns an engine of yours."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that function."""
    deadline: Optional[float] = None
    """Seconds that a call of your engine may take (900)."""
    cache_gib: float = CACHE_GIB
    """Memory in which the local engine keeps what turns before, and completions that are gone on from, have computed
    (0: none)."""
