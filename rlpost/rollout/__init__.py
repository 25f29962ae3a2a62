"""Completions from a policy: engines that sample, and the groups they fill."""
