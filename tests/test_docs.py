"""The documentation and the code say the same: functions, exit codes, recipes, links; keys have a test of their own."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rlpost
from rlpost import errors, objectives
from rlpost.data.formats import DataRole, Format, recognise
from rlpost.oracle.verify import verify
from rlpost.recipe.files import packaged
from rlpost.recipe.kinds import kinds
from rlpost.recipe.resolve import resolve
from rlpost.rewards import functions as rewards
from rlpost.rewards.tree import NODES
from rlpost.run import names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
NUMBER = re.compile(r"-?\d[\d.]*(?:e-?\d+)?")
RECIPE = re.compile(r"rlpost\s+(?:train|show)\s+([\w./-]+)|--recipe[ =]([\w./-]+)")


def commands() -> Iterator[tuple[Path, list[str]]]:
    """The words of every line in the pages' code blocks that calls rlpost by itself."""
    for page in PAGES:
        for block in re.findall(r"(?ms)^```[^\n]*\n(.*?)^```", page.read_text("utf-8")):
            for line in block.splitlines():
                if re.match(r"(\$ )?rlpost ", line):
                    yield page, shlex.split(line.removeprefix("$ "), comments=True)


def is_packaged(recipe: str) -> bool:
    """False for placeholders (RECIPE) and files of the reader's own (my.yaml)."""
    return not recipe.isupper() and (recipe.startswith("recipes/") or not recipe.endswith((".yaml", ".yml")))


def test_every_recipe_that_is_named_exists():
    for page in PAGES:
        for words in RECIPE.findall(page.read_text("utf-8")):
            recipe = words[0] or words[1]
            if is_packaged(recipe):
                name = recipe.removeprefix("recipes/").removesuffix(".yaml")
                assert name in packaged(), f"{page.name}: {recipe}"


def test_every_override_that_is_shown_is_a_key():
    wrong = ["stages.sft.step=1"]  # shown for its error
    for page, words in commands():
        if words[1] not in ("train", "show") or not is_packaged(words[2]):
            continue
        overrides = [w for w in words[3:] if "=" in w and not w.startswith("--")]
        if overrides == wrong or (words[2] == "sft_chat" and not overrides):
            with pytest.raises(errors.RecipeError):
                resolve(words[2], overrides)
        else:
            needed = ["vars.data=x"] if "data: ???" in (ROOT / f"recipes/{words[2]}.yaml").read_text("utf-8") else []
            assert resolve(words[2], needed + overrides), page


def objective_rows() -> Iterator[tuple[str, str]]:
    """(name, row) of every table of docs/objectives.md whose first column is `name`."""
    names = False
    for line in (DOCS / "objectives.md").read_text("utf-8").splitlines():
        if not line.startswith("|"):
            names = False
        elif names:
            yield from ((name, line) for name in re.findall(r"`(\w+)`", line.split(" | ")[0]))
        names = names or line.startswith("| name |")


def says(row: str, parameter: inspect.Parameter) -> bool:
    """Whether the row's last cell has the argument, and its default after it; None and False go without saying."""
    rest = row.rsplit(" | ", 1)[1].partition(f"`{parameter.name}`")
    default = parameter.default
    if not rest[1] or default in (None, parameter.empty) or isinstance(default, bool):
        return bool(rest[1])
    if isinstance(default, str):
        return rest[2].startswith(f" `{default}`")
    number = NUMBER.match(rest[2].lstrip())
    return number is not None and float(number[0].rstrip(".")) == default


def test_every_objective_is_documented():
    page = (DOCS / "objectives.md").read_text("utf-8")
    for name in objectives.__all__:
        assert f"`{name}`" in page, name


def test_every_argument_of_an_objective_is_documented_with_its_default():
    rows = list(objective_rows())
    for name in objectives.__all__:
        for parameter in inspect.signature(getattr(objectives, name)).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                own = [row for other, row in rows if other == name]
                assert any(says(row, parameter) for row in own), f"{name}: {parameter}"


def test_no_objective_is_documented_that_is_not_there():
    assert {name for name, _ in objective_rows()} <= set(objectives.__all__)


def test_what_is_exact_and_what_is_biased_is_documented_as_it_is_proved():
    """Claims do not depend on the tree: a smaller one than the command's will do."""
    told = (DOCS / "objectives.md").read_text("utf-8").partition("\n## Exact or biased\n")[2]
    claims = set(re.findall(r"(?m)^\| (.+) \| (.+) \|$", told))
    proved = verify(3, 2, models=False).sections
    kinds = ("group estimators", "baselines", "KL", "credit", "potential", "surrogates", "on-policy distillation")
    kinds = (*kinds, "preferences without")
    rows = [row for section in proved if section.title.startswith(kinds) for row in section.rows]
    assert claims == {(row.name, row.expected) for row in rows} | {
        ("group estimator, weight", "expected gradient against that of E[r]")
    }


def arguments(function: Callable[..., Any]) -> Iterator[str]:
    """How docs/rewards.md writes the arguments: a name, and the default in brackets where it is a plain value."""
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            plain = isinstance(p.default, int | float) and not isinstance(p.default, bool)
            yield f"`{p.name}` ({p.default})" if plain else f"`{p.name}`"


def test_every_reward_and_node_is_documented_with_its_arguments():
    page = (DOCS / "rewards.md").read_text("utf-8")
    functions = {name: getattr(rewards, name) for name in rewards.__all__} | NODES
    for name, function in functions.items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), "")
        assert row, name
        for argument in arguments(function):
            assert argument in row, f"{name}: {argument}"


def test_every_function_of_a_task_is_documented():
    pages = "".join((DOCS / f"{name}.md").read_text("utf-8") for name in ("data", "rewards"))
    internal = {"gsm8k.prompt", "gsm8k.final_answer"}  # what its maps are made of
    internal |= {f"maze.{name}" for name in ("neighbours", "distances", "walk_values", "starts", "prompt")}
    internal |= {"tictactoe.shown", "tictactoe.cell_of"}
    for file in (ROOT / "rlpost/data/tasks").glob("[a-z]*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                name = f"{file.stem}.{node.name}"
                assert name in internal or f"`{name}`" in pages, name


def test_examples_of_judged_rows_are_read_as_what_they_are():
    page = (DOCS / "data.md").read_text("utf-8")
    rows = [json.loads(line) for block in re.findall(r"(?ms)^```json\n(.*?)^```", page) for line in block.splitlines()]
    forms = {
        DataRole.pairs: Format.pair,
        DataRole.triples: Format.triple,
        DataRole.ranked: Format.ranked,
        DataRole.labelled: Format.labelled,
        DataRole.steps: Format.steps,
        DataRole.recorded: Format.recorded,
    }
    for row, (need, form) in zip(rows, forms.items(), strict=True):
        assert recognise([row], "data.md", need) is form


def test_every_kind_of_stage_is_described():
    page = (DOCS / "how-it-works.md").read_text("utf-8")
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", page)) == set(kinds())


def test_every_exit_code_is_documented():
    page = (DOCS / "runs.md").read_text("utf-8")
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, errors.RlpostError):
            code = "128 + signal" if cls is errors.Interrupted else cls.exit_code
            assert f"| {code} | `{name}` |" in page


def test_every_file_of_a_run_is_documented():
    page = (DOCS / "runs.md").read_text("utf-8")
    for key, name in vars(names).items():
        if key.isupper() and isinstance(name, str):
            assert name in page, key


def test_links_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", page.read_text("utf-8")):
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"(?m)^#+ (.+)$", file.read_text("utf-8"))
                slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_the_tree_of_the_package_has_every_folder():
    tree = (ROOT / "README.md").read_text("utf-8").partition("## Where things are")[2]
    told = set(re.findall(r"(?m)^  (\w+)/ ", tree))
    assert told == {file.parent.name for file in (ROOT / "rlpost").glob("*/__init__.py")}


def test_the_newest_version_of_the_changelog_is_this_one():
    version = re.search(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"))
    told = re.findall(r"(?m)^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"))
    assert version is not None
    assert told[0] == version[1] == rlpost.__version__
