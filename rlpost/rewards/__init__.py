"""Rewards: functions of completions, trees of them, and processes that call those of users."""
