"""Help: every command in its section, and a screen of 80 by 24 for each."""

from __future__ import annotations

import sys

import pytest

from rlpost.cli.app import COMMANDS, GOALS, main
from rlpost.cli.command import MOVED, SECTIONS

PAGES = [(), ("goals",), *((name,) for name in COMMANDS), *(("goals", name) for name in GOALS)]


def help_of(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["rlpost", *words, "--help"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_each_page_is_one_screen(words: tuple[str, ...], monkeypatch, capsys) -> None:
    lines = help_of(words, monkeypatch, capsys)
    assert lines[0].startswith(" ".join(["Usage: rlpost", *words, "[OPTIONS]"]))
    assert len(lines) <= (24 if words else 40)  # the front page lists all commands
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.endswith("...") and not line.startswith("Usage")] == []


def test_every_command_is_in_one_section(monkeypatch, capsys) -> None:
    lines = help_of((), monkeypatch, capsys)
    wanted: list[str] = []
    for title, names in SECTIONS.items():
        wanted += [f"{title}:", *(f"  {name}" for name in names)]
    told = lines[lines.index("Train:") :]
    assert [line if line.endswith(":") else f"  {line.split()[0]}" for line in told] == wanted
    assert sorted(sum(SECTIONS.values(), ())) == sorted([*COMMANDS, "goals"])
    assert set(MOVED) <= set(GOALS)


@pytest.mark.parametrize(
    ("line", "offered"),
    [("rlpost go", "goals"), ("rlpost goals in", "infill"), ("rlpost infill ", "\n".join([*COMMANDS, "goals"]))],
)
def test_a_shell_completes_commands(line: str, offered: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("_RLPOST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    monkeypatch.setattr(sys, "argv", ["rlpost"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    printed = capsys.readouterr()
    assert (printed.out.strip(), printed.err) == (offered, "")
