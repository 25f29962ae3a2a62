"""rlpost from Python: train, read a run, generate; what is wrong is raised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipes import GRPO, PAIRS, SFT, metrics, write

import rlpost
from rlpost.engine.params import Sampling
from rlpost.errors import DataError, DiskError, ModelError, RecipeError
from rlpost.inference.sample import sample

EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 6}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> rlpost.Run:
    recipe = write(tmp_path_factory.mktemp("api"), {"sft": SFT, "pairs": PAIRS}, evaluation=EVALUATION)
    return rlpost.train(recipe, {"stages.sft.steps": 3, "stages.sft.log_every": 1, "description": "it's 'tiny', [1]"})


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_imports_nothing_heavy() -> None:
    python(
        "import sys; before = set(sys.modules); import rlpost; assert callable(rlpost.train)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'torch', 'transformers', 'datasets', 'numpy', 'pydantic', 'hydra', 'typer', 'rich'}, new\n"
        "rlpost.load, rlpost.Run, rlpost.Completion; assert 'torch' not in sys.modules"
    )


def test_train_is_called_and_stays_a_package() -> None:
    python(
        "import rlpost.train.params as p, rlpost; assert callable(rlpost.train); assert rlpost.train.params is p\n"
        "assert set(rlpost.__all__) <= set(dir(rlpost)); [getattr(rlpost, name) for name in rlpost.__all__]"
    )


def test_train_returns_the_run(run: rlpost.Run) -> None:
    assert (run.path.name, run.stages, run.finished) == ("run", ["sft", "pairs"], True)
    assert run.checkpoint == run.path / "sft/final"
    assert run.checkpoints == {"sft": run.path / "sft/final"}  # `pairs` leaves rows
    assert run.config["stages"]["sft"]["steps"] == 3
    assert run.config["description"] == "it's 'tiny', [1]"


def test_its_numbers(run: rlpost.Run) -> None:
    assert [row["step"] for row in run.metrics("sft")] == [1, 2, 3]
    assert run.metrics("sft") == metrics(run.path.parents[1], "sft")
    assert len(run.timings("sft")) == 3
    scores = run.evaluation
    assert [(s.stage, s.mode, s.part, s.prompts, s.samples) for s in scores] == [
        (stage, mode, "all", 6, n) for stage in ("base", "sft") for mode, n in (("greedy", 1), ("sampled", 2))
    ]
    assert all(s.low <= s.value <= s.high for s in scores)


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_said(run: rlpost.Run) -> None:
    file = run.path / "sft/metrics.jsonl"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole + b'{"step": 4, "lo')
        assert [row["step"] for row in run.metrics("sft")] == [1, 2, 3]
        file.write_bytes(b"{\n")
        with pytest.raises(DiskError, match="not JSON"):
            run.metrics("sft")
    finally:
        file.write_bytes(whole)


def test_generate_gives_what_the_command_gives(run: rlpost.Run) -> None:
    model = run.load()
    settings = Sampling(max_new_tokens=4)
    wanted = sample(str(run.path), "47+38=", sampling=settings, n=3, seed=5)
    found = model.generate("47+38=", n=3, max_new_tokens=4, seed=5)
    assert [c.text for c in found] == wanted
    assert all(c.finish in ("stop", "length") and len(c.logprobs) == len(c.ids) for c in found)
    assert model.generate([]) == []


def test_a_list_gives_a_list_whatever_is_done_at_once(run: rlpost.Run, monkeypatch) -> None:
    model = rlpost.load(run.path / "sft")
    prompts = ["1+1=", "22+3=", "4+5="]
    whole = model.generate(prompts, n=2, max_new_tokens=4)
    monkeypatch.setattr("rlpost.api.generation.AT_ONCE", 2)
    parts = model.generate(prompts, n=2, max_new_tokens=4)
    assert [[c.text for c in row] for row in parts] == [[c.text for c in row] for row in whole]
    once, again = model.generate("1+1=", n=2, greedy=True, max_new_tokens=4)
    assert once.text == again.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0}, "temperature: expected"),
        ({"n": 0}, "n: expected at least 1"),
        ({"top_p": 2.0}, "top_p: expected"),
        ({"stop": ""}, "stop: an empty text"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected"),
    ],
)
def test_a_setting_out_of_range_is_named(run: rlpost.Run, settings, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        run.load().generate("1+1=", **settings)


def test_prompts_that_are_none(run: rlpost.Run) -> None:
    model = run.load()
    with pytest.raises(DataError, match=r"prompts\[0\]: a single message"):
        model.generate([{"role": "user", "content": "1+1="}])  # type: ignore[list-item]
    with pytest.raises(ModelError, match=r"prompts\[0\]: the tokenizer has no chat template"):
        model.generate([[{"role": "user", "content": "1+1="}]])  # a model without a chat template


def test_what_is_wrong_is_raised_in_one_line(run: rlpost.Run, tmp_path: Path) -> None:
    recipe = write(tmp_path, {"sft": SFT})
    wrong = {
        "seed=1": r"overrides: 'seed=1' is one text - give a list",
        ("seed",): "seed: expected key=value",
        (1,): "overrides: 1 is no text",
    }
    for overrides, said in wrong.items():
        with pytest.raises(RecipeError, match=said):
            rlpost.train(recipe, overrides)
    with pytest.raises(RecipeError, match=r"sed: unknown key - did you mean 'seed'"):
        rlpost.train(recipe, {"sed": 1})
    with pytest.raises(RecipeError, match=r"seed: \{1\} cannot be given"):
        rlpost.train(recipe, {"seed": {1}})
    with pytest.raises(RecipeError, match="steps: expected at least 1"):
        rlpost.train(recipe, steps=0)
    with pytest.raises(ModelError, match="no run is here"):
        rlpost.Run(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        rlpost.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no stage 'stf' - did you mean 'sft'"):
        run.metrics("stf")
    assert not (tmp_path / "runs").exists()


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    recipe = write(tmp_path, {"sft": SFT, "grpo": {**GRPO, "rewards": [{"fn": "rewards.py:none"}]}})
    Path(tmp_path / "rewards.py").write_text("def none(completion):\n    raise ValueError('no')\n", "utf-8")
    with pytest.raises(rlpost.RlpostError, match="no"):
        rlpost.train(str(recipe))
    run = rlpost.Run(tmp_path / "runs/run")
    assert (run.finished, list(run.checkpoints), run.metrics("grpo"), run.evaluation) == (False, ["sft"], [], [])
    with pytest.raises(ModelError, match="stage grpo is not finished"):
        _ = run.checkpoint
