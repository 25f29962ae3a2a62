"""The package verifiers: whether it is there, in the version whose environments are played."""

from __future__ import annotations

from pathlib import Path

from rlpost.usercode.params import TASKS

PACKAGE = "verifiers"
"""The package, and the task of rlpost that stands for it: `verifiers.rows`."""
MODULE = f"{TASKS}.{PACKAGE}"
FILE = Path(__file__).parents[1] / "data" / "tasks" / f"{PACKAGE}.py"
"""Run as a user's file is, in a process of its own: environments are others' code, and the package takes seconds."""
VERSION = "0.4"
INSTALL = f"pip install 'rlpost[{PACKAGE}]'"


def missing() -> str:
    """What is missing, and how it is installed; empty where nothing is."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        return f"needs the package {PACKAGE}: {INSTALL}"
    if found.split(".")[:2] != VERSION.split("."):
        return f"needs {PACKAGE} {VERSION}, and {found} is installed: {INSTALL}"
    return ""
