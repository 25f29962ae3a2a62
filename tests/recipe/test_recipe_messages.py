"""Mistakes that people make, each told in a message that says where it is, what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlpost.errors import RecipeError
from rlpost.recipe.resolve import resolve

MISTAKES: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("messages.yaml").read_text("utf-8"))


def made(mistake: dict[str, Any], adding: str, write: Callable[[str, str], Path]) -> tuple[str, list[str]]:
    """The recipe and the overrides with the mistake in them."""
    overrides = ([] if mistake.get("open") else ["vars.data=rows.jsonl"]) + mistake.get("set", [])
    if "mien.py" in str(overrides):
        write("mine.py", "def good(completion):\n    return 1.0\n")
    if "recipe" in mistake:
        Path("folder.yaml").mkdir()
        return mistake["recipe"], []
    if "file" in mistake:
        file = write("recipe.yaml", "")
        file.write_bytes(mistake["file"].encode(mistake.get("bytes", "utf-8")))
        return str(file), []
    text = Path(adding).read_text()
    if "edit" in mistake:
        old, new = mistake["edit"]
        assert old in text
        text = text.replace(old, new, 1)
    return str(write("recipe.yaml", text)), overrides


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m["mistake"] for m in MISTAKES])
def test_a_mistake_is_told(mistake: dict[str, Any], adding: str, write, tally) -> None:
    recipe, overrides = made(mistake, adding, write)
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, overrides)
    message = str(caught.value).replace(f"{Path.cwd()}/", "")
    assert len(message.splitlines()) <= 3
    assert message.startswith(f"{mistake['place']}: "), message
    for part in mistake["parts"]:
        assert part in message
    tally("mistakes in recipes", refused=1)
