"""Imports torch and the like, for a command that needs them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_WANTED = "scipy"
"""transformers imports it, where it is installed, for the losses of object detection; it takes a third of a second."""


@contextmanager
def importing() -> Iterator[None]:
    """Wrap a command's heavy imports: nothing is searched for garbage meanwhile, nor what they made ever after.

    They make half a million objects, which stay: searching them again and again takes a fifth of the time.
    """
    if "torch" in sys.modules:
        yield
        return
    hidden = _NOT_WANTED not in sys.modules
    if hidden:
        sys.modules[_NOT_WANTED] = None  # type: ignore[assignment]
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if hidden:
            sys.modules.pop(_NOT_WANTED, None)  # who imports it later finds it
