"""Sampling completions: the door, the engine of this process, its random numbers."""
