"""Tiny random models and tokenizers, made once for the whole run."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two processes run the tests, each on a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs are compared bit for bit, which only a CPU promises.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
