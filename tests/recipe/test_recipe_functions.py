from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpost.data.params import AUGMENT, MAP, TASK
from rlpost.errors import RecipeError
from rlpost.recipe.functions import bind_all, functions_of
from rlpost.recipe.grouped import ADVANTAGE, SURROGATE
from rlpost.recipe.resolve import resolve
from rlpost.recipe.specs.dpo import LOSS as DPO_LOSS
from rlpost.recipe.specs.process_reward_model import LOSS as STEP_LOSS
from rlpost.rewards.params import REWARD
from rlpost.usercode.binding import bind
from rlpost.usercode.bound import Bound
from rlpost.usercode.params import Function, Lookup

DATA = "vars.data=rows.jsonl"
ADVANTAGES = "rlpost.objectives.advantages"


def refusal(fn: str, field: Lookup, base: Path, **args: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        bind(Function(fn=fn, args=args), field, "here", base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arguments_are_applied(tmp_path: Path) -> None:
    bound = bind(Function(fn="group_normalised", args={"eps": 1.0}), ADVANTAGE, "stages.g.advantage", tmp_path)
    rewards = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    assert bound(rewards)[0].tolist() == pytest.approx([-1 / (1 + 2**0.5), 1 / (1 + 2**0.5)])
    assert (bound.name, bound.where, bound.file, bound.sha256) == ("group_normalised", "stages.g.advantage", None, None)
    assert bind(Function(fn="leave_one_out"), ADVANTAGE, "x", tmp_path)(rewards).tolist() == [[-2, 2]]


def test_helpers_are_not_offered_and_a_function_for_something_else_is_refused(tmp_path: Path) -> None:
    offered = refusal("zzzzzz", ADVANTAGE, tmp_path)
    assert "leave_one_out" in offered
    for helper in ("ema,", "ema)", "gae", "whiten", "reward_on_last_action", "least", "on_last", "spread_evenly"):
        assert helper not in offered
    assert "no function 'gae'" in refusal("gae", ADVANTAGE, tmp_path)
    # As many arguments as a loss of steps has, and for other things.
    assert "'bradley_terry' takes (score_P2, margin_P)" in refusal("bradley_terry", STEP_LOSS, tmp_path)


def test_a_missing_file_names_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("no.py:f", REWARD, tmp_path).endswith(f"no file 'no.py' in {tmp_path}")


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    assert refusal("leave_one_uot", ADVANTAGE, tmp_path) == (
        f"here.fn: no function 'leave_one_uot' in {ADVANTAGES} - did you mean 'leave_one_out'?"
    )
    assert "(it has: column_baseline, ema_baseline," in refusal("frobnicate", ADVANTAGE, tmp_path)
    assert "no function '_mean'" in refusal("_mean", ADVANTAGE, tmp_path)
    assert "here.fn: no task 'adition' in rlpost.data.tasks - did you mean 'addition'?" in refusal(
        "adition.train", TASK, tmp_path
    )
    assert "write 'task.function'" in refusal("train", MAP, tmp_path)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    assert refusal("group_normalised", ADVANTAGE, tmp_path, epz=1) == (
        "here.args.epz: 'group_normalised' has no argument 'epz' - did you mean 'eps'?"
    )
    assert "(it takes: none)" in refusal("leave_one_out", ADVANTAGE, tmp_path, eps=1)
    told = refusal("leave_one_out", ADVANTAGE, tmp_path, reward_PG=1)
    assert "here.args.reward_PG: the program supplies it" in told
    assert "here.args.eps: expected a number, got 'small'" in refusal(
        "group_normalised", ADVANTAGE, tmp_path, eps="small"
    )
    assert "here.args.beta: expected a number, got True" in refusal("dpo", DPO_LOSS, tmp_path, beta=True)
    (tmp_path / "mine.py").write_text("def ratio(a, b): return a\n")
    assert "'ratio' takes () - a `advantage` function takes some of (reward_PG," in refusal(
        "mine.py:ratio", ADVANTAGE, tmp_path
    )
    told = refusal("ratio", SURROGATE, tmp_path)
    assert "'ratio' takes (logp_N, old_logp_N) from the program, which gives (logp_N, old_logp_N, adv" in told
    assert bind(Function(fn="group_normalised", args={"eps": 1}), ADVANTAGE, "x", tmp_path).name == "group_normalised"


def test_a_users_file_is_loaded_and_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def brief(completion, example, weight, most=10):\n    return most * weight\n")
    bound = bind(Function(fn="mine.py:brief", args={"weight": 2}), REWARD, "here", tmp_path)
    assert bound("text", {}) == 20
    assert (bound.file, bound.sha256) == (file, hashlib.sha256(file.read_bytes()).hexdigest())
    assert list(inspect.signature(bound).parameters)[:2] == ["completion", "example"]
    assert not (tmp_path / "__pycache__").exists()
    # The same second, the same size: a bytecode cache would still give 10.
    file.write_text("def brief(completion, example, weight, most=11):\n    return most * weight\n")
    assert bind(Function(fn="mine.py:brief", args={"weight": 2}), REWARD, "here", tmp_path)("text", {}) == 22
    message = refusal("mine.py:brief", REWARD, tmp_path)
    assert message == "here.args.weight: missing - 'brief' has no default for it - give one"
    assert "did you mean 'brief'?" in refusal("mine.py:breif", REWARD, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert bind(Function(fn="mine.py:brief", args={"weight": 1}), REWARD, "x", tmp_path / "elsewhere")("", {}) == 11


def test_files_elsewhere_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "f.py").write_text("def f(completion): return 1.0\n")
    monkeypatch.chdir(tmp_path / "inside")
    base = tmp_path / "inside"
    assert "lies outside the recipe's folder" in refusal(f"{tmp_path}/outside/f.py:f", REWARD, base)
    assert "lies outside the recipe's folder" in refusal("../outside/f.py:f", REWARD, base)
    (base / "link.py").symlink_to(tmp_path / "outside" / "f.py")
    assert "lies outside the recipe's folder" in refusal("link.py:f", REWARD, base)
    assert "no file 'none.py'" in refusal("none.py:f", REWARD, base)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nimport nowhere_at_all\n", "bad.py:2: ModuleNotFoundError: No module named 'nowhere_at_all' (here.fn)"),
        ("def f(:\n", "bad.py:1: SyntaxError: "),
        ("\n\nraise ValueError('two\\nlines')\n", "bad.py:3: ValueError: two lines (here.fn)"),
        ("import sys\nsys.exit(3)\n", "bad.py:2: SystemExit: 3"),
    ],
)
def test_a_file_that_fails_to_load_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    assert message in refusal("bad.py:f", REWARD, tmp_path)
    loaded = [str(module.__file__) for name, module in sys.modules.items() if name.startswith("_rlpost_user")]
    assert not [file for file in loaded if Path(file).name == "bad.py"]


@pytest.mark.parametrize(
    ("signature", "lookup", "message"),
    [
        ("text", REWARD, "a reward takes (completion, example) or (completions, examples)"),
        ("completion, examples", REWARD, "a reward takes"),
        ("example", REWARD, "a reward takes"),
        ("random", MAP, "a `map` function takes (row)"),
        ("row", AUGMENT, "a `augment` function takes (row, random)"),
        ("count", TASK, "here.args.count: missing"),
    ],
)
def test_what_the_program_supplies_is_told_by_names(
    tmp_path: Path, signature: str, lookup: Lookup, message: str
) -> None:
    (tmp_path / "f.py").write_text(f"def f({signature}): return None\n")
    assert message in refusal("f.py:f", lookup, tmp_path)


def test_functions_of_every_kind_of_field_are_taken(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "def task(*, count=1): return [{}] * count\n"
        "def row(row, **rest): return {**row, **rest}\n"
        "def show(row, random, *, shift=0): return random + shift\n"
        "def all(completions): return [0.0 for _ in completions]\n"
    )
    assert bind(Function(fn="f.py:task", args={"count": 2}), TASK, "x", tmp_path)() == [{}, {}]
    assert bind(Function(fn="f.py:row", args={"any": 1}), MAP, "x", tmp_path)({"a": 0}) == {"a": 0, "any": 1}
    assert bind(Function(fn="f.py:show", args={"shift": 2}), AUGMENT, "x", tmp_path)({}, 1) == 3
    assert bind(Function(fn="f.py:all"), REWARD, "x", tmp_path)(["a", "b"]) == [0.0, 0.0]


def test_every_function_of_a_recipe_is_bound_before_anything_runs(adding: str, tmp_path: Path) -> None:
    resolved = resolve(adding, [DATA, "stages.grpo.rewards.1.args.target=9"])
    bound = bind_all(resolved.config, resolved.folder)
    assert all(isinstance(one, Bound) for one in bound)
    assert [one.where for one in bound] == [
        "stages.sft.loss",
        "stages.pairs.rewards[0]",
        "stages.dpo.loss",
        "stages.grpo.rewards[0]",
        "stages.grpo.rewards[1]",
        "stages.grpo.advantage",
        "stages.grpo.loss",
        "evaluation.rewards[0]",
    ]
    assert inspect.signature(bound[4]).parameters["target"].default == 9
    off = resolve(adding, [DATA, "stages.grpo.enabled=false"]).config
    assert not [where for _, _, where in functions_of(off) if where.startswith("stages.grpo")]
    with pytest.raises(RecipeError, match=r"stages\.grpo\.loss\.args\.clip_lwo: .* did you mean 'clip_low'\?"):
        resolve(adding, [DATA, "stages.grpo.loss.args.clip_lwo=0.1"])


def test_a_file_that_is_not_there_is_found_out_on_resolving(adding: str) -> None:
    with pytest.raises(RecipeError, match=r"stages\.grpo\.rewards\[0\]\.fn: no file 'none\.py'"):
        resolve(adding, [DATA, "stages.grpo.rewards=[{fn: 'none.py:f'}]"])


@pytest.mark.parametrize("header", ["from __future__ import annotations\n", ""], ids=["as text", "as it is"])
def test_an_argument_that_is_one_of_few_words_is_checked_before_anything_runs(tmp_path, header):
    """One that is misspelt would else be refused only when the first step is done."""
    (tmp_path / "mine.py").write_text(
        f"{header}from typing import Literal\n\n\n"
        "def share(reward_PG, *, how: Literal['even', 'last'] = 'even'):\n    return reward_PG\n"
    )
    fn = "mine.py:share"
    assert bind(Function(fn=fn, args={"how": "last"}), ADVANTAGE, "stages.grpo.advantage", tmp_path).name == "share"
    wrong = r"stages\.grpo\.advantage\.args\.how: no choice 'lsat' - did you mean 'last'\?"
    with pytest.raises(RecipeError, match=wrong):
        bind(Function(fn=fn, args={"how": "lsat"}), ADVANTAGE, "stages.grpo.advantage", tmp_path)
