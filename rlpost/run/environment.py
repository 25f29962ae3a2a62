"""The environment of a run: versions and counts; no names of hosts or users, no environment variables."""

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("rlpost", "torch", "transformers", "peft", "accelerate", "hydra-core", "omegaconf")


def versions() -> dict[str, str]:
    """Version of Python and of each package whose version can change a result, read without importing it."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # rlpost itself when it runs from a source tree
        return "not installed"


def environment(threads: int | None, functions: Mapping[str, str]) -> dict[str, Any]:
    """The content of environment.json.

    Args:
        threads: CPU threads the recipe asks for; None when torch chooses.
        functions: name -> sha256 of the file, for functions that come from the user's files.
    """
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "functions": dict(functions),
    }
