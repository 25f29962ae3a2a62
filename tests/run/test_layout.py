"""Opening a run directory: names, lock, recorded recipe, changes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlpost.errors import DataError, DiskError, RecipeError, RunInUseError
from rlpost.policy.params import Lora, Model
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.grpo import Grpo
from rlpost.recipe.specs.sft import Sft
from rlpost.run.layout import open_run
from rlpost.run.sealed import seal, unseal
from rlpost.run.stage import StageDirectory


def recipe(runs: Path, **changes):
    whole = Recipe(run="first", runs=str(runs), model=Model(path="gpt2"))
    whole.stages = {"sft": Sft(learning_rate=0.001, steps=10), "grpo": Grpo(learning_rate=1e-5, steps=10)}
    tree = whole.model_dump(mode="json")
    for key, value in changes.items():
        *above, last = key.split("__")
        inner = tree
        for name in above:
            inner = inner[name]
        inner[last] = value
    return tree


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def heard(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("rlpost.console.warn", lines.append)
    return lines


def reopen(node, allow_change=False, functions=None):
    with open_run(node, None, [], allow_change, functions) as run:
        return run


def begun(path: Path, stage: str = "sft", *, done: bool = False) -> Path:
    """A run in which a stage has a checkpoint, and perhaps a result."""
    directory = StageDirectory(path / stage)
    directory.save(5, {}, {}, keep=1)
    if done:
        directory.finish(lambda f: (f / "model.safetensors").write_bytes(b"1") and None, {}, {"step": 5})
    return path


def test_a_new_run_records_its_recipe_and_what_it_runs_on(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "planted-secret-value")
    given = tmp_path / "mine.yaml"
    given.write_text("# as written\nrun: first\n")
    with open_run(recipe(runs), given, ["seed=0", "a=b c"], functions={"r.py:f": "ab" * 32}) as run:
        assert run.path == runs / "first"
        assert run.base == runs / "first" / "base"
        assert run.stage("sft").path == runs / "first" / "sft"
    assert (run.path / "recipe.yaml").read_text() == given.read_text()
    assert (run.path / "overrides.txt").read_text() == "seed=0\na=b c\n"
    config = yaml.safe_load((run.path / "config.resolved.yaml").read_text())
    assert config["stages"]["sft"]["kind"] == "sft"
    assert list(config["stages"]) == ["sft", "grpo"]
    assert config["model"]["path"] == "gpt2"
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["functions"] == {"r.py:f": "ab" * 32}
    assert environment["versions"]["torch"][0].isdigit()
    assert sorted(p.name for p in run.path.iterdir()) == [
        ".lock", "config.resolved.yaml", "environment.json", "overrides.txt", "recipe.yaml", "run.json",
    ]  # fmt: skip
    for path in run.path.iterdir():
        assert b"planted-secret-value" not in path.read_bytes()


def test_the_same_recipe_again_changes_nothing(runs, heard):
    first = reopen(recipe(runs))
    before = {p.name: p.read_bytes() for p in first.path.iterdir()}
    reopen(recipe(runs))
    assert {p.name: p.read_bytes() for p in first.path.iterdir()} == before
    assert heard == []


def test_another_setting_is_refused_with_old_and_new(runs):
    path = begun(reopen(recipe(runs)).path)
    with pytest.raises(RecipeError) as raised:
        reopen(recipe(runs, stages__grpo__steps=20, stages__sft__learning_rate=0.002))
    assert str(raised.value) == (
        f"{path}: this run was started with other settings: stages.sft.learning_rate: 0.001 -> 0.002; "
        "stages.grpo.steps: 10 -> 20; pass --allow-change to go on with the new, or choose another run=NAME"
    )
    reopen(recipe(runs))


def test_a_run_in_which_nothing_was_trained_takes_the_recipe_as_it_is(runs, capsys):
    path = reopen(recipe(runs)).path
    (path / "sft").mkdir()
    (path / "sft" / "metrics.jsonl").write_text("{}")
    node = recipe(runs, seed=7)
    node["model"]["path"] = "gpt2-medium"
    reopen(node)
    assert (
        "nothing was trained yet, so the run takes the recipe as it is now: seed: 0 -> 7; " in capsys.readouterr().err
    )
    assert yaml.safe_load((path / "config.resolved.yaml").read_text())["model"]["path"] == "gpt2-medium"
    begun(path)
    with pytest.raises(RecipeError, match=r"seed: 7 -> 0"):
        reopen(recipe(runs))


def test_a_change_can_be_allowed_and_the_old_recipe_is_kept(runs, heard):
    path = begun(reopen(recipe(runs)).path)
    reopen(recipe(runs, stages__sft__learning_rate=0.002), allow_change=True)
    said = "stages.sft.learning_rate: 0.001 -> 0.002"
    assert heard == [f"{path}: going on with changed settings, from here on: {said}"]
    reopen(recipe(runs, stages__sft__learning_rate=0.003), allow_change=True)
    configs = {p.name: yaml.safe_load(p.read_text()) for p in path.glob("config*")}
    rates = {name: config["stages"]["sft"]["learning_rate"] for name, config in configs.items()}
    assert rates == {
        "config.resolved.1.yaml": 0.001,
        "config.resolved.2.yaml": 0.002,
        "config.resolved.yaml": 0.003,
    }
    record = json.loads((path / "run.json").read_text())
    changed = [{"key": "stages.sft.learning_rate", "old": "0.001", "new": "0.002"}]
    assert record["changes"][0] == {"at": {"stage": "sft", "step": 5}, "changes": changed}
    assert len(record["changes"]) == 2
    reopen(recipe(runs, stages__sft__learning_rate=0.003))


def attempt(node, *, step: int | None) -> None:
    """Go on with an allowed change, and fail: at once, or after a checkpoint."""
    with open_run(node, Path(__file__), ["a=b"], allow_change=True) as run:
        assert len(run.record.changes) == 1
        if step is not None:
            run.stage("sft").save(step, {}, {}, keep=1)
        raise DataError("other rows")


def test_a_change_under_which_nothing_was_trained_is_taken_back(runs):
    path = begun(reopen(recipe(runs)).path)
    before = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}
    changed = recipe(runs, stages__sft__learning_rate=0.002)
    with pytest.raises(DataError):
        attempt(changed, step=None)
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()} == before
    with pytest.raises(DataError):
        attempt(changed, step=6)
    assert yaml.safe_load((path / "config.resolved.yaml").read_text())["stages"]["sft"]["learning_rate"] == 0.002
    reopen(changed)


REFUSED = {
    # key -> (new value, is sft finished, words of the reason)
    "seed": (7, False, "all that was trained stands on it; choose another run=NAME"),
    "model.path": ("gpt2-medium", False, "all that was trained stands on it"),
    "model.lora": (Lora(r=8).model_dump(), False, "all that was trained stands on it"),
    "model.revision": ("abc", True, "all that was trained stands on it"),
    "stages.sft.start": ("base", False, "the checkpoints of sft stand on it"),
    "stages.sft.learning_rate": (0.002, True, "sft is finished and was trained with the old value; "),
    "stages.sft.steps": (3, True, "sft is finished and was trained with the old value; "),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_change_that_cannot_be_applied_is_refused_whatever_is_allowed(runs, key):
    value, done, reason = REFUSED[key]
    path = begun(reopen(recipe(runs)).path, done=done)
    before = (path / "config.resolved.yaml").read_text()
    for allowed in (False, True):
        with pytest.raises(RecipeError) as raised:
            reopen(recipe(runs, **{key.replace(".", "__"): value}), allow_change=allowed)
        assert reason in str(raised.value)
        assert "--allow-change" not in str(raised.value)
        assert f"{key}: " in str(raised.value) or f"{key}.r: " in str(raised.value)
    assert (path / "config.resolved.yaml").read_text() == before
    reopen(recipe(runs))


APPLIED = {
    "model.precision": "bfloat16",
    "model.attention": "padded",
    "stages.sft.learning_rate": 0.002,
    "stages.sft.steps": 20,
    "stages.sft.batch_size": 16,
    "stages.grpo.kl.beta": 0.1,
    "stages.grpo.start": "base",
    "stages.grpo.reference": "base",
    "folder": "/elsewhere",
}


@pytest.mark.parametrize("key", APPLIED)
def test_a_change_that_takes_effect_from_here_on_can_be_allowed(runs, key, heard):
    path = begun(reopen(recipe(runs)).path)
    changed = recipe(runs, **{key.replace(".", "__"): APPLIED[key]})
    with pytest.raises(RecipeError, match=r"pass --allow-change"):
        reopen(changed)
    reopen(changed, allow_change=True)
    assert len(heard) == 1
    assert f"{key}: " in heard[0]
    value = yaml.safe_load((path / "config.resolved.yaml").read_text())
    for part in key.split("."):
        value = value[part]
    assert value == APPLIED[key]


def test_a_finished_stage_can_be_made_longer_until_a_later_one_has_begun(runs, heard):
    path = begun(reopen(recipe(runs)).path, done=True)
    longer = recipe(runs, stages__sft__steps=20)
    reopen(longer, allow_change=True)
    assert "stages.sft.steps: 10 -> 20" in heard[0]
    begun(path, "grpo")
    with pytest.raises(RecipeError) as raised:
        reopen(recipe(runs, stages__sft__steps=30), allow_change=True)
    assert "grpo was trained from sft as it is; choose another run=NAME, or remove " in str(raised.value)
    assert f"{path}/grpo to train it again" in str(raised.value)


def test_a_finished_stage_without_its_last_state_cannot_be_made_longer(runs):
    path = begun(reopen(recipe(runs)).path, done=True)
    (path / "sft/checkpoints/step-000005").rename(path / "sft/checkpoints/step-000004")
    with pytest.raises(RecipeError, match=r"sft is finished and kept no state to go on from; .*remove .*/sft to train"):
        reopen(recipe(runs, stages__sft__steps=20), allow_change=True)


def test_stages_trained_after_another_are_not_left_standing_on_nothing(runs):
    path = begun(begun(reopen(recipe(runs)).path, done=True), "grpo")
    swapped = recipe(runs)
    swapped["stages"] = {name: swapped["stages"][name] for name in ("grpo", "sft")}
    alone = recipe(runs)
    alone["stages"] = {"grpo": alone["stages"]["grpo"]}
    first = recipe(runs)
    first["stages"] = {"new": first["stages"]["sft"], **first["stages"]}
    for node, words in (
        (swapped, "trained in the old order"),
        (alone, "grpo was trained without this change"),
        (first, "sft, grpo were trained without this change"),
        (recipe(runs, stages__sft__enabled=False), "grpo was trained without this change"),
    ):
        with pytest.raises(RecipeError, match=words):
            reopen(node, allow_change=True)
    assert path.exists()


def test_what_changes_no_weight_may_change(runs, heard):
    path = begun(reopen(recipe(runs)).path)
    reopen(recipe(runs, threads=3, description="new", stages__sft__checkpoint_every=5))
    assert heard == []
    assert yaml.safe_load((path / "config.resolved.yaml").read_text())["threads"] == 3


def test_a_stage_may_be_switched_until_it_is_done_or_a_later_one_begun(runs):
    path = reopen(recipe(runs)).path
    reopen(recipe(runs, stages__sft__enabled=False))
    reopen(recipe(runs, stages__sft__enabled=True))
    begun(path, done=True)
    with pytest.raises(RecipeError, match=r"stages.sft.enabled: true -> false"):
        reopen(recipe(runs, stages__sft__enabled=False))
    longer = recipe(runs)
    longer["stages"]["more"] = Sft(learning_rate=0.001).model_dump(mode="json")
    reopen(longer)
    reopen(recipe(runs))
    (path / "grpo").mkdir()
    reopen(recipe(runs, stages__grpo__enabled=False))
    reopen(longer)
    begun(path, "more")
    longer["stages"]["grpo"]["enabled"] = False
    with pytest.raises(RecipeError, match=r"stages.grpo.enabled: true -> false"):
        reopen(longer)


def test_changed_code_of_a_function_is_a_change(runs, heard):
    path = begun(reopen(recipe(runs), functions={"r.py:f": "a" * 64}).path)
    with pytest.raises(RecipeError, match=r"code of r.py:f: sha256 aaaaaaaaaaaa -> sha256 bbbbbbbbbbbb; pass --allow"):
        reopen(recipe(runs), functions={"r.py:f": "b" * 64})
    reopen(recipe(runs), functions={"r.py:f": "b" * 64}, allow_change=True)
    reopen(recipe(runs), functions={"r.py:f": "b" * 64})
    assert len(heard) == 1
    assert json.loads((path / "environment.json").read_text())["functions"] == {"r.py:f": "b" * 64}


def test_another_version_is_told_and_the_old_environment_kept(runs, heard, monkeypatch):
    path = reopen(recipe(runs)).path
    monkeypatch.setattr("rlpost.run.environment._version", lambda _: "99.0")
    reopen(recipe(runs))
    assert len(heard) == 1
    assert "torch: " in heard[0]
    assert " -> 99.0" in heard[0]
    assert (path / "environment.1.json").exists()
    reopen(recipe(runs))
    assert len(heard) == 1


def test_the_saved_recipe_replays_the_run(runs):
    node = recipe(runs)
    with open_run(node, Path(__file__), []) as run:
        text = (run.path / "recipe.yaml").read_text()
    with open_run(recipe(runs, threads=2), run.path / "config.resolved.yaml", []):
        pass
    assert (run.path / "recipe.yaml").read_text() == text, "the recipe as given is not replaced by the resolved one"


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "../out", "a b", "ä", "x" * 81, "a\n", "/tmp", "a\x00"])
def test_bad_names_are_refused(runs, name):
    with pytest.raises(RecipeError, match=r"^run: .* is not a name of a run"):
        reopen(recipe(runs, run=name))
    assert not runs.exists()


def test_a_link_out_of_the_runs_folder_is_refused(runs, tmp_path):
    runs.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (runs / "first").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=r"is a link out of"):
        reopen(recipe(runs))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["base", "", "a.b", "../x", "a/b", "x.tmp-1"])
def test_bad_names_of_stages_are_refused(runs, name):
    run = reopen(recipe(runs))
    with pytest.raises(RecipeError, match=r"not a name of a stage"):
        run.stage(name)


def test_a_folder_of_something_else_is_not_taken_over(runs):
    (runs / "first").mkdir(parents=True)
    (runs / "first" / "thesis.txt").write_text("")
    with pytest.raises(RecipeError, match=r"holds thesis.txt but no run.json"):
        reopen(recipe(runs))


def test_a_kill_while_a_run_begins_is_forgotten(runs):
    (runs / "first").mkdir(parents=True)
    for name in (".lock", ".pid", "environment.json", "overrides.txt", "config.resolved.yaml.tmp-12"):
        (runs / "first" / name).write_text("")
    path = reopen(recipe(runs)).path
    assert not list(path.glob("*.tmp-*"))


def test_places_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(DiskError, match=r"runs.*: .*; remove the file that stands in the way"):
        reopen(recipe(runs))


@pytest.mark.parametrize("name", ["config.resolved.yaml", "environment.json", "decisions.json"])
def test_a_damaged_copy_is_written_anew_aloud(runs, heard, name):
    run = reopen(recipe(runs))
    run.decide_once("bfloat16", lambda: True)
    begun(run.path)
    whole = (run.path / name).read_bytes()
    for data in (b"", b"a: [", b"\xff\xfe", b"[" * 5000, b"just text", whole.replace(b"true", b"false"), None):
        if data == whole:
            continue
        if data is None:
            (run.path / name).unlink()
        else:
            (run.path / name).write_bytes(data)
        reopen(recipe(runs))
        assert (run.path / name).read_bytes() == whole
        assert heard.pop() == f"{run.path / name}: not as it was written; rewritten from run.json"
        assert heard == []


@pytest.mark.parametrize("name", ["recipe.yaml", "overrides.txt"])
def test_a_changed_record_of_what_was_given_is_written_anew_aloud(runs, heard, name):
    with open_run(recipe(runs), Path(__file__), ["seed=0"]) as run:
        whole = (run.path / name).read_bytes()
    (run.path / name).write_bytes(b"")
    with open_run(recipe(runs), Path(__file__), ["seed=0"]):
        pass
    assert (run.path / name).read_bytes() == whole
    assert heard == [f"{run.path / name}: has changed since it was written; it is rewritten as given now"]
    with open_run(recipe(runs), Path(__file__), ["seed=0"]):
        pass
    assert len(heard) == 1


def test_without_its_record_a_run_is_not_gone_on_with(runs):
    path = begun(reopen(recipe(runs)).path)
    whole = (path / "run.json").read_bytes()
    for at in range(0, len(whole), 97):
        (path / "run.json").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(DiskError, match=r"run.json: damaged, .*; restore it or choose another run=NAME") as raised:
            reopen(recipe(runs))
        assert "\n" not in str(raised.value)
    (path / "run.json").unlink()
    with pytest.raises(RecipeError, match=r"holds sft but no run.json"):
        reopen(recipe(runs))


@pytest.mark.parametrize("form", [None, 1, 99])
def test_a_run_of_another_format_is_not_gone_on_with(runs, form):
    path = reopen(recipe(runs)).path / "run.json"
    record = unseal(path.read_bytes())
    other = {k: v for k, v in record.items() if k != "format"} | ({} if form is None else {"format": form})
    path.write_bytes(seal(other))
    with pytest.raises(DiskError, match=rf"run.json: format {form or 1}, this version .* another run=NAME"):
        reopen(recipe(runs))


def test_a_decision_is_taken_once(runs):
    run = reopen(recipe(runs))
    assert run.decide_once("precision", lambda: ("bfloat16", 1)) == ["bfloat16", 1]
    assert reopen(recipe(runs)).decide_once("precision", lambda: "float32") == ["bfloat16", 1]
    assert run.decide_once("nothing", lambda: None) is None
    assert run.decide_once("nothing", lambda: 3) is None


HOLD = """
import sys, time
from rlpost.run.layout import open_run
from rlpost.run.sealed import seal, unseal
from rlpost.run.stage import StageDirectory
node = {"run": "first", "runs": sys.argv[1], "threads": None, "stages": {}}
with open_run(node, None, []):
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_run_is_open_once_and_a_killed_holder_lets_go(runs):
    node = {"run": "first", "runs": str(runs), "threads": None, "stages": {}}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(runs)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(RunInUseError) as raised:
            reopen(node)
        assert str(raised.value).startswith(f"{runs / 'first'}: in use by process {holder.pid}; wait for it")
        assert raised.value.exit_code == 7
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert (runs / "first" / ".pid").read_text() == f"{holder.pid}\n"
    reopen(node)
    assert not (runs / "first" / ".pid").exists()


def test_a_run_is_open_once_in_one_process_too(runs):
    with open_run(recipe(runs), None, []), pytest.raises(RunInUseError, match=f"process {os.getpid()}"):
        reopen(recipe(runs))
    with pytest.raises(ZeroDivisionError), open_run(recipe(runs), None, []):
        raise ZeroDivisionError
    reopen(recipe(runs))


def test_run_needs_no_torch():
    code = "import sys, rlpost.run.layout, rlpost.run.interrupt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "rich", "transformers", "omegaconf", "filelock", "safetensors"} & set(loaded)
