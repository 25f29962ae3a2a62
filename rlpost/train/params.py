"""Parameters of training."""

from rlpost.section import Choice


class Schedule(Choice):
    """Shape of the learning rate after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
