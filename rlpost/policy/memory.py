"""Memory that was freed: kept in the process between passes, given back between models."""

from __future__ import annotations

import ctypes
import gc
import platform

import torch

_TRIM_THRESHOLD = -1  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_MMAP_THRESHOLD = -3
_BYTES = (1 << 30, 32 << 20)  # Older versions of glibc refuse more than 32 MiB.


def keep_freed_memory() -> bool:
    """Let glibc reuse large buffers instead of returning them to the kernel at every free.

    A training pass on a CPU frees and takes the same large buffers again and again; each time the kernel has to
    clear their pages, which costs about a tenth of the pass. Peak memory grows by some percent. To be called once
    at the start of a process; decoding, whose buffers are small and stay, does not gain by it.

    Returns:
        False with another C library or system, where nothing is changed.
    """
    glibc = _glibc()
    return glibc is not None and all(
        any(glibc.mallopt(option, size) for size in _BYTES) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)
    )


def give_back_freed_memory() -> None:
    """Give back what was freed since the process began; with another C library than glibc, nothing.

    To be called once a model is loaded: reading, joining and checking its weights has taken twice their memory, partly
    in threads of their own, whose freed buffers no other thread takes. And once weights that were packed for sampling
    are dropped: a pass has larger buffers than what they leave.
    """
    if (glibc := _glibc()) is not None:
        glibc.malloc_trim(0)


def free_memory(device: torch.device) -> None:
    """Collect what is no longer used, and give back what a device's allocator has kept of it."""
    gc.collect()
    give_back_freed_memory()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc" else None
