"""Rows from files, hub and tasks, on their way to groups of tokens."""
