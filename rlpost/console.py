"""Messages, tables and progress for a person; all of it goes to stderr.

The only module that uses rich, which is imported when stderr is a terminal.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import StringIO
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self, TextIO, cast

from rlpost.ranks import is_first
from rlpost.results import output

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

_SEQUENCES = re.compile(
    r"\x1b[\]P^_X][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # commands and strings, with their end
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|\x1b[ -/]*[0-~]?"  # any other escape, and a lone one
)
# C0 but tab and newline, DEL and C1; line separators; marks that turn the direction of writing; half
# characters.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBER = re.compile(r"[-+−]?\d[\d.,eE%/ ()\[\]±–+−-]*[kM]?")
_EMPTY_CELLS = ("", "-", "–", "—")
_BAR = 36
_PLAIN_EVERY = 5.0
_SAMPLE_HEAD, _SAMPLE_TAIL = 160, 80


def clean(text: str, newline: str = "\n") -> str:
    """The text without escape sequences and control characters, fit for a terminal.

    Args:
        text: anything, such as a model's output.
        newline: replaces line breaks, such as "⏎" in a cell of a table.
    """
    text = _CONTROLS.sub("", _SEQUENCES.sub("", text)).replace("\t", "    ")
    return text if newline == "\n" else text.replace("\n", newline)


def say(text: str) -> None:
    """Print a message."""
    _message("", "", clean(text))


def warn(text: str) -> None:
    """Print a warning."""
    _message("warning: ", "yellow", clean(text))


def fail(text: str) -> None:
    """Print an error, in one line."""
    _message("error: ", "bold red", clean(text, newline=" "))


def notice(text: str) -> None:
    """Print a message from a signal handler, on the first rank; it appears below the bar of a live Progress.

    It avoids sys.stderr and rich, which the signal may have interrupted in a write.
    """
    if not is_first():
        return
    if _live_consoles:
        _notices.append(clean(text))
        return
    with suppress(OSError):  # the terminal may be gone: SIGHUP
        os.write(2, f"{clean(text)}\n".encode())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns of numbers are right-aligned."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        right = _numeric([row[index] for row in rows])
        made.add_column(Text(clean(column, "⏎")), justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(clean(cell, "⏎")) for cell in row))
    _show(title, made)


def samples(title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print a table of (prompt, completion, reward), long texts shortened; in a log, a line for each."""
    cells = [[_shortened(clean(cell, "⏎")) for cell in row] for row in rows]
    if not _is_terminal(sys.stderr):
        lines = [f"  [{reward}] {prompt} -> {completion}" for prompt, completion, reward in cells]
        _write("\n".join([clean(title, "⏎"), *lines, ""]))
        return
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    made.add_column("prompt", overflow="fold", style="dim")
    made.add_column("completion", overflow="fold")
    made.add_column("reward", justify="right", overflow="fold", style="bold")
    for row in cells:
        made.add_row(*map(Text, row))
    _show(title, made)


def marked(text: str) -> str:
    """The text highlighted for stdout: in colour on a terminal, between » and « elsewhere."""
    if not _is_terminal(output()) or os.environ.get("NO_COLOR"):
        return f"»{text}«"
    return f"\x1b[32m{text}\x1b[0m"


def compact(number: float) -> str:
    """The number in four significant digits or so: 1.234, 0.5000, 12345, 1e-5, 1.23e6."""
    if isinstance(number, int) and abs(number) < 1_000_000:
        return str(number)
    size = abs(number)
    if 1e-3 <= size < 9999.5 or size == 0:
        return f"{number:#.4g}".rstrip(".") if size else "0"
    if 9999.5 <= size < 999_999.5:
        return f"{number:.0f}"
    digits, _, exponent = f"{number:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}" if exponent else digits


class Spell:
    """A problem that lasts for a while: a warning when it begins, a message when it ends."""

    def __init__(self) -> None:
        self._on = False

    def begins(self, text: str) -> None:
        """The problem exists; warns with `text` if it is new."""
        if not self._on:
            warn(text)
        self._on = True

    def ends(self, text: str) -> None:
        """The problem does not exist; prints `text` if it just ended."""
        if self._on:
            say(text)
        self._on = False


class Progress:
    """Progress of long work: a bar with rate, remaining time and metrics; lines without a terminal.

    Example: ``with Progress("sft", total=500, start=100) as progress: ... progress.advance({"loss": 1.23})``.
    A nested one shows its bar below while it lasts; without a terminal it is silent for its first seconds.
    """

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self._title = clean(title, "⏎")
        self._total = total
        self._done = start
        self._metrics: dict[str, float] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=64)
        self._started = 0.0
        self._live: Live | None = None
        self._nested = False
        self._line_at = -_PLAIN_EVERY
        self._line_done: int | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._marks.append((self._started, self._done))
        self._nested = bool(_open)
        if self._nested:
            self._line_at = self._started
        _open.append(self)
        if _is_terminal(sys.stderr):
            from rich.live import Live

            console = _console()
            self._live = Live(
                console=console,
                get_renderable=self._bar,
                transient=self._nested,
                redirect_stdout=False,
                refresh_per_second=4,
            )
            _live_consoles.append(console)
            self._live.start()
            self._live.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self)
        if self._live:
            self._live.stop()
            _live_consoles.pop()
            if not self._nested:
                _notices.clear()
        elif self._line_done not in (None, self._done):
            self._line()

    def advance(self, metrics: Mapping[str, float] | None = None, n: int = 1) -> None:
        """Count `n` more as done; `metrics` replace those shown."""
        self._done += n
        if metrics is not None:
            self._metrics = {clean(name, "⏎"): value for name, value in metrics.items()}
        now = time.monotonic()
        if now - self._marks[-1][0] >= 0.25 or len(self._marks) == 1:
            self._marks.append((now, self._done))
        over = self._done >= self._total and not (self._nested and self._line_done is None)
        if not self._live and (now - self._line_at >= _PLAIN_EVERY or over):
            self._line()

    def _line(self) -> None:
        self._line_at, self._line_done = time.monotonic(), self._done
        rate, left = self._pace()
        shown = [f"{name}={compact(value)}" for name, value in self._metrics.items()]
        _write(" ".join([self._title, f"{self._done}/{self._total}", *filter(None, (rate, left)), *shown]) + "\n")

    def _pace(self) -> tuple[str, str]:
        """Recent rate, and the remaining time at that rate."""
        (before, done_before), (after, done_after) = self._marks[0], self._marks[-1]
        if after <= before or done_after <= done_before:
            return "", ""
        rate = (done_after - done_before) / (after - before)
        text = f"{rate:#.3g}".rstrip(".") + "/s" if 1 <= rate < 1000 else f"{rate:.0f}/s"
        text = text if rate >= 1 else f"{_duration(1 / rate)} each"
        left = max(0, self._total - self._done) / rate
        return text, f"{_duration(left)} left" if self._done < self._total else ""

    def _bar(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = _console().width
        rate, left = self._pace()
        count = f"{self._done}/{self._total}".rjust(2 * len(str(self._total)) + 1)
        if self._done >= self._total:
            left = f"in {_duration(time.monotonic() - self._started)}"
        words = [self._title, count, rate.rjust(8), left.ljust(11)]
        room = min(_BAR, width - sum(len(word) + 1 for word in words) - 1)
        line = Table.grid(padding=(0, 1, 0, 0))
        bar = [ProgressBar(max(1, self._total), self._done, width=room)] if room >= 8 else []
        line.add_row(Text(self._title, style="bold"), *bar, *(Text(word, no_wrap=True) for word in words[1:]))
        notices = [] if self._nested else [Text(text, style="yellow") for text in _notices]
        metrics = [self._metric_line(width)] if self._metrics else []
        return Group(line, *metrics, *notices)

    def _metric_line(self, width: int) -> RenderableType:
        """As many of the metrics as one line of the terminal holds."""
        from rich.text import Text

        line = Text(no_wrap=True, overflow="ellipsis")
        for name, value in self._metrics.items():
            shown = compact(value)
            if len(line) + len(name) + max(6, len(shown)) + 5 > width:
                return line.append(" …", style="dim")
            line.append(f"  {name} ", style="dim").append(shown.ljust(6))
        return line


_open: list[Progress] = []


_live_consoles: list[Console] = []
"""The console of each live Progress: other output must go through it."""


_notices: list[str] = []


class _Stderr:
    """stderr, without errors once it is gone.

    A closed terminal (SIGHUP) or reader (a pipe to `head`) must not end the work.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether it is a terminal with a cursor; the stream may be missing (a daemon) or closed."""
    if not is_first() or stream is None or stream.closed or os.environ.get("TERM", "") in ("dumb", "unknown"):
        return False
    return stream.isatty()


def _console() -> Console:
    if _live_consoles:
        return _live_consoles[-1]
    from rich.console import Console

    file = cast("IO[str]", _Stderr(sys.stderr))
    return Console(file=file, force_terminal=True, highlight=False, markup=False, emoji=False)


def _write(text: str) -> None:
    """To stderr; of the ranks of a run the first one speaks."""
    if is_first() and sys.stderr is not None and not sys.stderr.closed:
        stream = _Stderr(sys.stderr)
        stream.write(text)
        stream.flush()


def _message(label: str, style: str, text: str) -> None:
    if not _is_terminal(sys.stderr):
        _write(f"{label}{text}\n")
        return
    from rich.text import Text

    _console().print(Text.assemble((label, style), text))


def _show(title: str, made: Table) -> None:
    from rich.console import Console
    from rich.text import Text

    heading = Text(clean(title, "⏎"), style="bold")
    if _is_terminal(sys.stderr):
        console = _console()
        console.print("", heading, made, sep="\n")
        return
    out = StringIO()
    # Wide enough for any row: a log has no right margin, and a folded cell cannot be searched for.
    plain = Console(file=out, width=10_000, force_terminal=False, color_system=None)
    plain.print(heading, made, sep="\n")
    _write("".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines()))


def _numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell.strip() not in _EMPTY_CELLS]
    return bool(filled) and all(_NUMBER.fullmatch(cell.strip()) for cell in filled)


def _shortened(text: str) -> str:
    if len(text) <= _SAMPLE_HEAD + _SAMPLE_TAIL:
        return text
    return f"{text[:_SAMPLE_HEAD]} … {text[-_SAMPLE_TAIL:]}"


def _duration(seconds: float) -> str:
    """0.4s, 31s, 2m05s, 1h02m, 3d04h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
