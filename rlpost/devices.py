"""Ways onto a device that do not wait for what it still computes."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`; on the way there from the CPU nothing waits for what the device still computes."""
    if x.device.type != "cpu":
        return x.to(device)
    # A copy from memory that may be paged out would wait.
    return (x.pin_memory() if torch.device(device).type == "cuda" else x).to(device, non_blocking=True)


def true_at(mask_n: Tensor, device: torch.device | str) -> Tensor:
    """[k] the indices, on `device`, where a mask on the CPU is true: a mask there as an index would be waited for."""
    return moved(mask_n.nonzero()[:, 0], device)
