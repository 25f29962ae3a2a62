"""What is imported until the first step of training; seconds depend on it, modules are the same on a busy machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml
from tiny_recipes import MODEL

_UNTIL_THE_FIRST_STEP = """
import gc, json, os, sys
from rlpost.__main__ import main
from rlpost.run.stage import StageDirectory

def log(*_):
    print(json.dumps([sorted(sys.modules), gc.isenabled(), gc.get_freeze_count()]), file=sys.stderr, flush=True)
    os._exit(0)

StageDirectory.log = log
main()
"""
_SHOW = """
import json, sys
from rlpost.__main__ import main
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]), file=sys.stderr)
"""
_NOT_NEEDED = (
    "peft",
    "scipy",
    "datasets",
    "pandas",
    "pyarrow",
    "tensorboard",
    "torchvision",
    "matplotlib",
    "rich",
    "gguf",
)


def test_the_first_step_of_training_waits_for_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    stage = {
        "kind": "sft",
        "data": {"sums": {"task": {"fn": "addition.train"}, "limit": 8}},
        "steps": 1,
        "batch_size": 2,
        "learning_rate": 0.01,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": MODEL, "stages": {"sft": stage}}))
    words = ["train", "recipe.yaml", f"runs={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", _UNTIL_THE_FIRST_STEP, *words], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    modules, collects, frozen = json.loads(done.stderr.splitlines()[-1])
    assert "torch" in modules
    assert [name for name in _NOT_NEEDED if name in modules] == []
    assert collects  # garbage is looked for again once all is imported, but not in the modules
    assert frozen > 100_000


def test_a_recipe_that_inherits_nothing_is_shown_without_hydra() -> None:
    words = ["show", "demo", "runs=/tmp/runs", "seed=1", "stages.dpo.enabled=false", "stages.sft.learning_rate=1e-3"]
    done = subprocess.run([sys.executable, "-c", _SHOW, *words], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert "pydantic" in modules
    assert [name for name in ("hydra", "omegaconf", "numpy", "torch", "transformers", "rich") if name in modules] == []
    assert len(modules) < 400
