"""What every module keeps to: who imports whom, what is quick to import, how long things are, what is not called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlpost"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS: list[set[str]] = [
    {"errors", "section", "strict_yaml", "suggest"},
    {"devices", "facts", "params", "ranks"},
    {"agreement", "results", "streams", "unexpected"},
    {"console", "kernels", "objectives", "types"},
    {"sandbox", "usercode"},
    {"tools"},
    {"data", "rewards", "run"},
    {"policy", "trackers"},
    {"engine"},
    {"environments", "train"},
    {"evaluate", "oracle"},
    {"recipe"},
    {"stages"},
    {"base_model", "smoke", "stage_evaluation", "stage_rows"},
    {"inference"},
    {"goals"},
    {"pipeline"},
    {"api"},
    {"report", "sweep"},
    {"cli"},
    {"__main__"},
    {"__init__"},
]
"""A module imports from floors below its own, and from its own package; not from a neighbour on its floor."""
SHARED_BY_STAGES = (
    "advantage",
    "ahead",
    "balancing",
    "beside",
    "context",
    "coupling",
    "entropy",
    "exclusion",
    "expert",
    "focus",
    "generate_dataset",
    "meeting",
    "off_policy",
    "on_policy",
    "pairwise",
    "params",
    "references",
    "replies",
    "role_means",
    "rollouts",
    "self_play",
    "supervised",
    "teachers",
)
"""Modules of stages/ that are no stage."""
READS_RECIPES = (
    "api",
    "base_model",
    "cli",
    "inference",
    "pipeline",
    "recipe",
    "report",
    "smoke",
    "stage_evaluation",
    "stage_rows",
    "stages",
    "sweep",
)
GOALS_OF_RECIPES = tuple(
    f"goals/{name}.py" for name in ("guided", "maze_escapes", "maze_run", "value", "value_annotations")
)
"""Stages and commands of the goals wing."""
LIGHT = (
    *(
        "__init__",
        "__main__",
        "agreement",
        "api",
        "cli",
        "console",
        "data",
        "errors",
        "facts",
        "section",
        "recipe",
        "results",
        "rewards",
    ),
    *("params", "ranks", "run", "smoke", "streams", "strict_yaml", "suggest", "sweep", "trackers", "unexpected"),
    "sandbox",
    "tools",
    "usercode",
)
"""Imported without torch and what takes as long: help, typing errors and data errors come at once."""
LONGEST_FUNCTION = 60
LONGEST_FILE = 400


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """Of its syntax: read once for all tests."""
    return tuple(ast.walk(ast.parse(file.read_text("utf-8"))))


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    """A million nodes would slow down every collection of garbage in the files after this one."""
    yield
    nodes.cache_clear()


def top(file: Path) -> str:
    """The module, or the package, that a file belongs to: `rlpost/data/chat.py` to data; what recipes set is apart."""
    if file.name == "params.py":
        return "params"
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules_imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module is not None
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of such an expression; what is not a name becomes an empty part."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls() -> Iterator[tuple[Path, str, ast.Call]]:
    for file in FILES:
        for node in nodes(file):
            if isinstance(node, ast.Call):
                yield file, dotted(node.func), node


def test_every_module_has_its_floor():
    found = {top(file) for file in FILES}
    assert found == set().union(*FLOORS)


def test_imports_go_down():
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = []
    for file in FILES:
        for line, name in modules_imported(file):
            package, *rest = name.split(".")
            owner = "params" if rest[1:2] == ["params"] else (rest or [""])[0]
            if package == "rlpost" and owner != top(file) and height[owner] >= height[top(file)]:
                wrong.append(f"{file.relative_to(PACKAGE)}:{line} imports {name}")
    assert wrong == []


def test_recipes_are_read_at_the_top():
    """What a package is told of a recipe is its own params.py; whole recipes are for those who run them."""
    wrong = []
    for file in FILES:
        place = file.relative_to(PACKAGE)
        for line, name in modules_imported(file):
            if (
                name.startswith("rlpost.recipe.")
                and top(file) not in READS_RECIPES
                and str(place) not in GOALS_OF_RECIPES
            ):
                wrong.append(f"{place}:{line} imports {name}")
    assert wrong == []


def test_stages_do_not_know_each_other():
    wrong = []
    for file in (PACKAGE / "stages").glob("*.py"):
        for line, name in modules_imported(file):
            if name.startswith("rlpost.stages.") and name.split(".")[2] not in SHARED_BY_STAGES:
                wrong.append(f"{file.name}:{line} imports {name}")
    assert wrong == []


def test_objectives_need_torch_alone():
    for file in (PACKAGE / "objectives").glob("*.py"):
        for line, name in modules_imported(file):
            assert name.split(".")[0] in {"torch", "rlpost", *sys.stdlib_module_names}, f"{file.name}:{line}: {name}"


def test_light_modules_are_imported_without_the_heavy_ones():
    modules = [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if top(file) in LIGHT
    ]
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    heavy = [h for h in ("torch", "transformers", "datasets", "peft", "accelerate") if h in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_short(file):
    assert len(file.read_text("utf-8").splitlines()) <= LONGEST_FILE
    for node in nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def test_nothing_runs_text_or_unpickles():
    refused = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}
    for file, name, call in calls():
        place = f"{file.relative_to(PACKAGE)}:{call.lineno}: {name}"
        assert name not in refused, place
        assert not name.endswith("instantiate"), place
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        shell = keywords.get("shell")
        assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False), place
        if name == "torch.load":
            safe = keywords.get("weights_only")
            assert isinstance(safe, ast.Constant), place
            assert safe.value is True, place
    for file in FILES:
        for line, name in modules_imported(file):
            assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, f"{file}:{line}"


def test_a_users_file_is_loaded_in_one_place():
    places = {str(file.relative_to(PACKAGE)) for file, name, _ in calls() if name.endswith("exec_module")}
    assert places == {"usercode/load.py"}


def test_code_that_comes_with_a_model_is_never_run():
    seen = 0
    for file, name, call in calls():
        place = f"{file.relative_to(PACKAGE)}:{call.lineno}"
        given = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
        assert all(isinstance(value, ast.Constant) and value.value is False for value in given), place
        if name.startswith("Auto") and name.endswith("from_pretrained"):
            seen += 1
            assert given, f"{place} leaves trust_remote_code to its default"
    assert seen >= 2


def test_only_the_console_knows_rich_and_only_the_command_line_prints():
    for file in FILES:
        for line, name in modules_imported(file):
            assert top(file) == "console" or name.split(".")[0] != "rich", f"{file}:{line}"
    for file, name, call in calls():
        allowed = top(file) == "cli" or file.name == "math_worker.py"
        assert name != "print" or allowed, f"{file}:{call.lineno}"
