"""Evaluation: sampling, scoring, statistics."""
