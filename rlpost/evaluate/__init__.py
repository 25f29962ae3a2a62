"""Evaluation: sampling, scoring, statistics that can be believed."""
