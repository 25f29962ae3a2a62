"""What a proof says, row by row; verdicts are computed from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

EXACT = 1e-12
"""Relative error that float64 may leave in something exact."""
UNBIASED = 1e-6
"""A cosine closer to 1 than this shows no bias."""


@dataclass(frozen=True)
class Row:
    """One claim. Example: Row("leave_one_out, sequence_sum", "2.1e-16 / 3.0e-16", "exact, scale 1", "exact")."""

    name: str
    value: str
    """The number, or "skipped"."""
    expected: str
    verdict: str
    ok: bool = True
    """False where a claim that must hold does not."""


@dataclass(frozen=True)
class Section:
    """Claims of one kind."""

    title: str
    """What they are about, and what the column of values shows."""
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Report:
    """All claims."""

    vocabulary: int
    depth: int
    seed: int
    sections: tuple[Section, ...]

    @property
    def failed(self) -> list[Row]:
        """Claims that must hold and do not."""
        return [row for section in self.sections for row in section.rows if not row.ok]

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failed

    @property
    def title(self) -> str:
        """What it was proved on, and how it went."""
        rows = sum(len(section.rows) for section in self.sections)
        result = f"{len(self.failed)} failed" if self.failed else "none failed"
        return f"vocabulary {self.vocabulary}, depth {self.depth}, seed {self.seed}: {rows} rows, {result}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """As plain text in columns."""
        lines: list[str] = []
        for section in self.sections:
            lines.append(section.title)
            widths = [max(map(len, column)) for column in zip(*map(cells, section.rows), strict=True)]
            for row in section.rows:
                padded = [cell.ljust(width) for cell, width in zip(cells(row), widths, strict=True)]
                lines.append("  " + "  ".join(padded).rstrip())
            lines.append("")
        return "\n".join([*lines, self.title])


COLUMNS = ("claim", "value", "expected", "verdict")


def cells(row: Row) -> tuple[str, str, str, str]:
    """A row as the texts of COLUMNS."""
    return row.name, row.value, row.expected, row.verdict


Numbers = float | None | Sequence[float | None]
"""One number, or one for each group size; None where there were too many groups to enumerate."""


def exact(name: str, errors: Numbers, expected: str = "exact", tolerance: float = EXACT) -> Row:
    """A claim of equality, by relative errors; a NaN fails."""
    found = _listed(errors)
    known = [x for x in found if x is not None]
    ok = all(x <= tolerance for x in known)
    verdict = ("exact" if known else "not computed") if ok else f"FAILED: more than {tolerance:.0e}"
    return Row(name, _joined(found, "{:.1e}"), expected, verdict, ok)


def biased(name: str, cosines: Numbers, expected: str = "biased") -> Row:
    """A claim of bias, by cosines with the truth; the verdict also says where this tree shows no bias."""
    found = _listed(cosines)
    known = [x for x in found if x is not None]
    if any(x != x for x in known):
        return Row(name, _joined(found, "{:.4f}"), expected, "FAILED: no number", False)
    shows = [x < 1 - UNBIASED for x in known]
    verdict = "not computed" if not known else "biased, as expected" if any(shows) else "no bias on this tree"
    return Row(name, _joined(found, "{:.4f}"), expected, verdict)


def holds(name: str, value: str, expected: str, true: bool, verdict: str = "holds") -> Row:
    """A claim that is neither an equality of float64 nor a bias."""
    return Row(name, value, expected, verdict if true else "FAILED", bool(true))


def fact(name: str, value: str) -> Row:
    """A number that is printed for the reader."""
    return Row(name, value, "", "")


def skipped(name: str, why: str, expected: str = "") -> Row:
    """A claim that this tree is too large for."""
    return Row(name, "skipped", expected, f"skipped: {why}")


def _listed(numbers: Numbers) -> list[float | None]:
    return list(numbers) if isinstance(numbers, Sequence) else [numbers]


def _joined(found: Sequence[float | None], form: str) -> str:
    return " / ".join("skipped" if x is None else form.format(x) for x in found)
