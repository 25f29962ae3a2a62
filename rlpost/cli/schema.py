"""`rlpost schema`."""

from __future__ import annotations

from rlpost.cli.as_text import print_result
from rlpost.cli.copy import schema_file


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    print_result(schema_file().read_text("utf-8").removesuffix("\n"))
