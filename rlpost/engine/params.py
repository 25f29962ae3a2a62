"""How completions are sampled, and by what."""

from dataclasses import dataclass, field
from typing import Any, Optional

from rlpost.key import key
from rlpost.usercode.params import Lookup

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045

LOCAL = "local"
"""The name of the engine that decodes with the policy's own model."""
CACHE_GIB = 2.0
DEADLINE = 900.0
"""Seconds after which a call of a user's engine counts as hanging."""

ENGINE = Lookup("engine", "", ("policy",), by_name=True, key="engine")


@dataclass
class Sampling:
    """How completions are sampled."""

    max_new_tokens: int = key(256, ge=1)
    temperature: float = key(1.0, gt=0)
    top_k: int = key(0, ge=0)
    top_p: float = key(1.0, gt=0, le=1)
    min_p: float = key(0.0, ge=0, lt=1)
    stop: list[str] = field(default_factory=list)


@dataclass
class EngineChoice:
    """What samples completions."""

    engine: str = LOCAL
    """`local`: the policy's own model in its own process; or `file.py:function`, which returns an engine of yours."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that function."""
    deadline: Optional[float] = key(None, gt=0)
    """Seconds that a call of your engine may take (900)."""
    cache_gib: float = key(CACHE_GIB, ge=0)
    """Memory in which the local engine keeps what turns before, and completions that are gone on from, have computed
    (0: none)."""
