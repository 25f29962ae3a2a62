"""Print results: numbers by key, YAML in colour; on a terminal, without control characters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlpost.console import clean
from rlpost.results import emit, output
from rlpost.streams import in_colour, is_terminal


def print_result(found: object) -> None:
    """Print a result on stdout: unchanged into a file or a pipe, without control characters on a terminal.

    A mapping is printed as a line of JSON.
    """
    text = json.dumps(found) if isinstance(found, dict) else str(found)
    emit(clean(text) if is_terminal(output()) else text)


def show_yaml(text: str) -> None:
    """Print YAML on stdout, its keys in colour on a terminal."""
    if in_colour(output()):
        emit(coloured(clean(text)))
    else:
        print_result(text)


def figures(result: Mapping[str, Any]) -> list[str]:
    """A result as lines `key: value`; nested keys are joined by dots."""
    lines: list[str] = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{key}.{line}" for line in figures(value)]
        else:
            lines.append(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}")
    return lines


def coloured(yaml: str) -> str:
    """YAML with its keys in colour."""
    return re.sub(r"(?m)^(\s*(?:- )*)([^\s#'\"-][^:\n]*)(?=:(?: |$))", "\\1\033[36m\\2\033[0m", yaml)
