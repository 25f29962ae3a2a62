"""Parameters of training."""

from rlpost.section import Choice


class Schedule(Choice):
    """Shape of the learning rate after its warm-up."""

    constant = "constant"
    """Stays at the peak."""
    linear = "linear"
    """Falls towards 0 in a straight line."""
    cosine = "cosine"
    """Falls towards 0 along half a cosine."""
