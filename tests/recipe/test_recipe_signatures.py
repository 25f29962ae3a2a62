"""What functions say of themselves is read from their source, and it is what they are when they are imported."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from rlpost.errors import RecipeError
from rlpost.facts import FACTS, declare, fact
from rlpost.recipe.grouped import ADVANTAGE, FOCUS, SURROGATE
from rlpost.recipe.resolve import resolve
from rlpost.recipe.specs.dpo import LOSS, MODIFIER
from rlpost.rewards.params import REWARD
from rlpost.usercode.binding import bind
from rlpost.usercode.load import public_functions
from rlpost.usercode.params import Function
from rlpost.usercode.signatures import functions_in, info_of

DATA = "vars.data=rows.jsonl"
MODULES = [lookup.module for lookup in (ADVANTAGE, SURROGATE, FOCUS, LOSS, MODIFIER, REWARD)]
MODULES += [f"rlpost.objectives.{name}" for name in ("supervised", "reward_model", "unpaired")]
MODULES += [
    f"rlpost.data.tasks.{name}" for name in ("addition", "calculator", "gsm8k", "maze", "programs", "reasoning_gym")
]


@pytest.mark.parametrize("module", MODULES)
def test_the_source_says_what_the_import_does(module: str) -> None:
    loaded, read = public_functions(importlib.import_module(module)), functions_in(module)
    assert read.keys() == loaded.keys()
    for name, function in loaded.items():
        own = [(p.name, p.kind, p.default is p.empty) for p in inspect.signature(function).parameters.values()]
        found = [(p.name, p.kind, p.default is p.empty) for p in read[name].signature.parameters.values()]
        assert found == own, name
        assert read[name].facts == getattr(function, "facts", {}), name


def test_a_fact_is_one_of_few_and_holds_through_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no fact 'couples_pair' - did you mean 'couples_pairs'"):
        declare(test_a_fact_is_one_of_few_and_holds_through_arguments, couples_pair=False)
    assert not fact(bind(Function(fn="dpo", args={"beta": 0.2}), LOSS, "x", tmp_path), "couples_pairs")
    assert fact(bind(Function(fn="aot", args={"beta": 0.2}), LOSS, "x", tmp_path), "couples_pairs")
    assert all(fact(len, name) is default for name, default in FACTS.items())


MINE = """\
import torch
from rlpost.facts import declare

def lonely(reward_PG, *, k=2): return reward_PG
declare(lonely, compares_completions=True, k_in_group=True)
def alone(reward_PG): return reward_PG
declare(alone, compares_completions=True)
def plain(reward_PG, *, k=2): return reward_PG
def by_step(steps, step_reward_K): return step_reward_K
def looks_again(greedy_P, reward_PG): return reward_PG
def free(pairs): return pairs.logp_P2[:, 0]
declare(free, needs_reference=False, couples_pairs=False)
def whole(delta_PK, reward_PK): return delta_PK[:, 0]
def shifted(pairs): return pairs
declare(shifted, changes_log_ratios=True, weighs_actions=True)
def lifted(logp_N, old_logp_N, advantage_N, rows): return -advantage_N * logp_N
declare(lifted, per_completion=True)
def taught(logp_NV, teacher_NV): return logp_NV.sum(1)
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grpo.advantage={fn: 'mine.py:by_step'}"], "grpo.step_end: missing - by_step credits steps"),
        (["grpo.advantage={fn: 'mine.py:lonely', args: {k: 9}}"], "grpo.advantage.args.k: 9 - expected from 1 to"),
        (["grpo.advantage={fn: 'mine.py:plain', args: {k: 9}}"], ""),
        (
            ["grpo.advantage={fn: 'mine.py:looks_again'}", "grpo.recorded=true"],
            "grpo.advantage.fn=mine.py:looks_again: needs new samples",
        ),
        (["grpo.loss={fn: 'mine.py:lifted'}"], "grpo.weight: lifted is one value a completion"),
        (["dpo.loss={fn: 'mine.py:free'}", "dpo.refresh={every: 1}"], "dpo.refresh: free has no reference that"),
        (["dpo.loss={fn: 'mine.py:free'}", "dpo.modifiers=[{fn: f_divergence}]"], "f_divergence changes log-ratios"),
        (["dpo.modifiers=[{fn: f_divergence}, {fn: 'mine.py:shifted'}]"], "dpo.modifiers[1]: shifted weighs actions"),
        (["dpo.loss={fn: 'mine.py:whole'}", "dpo.nll_coef=1"], "dpo.nll_coef: whole compares whole groups"),
        (["sft.loss={fn: 'mine.py:taught'}"], "sft.teacher: missing - taught imitates a teacher"),
    ],
)
def test_a_users_functions_are_held_to_what_they_say(adding: str, write, overrides: list[str], message: str) -> None:
    write("mine.py", MINE)
    words = [DATA, *(f"stages.{word}" for word in overrides)]
    if not message:
        assert resolve(adding, words)
        return
    with pytest.raises(RecipeError) as caught:
        resolve(adding, words)
    assert message in str(caught.value).replace(f"{Path(adding).parent}/", "")


def test_a_group_of_one_is_warned_of_by_what_the_users_advantage_says(adding: str, write) -> None:
    write("mine.py", MINE)
    one = [DATA, "stages.grpo.group_size=1"]
    (warning,) = resolve(adding, [*one, "stages.grpo.advantage={fn: 'mine.py:alone'}"]).warnings
    assert "alone is 0 everywhere" in warning
    assert not resolve(adding, [*one, "stages.grpo.advantage={fn: 'mine.py:plain'}"]).warnings


def test_behind_a_decorator_the_users_process_is_asked(write, tmp_path: Path) -> None:
    wraps = (
        "import functools\ndef same(f):\n    @functools.wraps(f)\n    def g(*a, **k): return f(*a, **k)\n    return g\n"
    )
    file = write("mine.py", f"{wraps}@same\ndef labelled(logp_N, label_N): return logp_N\n")
    assert info_of(Function(fn=f"{file}:labelled"), LOSS).takes("label_N")
    assert not info_of(Function(fn=f"{file}:none"), LOSS).takes("label_N")
    file.write_text("def broken(:\n")
    assert not info_of(Function(fn=f"{file}:broken"), LOSS).takes("label_N")


def test_names_and_arguments_are_checked_without_torch(adding: str, write) -> None:
    code = f"""
import sys
from rlpost.errors import RecipeError
from rlpost.recipe.resolve import resolve
for wrong in ("grpo.loss.fn=clipped_surogate", "grpo.advantage.args.epz=1", "pairs.rewards.0.fn=math_anwser"):
    try:
        resolve({adding!r}, [{DATA!r}, f"stages.{{wrong}}"])
    except RecipeError as error:
        assert "did you mean" in str(error), error
    else:
        raise SystemExit(f"{{wrong}} was taken")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
