"""Trained models in use: evaluating, sampling, choosing the best of several, pairs of their own samples."""
