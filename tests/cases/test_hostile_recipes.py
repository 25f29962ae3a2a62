"""Recipes that would take minutes or gigabytes, and names that YAML does not read as names: refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_world import rlpost

from rlpost.recipe.resolve import resolve

BASE = """
model: {path: m}
stages:
  s: {kind: sft, data: {c: {path: d.jsonl}}, steps: 1, learning_rate: 1e-3}
"""


def variables(*lines: str, first: str = "  v0: xxxxxxxxxxxxxxxx") -> str:
    return "\n".join(["vars:", first, *lines]) + BASE


def chain(n: int, text: str) -> list[str]:
    """v1 to v(n-1), each `text` with @ for the one before."""
    return [f"  v{i}: {text.replace('@', '${vars.v' + str(i - 1) + '}')}" for i in range(1, n)]


GREW = "references amount to more than 1000000 characters"
CIRCLE = "refers to itself"
NAMED = [f"  k{i}: v{i}\n  v{i}: '{2 * f'${{vars.${{vars.k{i - 1}}}}}'}'" for i in range(1, 40)]
HOSTILE = {
    "doubling": (variables(*chain(40, "@@")), GREW),
    "doubling, last first": (variables(*reversed(chain(40, "@@"))), GREW),
    "doubling mappings": (variables(*chain(40, "{a: '@', b: '@'}")), GREW),
    "doubling lists": (variables(*reversed(chain(40, "['@', '@']")), first="  v0: [x]"), GREW),
    "doubling by relative names": (variables(*(f"  v{i}: ${{.v{i - 1}}}${{.v{i - 1}}}" for i in range(1, 40))), GREW),
    "doubling by names of names": (
        variables(
            *(f"  k{i}: v{i}\n  v{i}: '{2 * f'${{vars.${{vars.k{i - 1}}}}}'}'" for i in range(1, 40)), "  k0: v0"
        ),
        GREW,
    ),
    "a chain of thousands, last first": (
        variables(*reversed(chain(3000, "@"))),
        "in a circle, or are nested too deeply",
    ),
    "circle": ("vars: {a: '${vars.b}', b: '${vars.a}'}" + BASE, CIRCLE),
    "circle by relative names": ("vars: {a: '${.b}', b: '${.a}'}" + BASE, CIRCLE),
    "itself": ("vars: {a: '${vars.a}'}" + BASE, CIRCLE),
    "what is around it": ("vars: {a: {b: '${vars}'}}" + BASE, CIRCLE),
    "many in one value": (variables("  v1: '" + 5000 * "${vars.v0}" + "'"), "more than 20000 characters"),
    "open brackets": ("vars: {a: '" + 5000 * "${" + "'}" + BASE, "a reference is not closed"),
    "references inside one another": ("vars: {a: '" + 3000 * "${" + "x" + 3000 * "}" + "'}" + BASE, "more than 5 deep"),
    "deep list": ("vars: {a: " + 2000 * "[" + 2000 * "]" + "}" + BASE, "nested too deeply"),
    "deep mapping": ("vars: " + 300 * "{a: " + "1" + 300 * "}" + BASE, "nested too deeply"),
    "5,000 digits": (BASE + "seed: " + 5000 * "9", "integer"),
    "400 digits": (BASE.replace("1e-3", 400 * "9"), "stages.s.learning_rate: expected a number of fewer digits"),
    "5,000 digits in quotes": (BASE + "seed: '" + 5000 * "9" + "'", "seed: expected a whole number"),
    "megabytes": (2_000_000 * "#" + BASE, "larger than 256 kB"),
    "thousands of stages": ("stages:\n" + "".join(f"  s{i}: {{kind: sft}}\n" for i in range(3000)), "at most 100"),
    "binary": ("\x00\x01" + BASE, "not YAML"),
    "alias": ("vars: {a: &a [x], b: *a}" + BASE, "anchors and aliases are refused"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_recipe_that_would_grow_without_bound_is_one_line(name: str, here: Path, tally) -> None:
    text, said = HOSTILE[name]
    Path("r.yaml").write_text(text)
    ran = rlpost("show", "r.yaml")
    assert ran.refused(2, said), ran.err
    tally("hostile recipes", refused=1)


def test_references_of_ordinary_size_mean_what_they_did(here: Path, tally) -> None:
    Path("r.yaml").write_text(
        "vars: {k: name, name: r1, long: '" + 15_000 * "x" + "', size: 3, list: [1, 2], z: '${.name}-${vars.size}', "
        "y: '${vars.${vars.k}}', x: '${vars.y}'}" + BASE.replace("steps: 1", "steps: '${vars.size}'")
        + "run: ${vars.${vars.k}}\ndescription: '${vars.z} ${vars.x} ${vars.list[1]} ${vars.long}'\n"
    )  # fmt: skip
    config = resolve("r.yaml").config
    assert (config.run, config.stages["s"].steps) == ("r1", 3)
    assert config.description == "r1-3 r1 2 " + 15_000 * "x"
    tally("hostile recipes", right=1)


NAMES = ("1", "1.5", "2024", "1e3", ".inf", "no", "on", "true", "null", "~", "[a]", "{a: b}")
PLACES = ("stage", "inherited stage", "source", "argument", "variable", "column")
QUICK = [(name, place) for name in NAMES for place in PLACES if place == "stage" or name in ("no", "[a]")]
SLOW = [(name, place) for name in NAMES for place in PLACES if (name, place) not in QUICK]


@pytest.mark.parametrize(("name", "place"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_a_name_that_is_none_to_yaml_is_one_line(name: str, place: str, here: Path, tally) -> None:
    stage = "{kind: sft, data: {c: {path: d.jsonl}}, steps: 1, learning_rate: 1e-3}"
    Path("base.yaml").write_text(BASE)
    text = {
        "stage": f"model: {{path: m}}\nstages:\n  {name}: {stage}\n",
        "inherited stage": f"defaults: [base]\nstages:\n  {name}: {stage}\n",
        "source": BASE.replace("{c:", f"{{{name}:"),
        "argument": BASE.replace("steps: 1", f"steps: 1, loss: {{fn: nll, args: {{{name}: 1}}}}"),
        "variable": f"vars: {{{name}: 1}}" + BASE,
        "column": BASE.replace("path: d.jsonl", f"path: d.jsonl, columns: {{{name}: x}}"),
    }[place]
    Path("r.yaml").write_text(text)
    assert rlpost("show", "r.yaml").refused(
        2, "put it in quotes" if name[0] not in "n~[{" or name == "no" else "r.yaml:"
    )
    quoted = text.replace(f"{name}: {stage}", f"'{name}': {stage}")
    if place == "stage" and name in ("1", "2024", "no", "on", "true", "null"):
        Path("r.yaml").write_text(quoted)
        assert list(resolve(str(Path("r.yaml"))).config.stages) == [name]
        tally("names that YAML reads as something else", right=1)
    tally("names that YAML reads as something else", refused=1)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "latin-1", "unreadable", "broken link"])
def test_what_is_no_recipe_file(kind: str, here: Path, tally) -> None:
    path = Path("r.yaml")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "latin-1":
        path.write_bytes(b"description: caf\xe9\n")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    else:
        path.symlink_to("/proc/1/environ" if os.getuid() else "/proc/self/mem")
    said = "cannot be read" if kind == "unreadable" else "r.yaml"
    assert rlpost("show", "r.yaml").refused(2, said)
    assert rlpost("train", "r.yaml").refused(2, said)
    tally("hostile recipes", refused=2)


def test_a_chain_of_thousands_that_does_not_grow_is_filled_in(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(variables(*chain(3000, "@")))
    assert resolve(str(tmp_path / "r.yaml")).config.vars["v2999"] == "x" * 16
