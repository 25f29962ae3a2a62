"""Trained models in use: evaluating, sampling, merging, choosing the best of several, pairs of their own samples."""
