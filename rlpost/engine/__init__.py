"""Sampling completions: engines, the local one's decoding, random numbers."""
