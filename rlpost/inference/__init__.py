"""Trained models in use: evaluating, sampling, talking, merging, the best of several, pairs of their own samples."""
