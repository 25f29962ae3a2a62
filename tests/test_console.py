"""Messages, tables and progress: on a terminal, in a log, and when nobody is there any more."""

import os
import pty
import subprocess
import sys

import pytest

from rlpost import console
from rlpost.console import Progress, clean, compact


def on_terminal(code: str, stdout: bool = False, **environment: str) -> str:
    """What a program writes to stderr (or stdout) when that is a terminal of 80 columns."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", "from rlpost import console\nfrom rlpost.console import *\n" + code],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment},
        stdin=subprocess.DEVNULL,
        stdout=slave if stdout else subprocess.PIPE,
        stderr=subprocess.PIPE if stdout else slave,
    )
    os.close(slave)
    output = b""
    while True:
        try:
            output += (data := os.read(master, 4096))
        except OSError:  # the way Linux tells that the other side is closed
            break
        if not data:
            break
    os.close(master)
    other, errors = child.communicate()
    assert child.returncode == 0, (output, other, errors)
    assert not other, "nothing goes to stdout"
    return output.decode()


@pytest.mark.parametrize(
    ("dirty", "text"),
    [
        ("plain é 日本", "plain é 日本"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[10;20Hmoved", "moved"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;never ends", "0;never ends"),
        ("\x1bPq#0\x1b\\after", "after"),
        ("\x9b31mred", "red"),
        ("\x1b\x1b[0m[31m", "[31m"),
        ("\x1bcreset", "reset"),
        ("end\x1b", "end"),
        ("a\rb\bc\x00d\x07\x7f", "abcd"),
        ("c1 \x85\x90\x9d", "c1 "),
        ("right \u202eto left", "right to left"),
        ("half \ud800", "half "),
        ("a\nb\tc", "a\nb    c"),
    ],
)
def test_control_characters_are_removed(dirty, text):
    assert clean(dirty) == text
    assert clean(clean(dirty)) == text


def test_a_line_break_can_be_shown_as_a_sign():
    assert clean("a\nb", newline="⏎") == "a⏎b"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (1.23456, "1.235"),
        (0.5, "0.5000"),
        (512, "512"),
        (8192.0, "8192"),
        (9999.9, "10000"),
        (12345.6, "12346"),
        (1234567, "1.23e6"),
        (1e-5, "1e-5"),
        (-0.000123456, "-1.23e-4"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_are_compact(number, text):
    assert compact(number) == text


def test_messages_in_a_log_are_plain_lines_on_stderr(capsys):
    console.say("[bold]said[/bold] " + "long " * 40)
    console.warn("something is \x1b[31moff")
    console.fail("two\nlines")
    console.notice("stop")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:3] == [
        "[bold]said[/bold] " + "long " * 40,
        "warning: something is off",
        "error: two lines",
    ]


def test_messages_on_a_terminal_have_colour_and_no_markup():
    shown = on_terminal('say("[red]a[/red]"); warn("b"); fail("c")')
    assert shown == "[red]a[/red]\r\n\x1b[33mwarning: \x1b[0mb\r\n\x1b[1;31merror: \x1b[0mc\r\n"
    assert on_terminal('warn("b")', NO_COLOR="1") == "warning: b\r\n"
    assert on_terminal('warn("b")', TERM="dumb") == "warning: b\r\n"


def test_a_table_in_a_log(capsys):
    console.table("accuracy", ["model", "greedy", "n"], [["base", "0.03", "800"], ["sft\n[red]", "12.51", "-"]])
    assert capsys.readouterr().err == (
        "accuracy\n"
        "model      greedy    n\n"
        "base         0.03  800\n"
        "sft⏎[red]   12.51    -\n"
    )  # fmt: skip


def test_a_table_on_a_terminal():
    shown = on_terminal('table("t", ["model", "n"], [["base", "1"], ["x", "10"]])')
    assert "base    1" in shown
    assert "x      10" in shown
    assert "\x1b[1mt\x1b[0m" in shown


def test_samples_are_cut_in_the_middle(capsys):
    console.samples("step 100", [("1+1=", "x" * 500 + "answer: \x1b[31m2", "1.00")])
    err = capsys.readouterr().err
    assert err.startswith("step 100\n  [1.00] 1+1= -> xxx")
    assert " … " in err
    assert err.endswith("answer: 2\n")
    assert len(err) < 300
    shown = on_terminal('samples("t", [("1+1=", "[red]2[/red]", "1.00"), ("2+2=", "5\\n", "0.00")])')
    assert "[red]2[/red]" in shown
    assert "5⏎" in shown


def test_progress_in_a_log_is_the_first_the_last_and_little_between(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rlpost.console.time.monotonic", lambda: now[0])
    with Progress("sft", total=120, start=100) as progress:
        for step in range(20):
            now[0] += 0.5
            progress.advance({"loss": 2 - step / 10, "lr": 1e-5})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "sft 101/120 2.00/s 9.5s left loss=2.000 lr=1e-5",
        "sft 111/120 2.00/s 4.5s left loss=1.000 lr=1e-5",
        "sft 120/120 2.00/s loss=0.1000 lr=1e-5",
    ]


def test_progress_that_is_cut_short_tells_where(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rlpost.console.time.monotonic", lambda: now[0])
    with Progress("grpo", total=1000) as progress:
        now[0] = 90
        progress.advance({"reward": 0.5}, n=10)
        now[0] = 94
        progress.advance(n=5)
    assert capsys.readouterr().err.splitlines() == [
        "grpo 10/1000 9.0s each 2h28m left reward=0.5000",
        "grpo 15/1000 6.3s each 1h42m left reward=0.5000",
    ]


def test_progress_on_a_terminal_is_a_bar_that_messages_do_not_break():
    code = """
import sys
with Progress("sft", total=10, start=4) as progress:
    progress.advance({"loss": 1.23456, "learning_rate": 1e-5})
    say("checkpoint written")
    print("from a library", file=sys.stderr)
    with Progress("evaluation", total=2) as inner:
        inner.advance({"accuracy": 0.5}, n=2)
        table("t", ["a"], [["1"]])
    notice("SIGINT: stopping")
    progress.advance(n=5)
say("after")
"""
    shown = on_terminal(code)
    for text in ("checkpoint written\r\n", "from a library\r\n", "evaluation", "SIGINT: stopping", "after\r\n"):
        assert text in shown
    end = shown[shown.rindex("\x1b[1msft") :]
    assert "10/10" in end
    assert "1.235" in end
    assert "1e-5" in end
    assert "evaluation" not in end, "an inner bar goes when it ends"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor is shown again"


def test_the_bar_fits_a_narrow_terminal():
    code = """
with Progress("a rather long title of a stage", total=100000) as progress:
    progress.advance({f"metric_{i}": 1.5 for i in range(20)}, n=31415)
"""
    shown = on_terminal(code, COLUMNS="50", NO_COLOR="1")
    for line in shown.split("\r\n"):
        for part in clean(line.split("\r")[-1]).splitlines():
            assert len(part) <= 50
    assert "…" in shown


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_terminal_without_cursor_gets_lines(environment):
    shown = on_terminal('with Progress("sft", total=2) as p:\n    p.advance(); p.advance()', **environment)
    assert "\x1b" not in shown
    assert shown.splitlines()[-1].startswith("sft 2/2")


def test_progress_of_nothing(capsys):
    with Progress("empty", total=0):
        pass
    assert capsys.readouterr().err == ""
    on_terminal('with Progress("empty", total=0):\n    pass')


def test_the_work_goes_on_when_the_reader_is_gone():
    code = "from rlpost.console import *\nfor _ in range(9999): say('x' * 99)\nprint('finished')"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stderr.close()
    assert child.stdout.read() == "finished\n"
    child.stdout.close()
    assert child.wait() == 0


def test_the_work_goes_on_when_the_terminal_is_gone():
    """A hang-up while a bar is live: the pseudo-terminal is closed under the program."""
    master, slave = pty.openpty()
    code = """
import signal, sys
from rlpost.console import *
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Progress("sft", total=3) as progress:
    progress.advance()
    print("live", flush=True)
    sys.stdin.readline()
    say("x"); progress.advance(); progress.advance()
warn("y")
print("finished")
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    assert child.stdout.readline() == "live\n"
    os.close(master)
    out, _ = child.communicate("\n")
    assert out == "finished\n"
    assert child.returncode == 0


def test_rich_is_imported_for_terminals_only():
    code = (
        "import sys\nfrom rlpost import console\nconsole.say('x')\nwith console.Progress('a', 1) as p: p.advance()\n"
        "sys.exit('rich' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True)
