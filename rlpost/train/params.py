"""Parameters of training."""

from enum import StrEnum


class Schedule(StrEnum):
    """Shape of the learning rate after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
