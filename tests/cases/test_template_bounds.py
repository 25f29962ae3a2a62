"""A chat template is a program that came with a model: what it takes is bounded, and what it does wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_world import CHATML, byte_tokenizer, rlpost, save_model, save_recipe, save_rows, tiny_model

from rlpost.data.templates import Job, Talk, render_all

ASK, SAY = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WRONG = {
    "loops": (LOOP, "2 s of processor time"),
    "folded when compiled": ("{{ 'a' * 10 ** 10 }}", "1024 MiB of memory"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "a missing method": ("{{ messages.items() }}", "UndefinedError"),
    "syntax": ("{% if %}", "refuses it"),
    "its own words": ("{{ raise_exception('no chats today') }}", "no chats today"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "a file": ("{% include '/etc/passwd' %}", "TypeError"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = byte_tokenizer()
    return save_model(tmp_path_factory.mktemp("model"), tiny_model(vocabulary=len(tokenizer)), tokenizer)


def show(folder: Path, template: str):
    Path("t.jinja").write_text(template, "utf-8")
    save_rows(Path("rows.jsonl"), [{"messages": [ASK, SAY]}])
    stage = {"kind": "sft", "data": {"c": {"path": "rows.jsonl"}}, "steps": 1, "learning_rate": 1e-3}
    model = {"path": str(folder), "chat_template": "t.jinja"}
    save_recipe(Path("r.yaml"), {"model": model, "stages": {"s": stage}})
    return rlpost("show", "r.yaml", "--rows", 1)


SLOW = {
    "a wide field": ("{{ '%0100000000d' | format(1) }}", "million characters"),
    "doubling": (
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "1024 MiB of memory",
    ),
    "a tower": ("{% set x = 9 ** (9 ** 9) %}", "2 s of processor time"),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", "2 s of"),
    "a list": ("{% set x = (range(99999) | list) * 99999 %}", "1024 MiB of memory"),
    "words": ("{{ lipsum(n=99999) }}", "2 s of"),
    "padding": ("{{ 'a'.center(10 ** 10) }}", "1024 MiB of memory"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [*WRONG, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_template_that_cannot_be_used_is_refused_when_it_is_loaded(name, folder, here, tally):
    source, words = {**WRONG, **SLOW}[name]
    assert show(folder, source + CHATML).refused(4, "chat template", words, "model.chat_template")
    tally("chat templates that run away or fail", refused=1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "source", ["{% if m.content == 'Rain?' %}" + LOOP + "{% endif %}", "{% if 1 / (m.content != 'Rain?') %}{% endif %}"]
)
def test_one_that_runs_away_on_a_row_names_the_row(source, folder, here, tally):
    ran = show(folder, CHATML.replace("<|im_start|>", source + "<|im_start|>", 1))
    assert ran.refused(3, "rows.jsonl:1", "the chat template fails")
    tally("chat templates that run away or fail", refused=1)


def test_after_one_that_ran_away_others_are_rendered(folder, here, tally):
    wrong, right = byte_tokenizer("{{ 'a' * 10 ** 10 }}"), byte_tokenizer()
    talk = Talk([ASK, SAY])
    assert render_all(wrong, [Job(talk, 1), Job(talk, 2)], "here")[0].error
    assert render_all(right, [Job(talk, 2)], "here")[0].text == right.apply_chat_template([ASK, SAY], tokenize=False)
    tally("chat templates that run away or fail", right=1)
