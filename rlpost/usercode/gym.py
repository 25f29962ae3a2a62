"""The tasks of the package reasoning_gym: their names, read from its source, for importing it takes a second."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

GYM = "reasoning_gym"
"""The package, and the task of rlpost that its tasks are named after: `reasoning_gym.products`."""
INSTALL = "pip install 'rlpost[tasks]'"
_NAME = re.compile(r'^DATASET_NAME = "(\w+)"|\bregister_dataset\(\s*"(\w+)"', re.MULTILINE)


def installed() -> bool:
    """Whether the package can be imported."""
    return find_spec(GYM) is not None


@cache
def names() -> tuple[str, ...]:
    """Names of its tasks, sorted; none where it is not installed."""
    spec = find_spec(GYM)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    texts = [file.read_text("utf-8") for folder in folders for file in Path(folder).rglob("*.py")]
    return tuple(sorted({one or other for text in texts for one, other in _NAME.findall(text)}))
