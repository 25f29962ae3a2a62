"""Tiny random models and tokenizers, made once for the whole run."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Runs are compared bit for bit, which only a CPU promises.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
