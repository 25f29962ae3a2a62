"""rlpost: one recipe through SFT, preference optimisation and reinforcement learning."""

__version__ = "0.1.0"
