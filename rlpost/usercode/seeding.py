"""Seeds the generators that a user's code draws from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

_lock = RLock()


def seed_all(seed: int) -> None:
    """Seed all generators, so that the same call draws the same numbers and a resumed run continues bit for bit."""
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed(seed % 2**32)
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(seed)


@contextmanager
def own_random() -> Iterator[None]:
    """Inside, `random` may be seeded and drawn from; the trainer's numbers go on as if it had not been."""
    with _lock:
        before = random.getstate()
        try:
            yield
        finally:
            random.setstate(before)
