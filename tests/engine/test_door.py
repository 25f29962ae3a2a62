"""One place makes engines; everything else asks it for one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from stubs import tiny_policy

from rlpost.engine.door import engine_for, frozen_engine
from rlpost.engine.local import LocalEngine
from rlpost.engine.params import EngineChoice

ROOT = Path(__file__).parents[2]
ENGINES = {
    "LocalEngine",
    "LocalSideEngine",
    "ForeignEngine",
    "ForeignScoringEngine",
    "VllmEngine",
    "VllmServer",
    "VllmTeacher",
}
OWN = {f"rlpost/engine/{name}.py" for name in ("local", "side", "foreign", "vllm_here", "vllm_server", "vllm_teacher")}


def names(file: Path) -> set[str]:
    """Every name and attribute in a file, those that it imports or defines too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        for key in ("id", "attr", "name"):
            found |= {value} if isinstance(value := getattr(node, key, None), str) else set()
    return found


def test_the_door_alone_names_an_engine():
    files = [*(ROOT / "rlpost").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    files = [file for file in files if any(name in file.read_text("utf-8") for name in ENGINES)]
    named = {str(file.relative_to(ROOT)) for file in files if names(file) & ENGINES}
    assert named - OWN == {"rlpost/engine/door.py"}
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "rlpost/engine/door.py").read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "LocalEngine"
    ]
    assert len(calls) == 1


@pytest.mark.parametrize(("gib", "expected"), [(None, 2 * 2**30), (0.5, 2**29), (0.0, 0)])
def test_the_local_engine_has_the_memory_that_the_recipe_says(gib, expected):
    chosen = None if gib is None else EngineChoice(cache_gib=gib)
    engine = engine_for(tiny_policy(), chosen)
    assert isinstance(engine, LocalEngine)
    assert engine.kept.limit == expected


def test_a_frozen_policy_samples_at_once():
    assert frozen_engine(tiny_policy()).generate([]) == []
