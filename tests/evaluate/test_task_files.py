"""Task files of lm-eval: what is read, and what is refused before anything of them runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from rlpost.cli.app import main
from rlpost.errors import DataError, RecipeError
from rlpost.evaluate.task_files import read_task_files
from rlpost.inference.harness import exact_enough
from rlpost.policy.params import Model, Precision

SUMS = {
    "task": "sums",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
}


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> None:
    monkeypatch.setattr("rlpost.evaluate.task_files.find_spec", lambda name: name)


def write(file: Path, text: str = "", **settings: object) -> Path:
    rows = file.with_name("rows.jsonl")
    rows.write_text('{"prompt": "1+1=", "answer": "2"}\n', "utf-8")
    made = {**SUMS, "dataset_kwargs": {"data_files": {"test": str(rows)}}, **settings}
    kept = {key: value for key, value in made.items() if value is not None}
    file.write_text(yaml.safe_dump(kept) + text, "utf-8")
    return file


def test_files_and_folders(tmp_path):
    (tmp_path / "more").mkdir()
    write(tmp_path / "a.yaml")
    write(tmp_path / "shared.yaml", task=None)
    write(tmp_path / "more/b.yaml", task="more_sums")
    (tmp_path / "more/c.yaml").write_text("include: ../shared.yaml\ntask: inherited\ndoc_to_text: '{{prompt}} '\n")
    found = read_task_files([str(tmp_path)])
    assert [task.name for task in found] == ["sums", "more_sums", "inherited"]
    assert found[2].settings["doc_to_text"] == "{{prompt}} "
    assert found[2].settings["doc_to_target"] == "{{answer}}"
    assert [task.name for task in read_task_files([str(tmp_path / "a.yaml"), str(tmp_path / "a.yaml")])] == ["sums"]


def test_the_documented_task_is_one(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/lm-eval.md").read_text("utf-8")
    write(tmp_path / "a.yaml")
    (tmp_path / "rows.jsonl").rename(tmp_path / "sums.jsonl")
    (tmp_path / "sums.yaml").write_text(page.partition("```yaml sums.yaml\n")[2].partition("```")[0], "utf-8")
    monkeypatch.chdir(tmp_path)
    assert [task.name for task in read_task_files(["sums.yaml"])] == ["sums"]


def test_code_is_refused_where_it_stands_unless_trusted(tmp_path):
    file = write(tmp_path / "a.yaml", "process_docs: !function utils.process\n")
    line = len(file.read_text("utf-8").splitlines())
    with pytest.raises(RecipeError, match=rf"a\.yaml:{line}: !function utils\.process runs Python.*--trust-tasks"):
        read_task_files([str(file)])
    assert read_task_files([str(file)], trusted=True)[0].settings["process_docs"] == "utils.process"
    (tmp_path / "b.yaml").write_text("include: a.yaml\ntask: b\nprocess_docs: null\n")  # imported all the same
    with pytest.raises(RecipeError, match=r"a\.yaml:.*!function"):
        read_task_files([str(tmp_path / "b.yaml")])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset_path": "pandas"}, "dataset_path: pandas: not a file here"),  # it unpickles
        ({"dataset_path": "openai/gsm8k"}, "dataset_path: openai/gsm8k: not a file here"),
        ({"dataset_kwargs": {"data_files": ["https://example.org/a.json"]}}, "https://example.org/a.json: not a file"),
        ({"metric_list": [{"metric": "mine", "hf_evaluate": True}]}, "hf_evaluate loads a metric's code"),
        ({"use_prompt": "promptsource:all"}, "use_prompt"),
    ],
)
def test_what_loads_from_elsewhere_is_refused_unless_trusted(tmp_path, settings, said):
    file = str(write(tmp_path / "a.yaml", **settings))
    with pytest.raises(RecipeError, match=said) as refused:
        read_task_files([file])
    assert "--trust-tasks" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert read_task_files([file], trusted=True)


def test_wrong_files_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("task: [a\nb: c\n")
    (tmp_path / "round.yaml").write_text("include: round.yaml\ntask: a\n")
    (tmp_path / "to_nothing.yaml").write_text("include: absent.yaml\ntask: a\n")
    write(tmp_path / "no_task.yaml", task=None)
    write(tmp_path / "group.yaml", task=["a", "b"], group="g")
    write(tmp_path / "unsafe.yaml", unsafe_code=True)
    said = {
        "absent.yaml": "no such file",
        "empty": "no .yaml file with `task: NAME` in it",
        "list.yaml": "not a mapping",
        "broken.yaml": "not YAML",
        "round.yaml": "includes itself",
        "to_nothing.yaml": r"to_nothing.yaml: include: .*absent.yaml: no such file",
        "no_task.yaml": "no `task: NAME`",
        "group.yaml": "a group of tasks",
        "unsafe.yaml": "runs what the model writes",
    }
    for name, words in said.items():
        with pytest.raises(RecipeError, match=words) as refused:
            read_task_files([str(tmp_path / name)], trusted=True)
        assert "\n" not in str(refused.value)
    missing = write(tmp_path / "rows.yaml", dataset_kwargs={"data_files": {"test": str(tmp_path / "absent.jsonl")}})
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        read_task_files([str(missing)])
    two = [write(tmp_path / "a.yaml"), write(tmp_path / "b.yaml")]
    with pytest.raises(RecipeError, match=r"task 'sums' is also in .*a\.yaml"):
        read_task_files(list(map(str, two)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "a.yaml"], "--tasks: only with --harness lm_eval"),
        (["--trust-tasks"], "--trust-tasks: only with --harness lm_eval"),
        (["--batch-size", "2"], "--batch-size: only with --harness lm_eval"),
        (["--harness", "lm_eval"], "--harness: needs --tasks FILE"),
        (["--harness", "helm", "--tasks", "a.yaml"], "'helm' is not"),
    ],
)
def test_options_that_belong_together(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["rlpost", "eval", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("rlpost.evaluate.task_files.find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"pip install 'rlpost\[harness\]'"):
        read_task_files([str(write(tmp_path / "a.yaml"))])


def test_choices_are_compared_in_float32_unless_a_recipe_says_otherwise(tmp_path):
    choices, answers = write(tmp_path / "a.yaml", output_type="multiple_choice"), write(tmp_path / "b.yaml", task="b")
    auto, half = Model(), Model(precision=Precision.bfloat16)
    for files, model, found in [
        ([choices, answers], auto, Precision.float32),
        ([answers], auto, Precision.auto),
        ([choices], half, Precision.bfloat16),
    ]:
        assert exact_enough(model, read_task_files(list(map(str, files)))).precision is found
