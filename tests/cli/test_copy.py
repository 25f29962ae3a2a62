"""`rlpost copy`: every packaged recipe is the same from a file of one's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from rlpost.cli.app import main
from rlpost.cli.copy import copied, schema_file
from rlpost.recipe.files import describe, packaged
from rlpost.recipe.resolve import resolve

GIVEN = {name: ["vars.data=rows.jsonl"] for name in ("dpo_pairs", "sft_chat", "gsm8k_tiny")}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", "copy", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("name", ["demo", "demo_ppo", "gsm8k_tiny", "methods/process", "methods/start", "methods/tis"])
def test_a_copy_is_the_recipe(monkeypatch, tmp_path, capsys, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, name) == 0
    file = Path(f"{name.rpartition('/')[2]}.yaml")
    assert capsys.readouterr().out == f"{file}\n"
    given = GIVEN.get(name, [])
    of_copy, of_packaged = (yaml.safe_load(resolve(r, [*given, "folder=/x"]).to_yaml()) for r in (str(file), name))
    assert of_copy == of_packaged
    assert describe(file) == of_packaged["description"]


@pytest.mark.parametrize("name", packaged())
def test_all_that_a_copy_inherits_has_a_name_from_anywhere(name: str) -> None:
    text = copied(name, "mine.yaml")
    assert text.startswith(f"# yaml-language-server: $schema={schema_file()}\n")
    entries = yaml.safe_load(text).get("defaults", [])
    assert all(entry == "_self_" or isinstance(entry, dict) or entry in packaged() for entry in entries)
    assert ("\n# rlpost train mine.yaml" in text) == (f"# rlpost train {name}" in copied(name, name))


def test_the_schema_has_no_space_in_its_address(monkeypatch) -> None:
    monkeypatch.setattr("rlpost.cli.copy.schema_file", lambda: Path("/a folder/schema.json"))
    assert copied("demo", "d.yaml").startswith("# yaml-language-server: $schema=file:///a%20folder/schema.json\n")


def test_the_schema_is_printed_as_it_ships(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["rlpost", "schema"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code or 0, capsys.readouterr().out) == (0, schema_file().read_text("utf-8"))


def test_where_a_copy_goes(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert run(monkeypatch, "methods/rloo", "mine") == 0
    assert run(monkeypatch, "methods/rloo", "other.yml") == 0
    assert capsys.readouterr().out == "mine/rloo.yaml\nother.yml\n"
    before = Path("other.yml").read_text()
    assert re.search(r"(?m)^# rlpost train other\.yml ", before)
    Path("other.yml").write_text("mine: now\n")
    for words, said in [
        (["demo", "other.yml"], "other.yml: is there already - give another FILE, or remove it"),
        (["demo", "mine.txt"], "mine.txt: a recipe's file ends in .yaml - give mine.txt.yaml"),
        (["demo", "no/where.yaml"], "no/where.yaml: No such file or directory - give another FILE"),
        (["rloo"], "rloo: no packaged recipe of that name - did you mean 'methods/rloo'?"),
        (["other.yml"], "other.yml: is a file of yours already - `cp` copies it"),
    ]:
        assert run(monkeypatch, *words) == (5 if "No such file" in said else 2)
        assert capsys.readouterr().err == f"rlpost: {said}\n"
    assert Path("other.yml").read_text() == "mine: now\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "other.yml"]
