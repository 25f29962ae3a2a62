"""What a stage cannot have whose policy meets another one."""

from __future__ import annotations

from collections.abc import Iterator

from rlpost.engine.params import LOCAL
from rlpost.recipe.rules import Earlier
from rlpost.recipe.specs.common import Rollouts


def against_problems(cfg: Rollouts, where: str, earlier: Earlier) -> Iterator[str]:
    """What is wrong with the stage at key path `where`, which has `against`, in lines."""
    chosen = cfg.rollouts or earlier.rollouts
    if chosen.engine != LOCAL or chosen.staleness:
        engine = "rollouts.staleness" if chosen.engine == LOCAL else f"rollouts.engine={chosen.engine}"
        yield (
            f"{where}.against: the local engine reads the reference's logits for every token, which is not done with "
            f"{engine} - use engine: local and staleness: 0"
        )
    answered = "tools" if cfg.tools else "environment" if cfg.environment is not None else None
    if answered:
        yield f"{where}.against: completions of a single turn are compared - remove it, or {where}.{answered}"
