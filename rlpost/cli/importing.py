"""Imports torch and the like, for a command that needs them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Wrap a command's heavy imports: nothing is searched for garbage meanwhile, nor what they made ever after.

    They make half a million objects, which stay: searching them again and again takes a fifth of the time.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
