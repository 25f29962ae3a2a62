"""What a goal set costs: memory and lookup time at 1, a thousand and a million members of six tokens.

python scripts/goal_sets.py
"""

from __future__ import annotations

import random
import time
from statistics import median

from rlpost import console
from rlpost.goals.goal_set import GoalSet

TOKENS = 50_000
LENGTH = 6
LOOKUPS = 2000


def measured(members: int, seed: int = 0) -> list[str]:
    """Members, seconds to build, megabytes, and microseconds a lookup of texts of which half are in the set."""
    draw = random.Random(seed)
    endings = [tuple(draw.randrange(TOKENS) for _ in range(LENGTH)) for _ in range(members)]
    began = time.perf_counter()
    goals = GoalSet(endings)
    built = time.perf_counter() - began
    before = tuple(draw.randrange(TOKENS) for _ in range(20))
    texts = [before + (draw.choice(endings) if i % 2 else before[:LENGTH]) for i in range(LOOKUPS)]
    found, seconds = 0, []
    for text in texts:
        began = time.perf_counter()
        found += goals.reached(text)
        seconds.append(time.perf_counter() - began)
    assert found == LOOKUPS // 2
    per_hit = median(seconds[1::2]) * 1e6
    return [f"{members:,}", f"{built:.1f}", f"{goals.bytes / 1e6:.3g}", f"{per_hit:.1f}"]


if __name__ == "__main__":
    columns = ["members", "seconds to build", "MB", "µs a member found"]
    console.table(f"sets of endings of {LENGTH} tokens", columns, [measured(n) for n in (1, 1000, 1_000_000)])
