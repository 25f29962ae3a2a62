"""Layouts of well-known data sets: recognised by columns and the first row, read as one of the formats.

A layout adds the columns of its format to a row. Where a row fits a format as it is and a layout too, or two layouts,
nothing is guessed: the row is refused, unless `columns` names a column of just one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.data import conversions
from rlpost.data.columns import missing
from rlpost.data.files import Chunk
from rlpost.data.formats import COLUMNS, DataRole, Format, fitting, refuse
from rlpost.data.messages import SYSTEM
from rlpost.data.turns import (
    is_turns,
    quoted_messages,
)
from rlpost.errors import DataError, ModelError

Row = dict[str, Any]
_CONVERSATION = ("messages", "conversations", "conversation")
"""Columns that hold whole conversations."""


def _any_row(_: Row) -> bool:
    return True


@dataclass(frozen=True)
class Layout:
    """A known arrangement of columns."""

    name: str
    columns: tuple[str, ...]
    """The columns it is recognised by."""
    more: tuple[str, ...]
    """Columns that it reads too, if a row has them."""
    forms: Mapping[DataRole | None, Format]
    """What a stage needs -> the format that the rows become."""
    convert: Callable[[Row, str], Row]
    """(row, location) -> the columns to add. Raises DataError if the row breaks the layout."""
    fits: Callable[[Row], bool] = _any_row
    """Whether the first row, which has the columns, is of this layout."""
    replaces: tuple[Format, ...] = ()
    """Formats with the same columns, which the first row does not have when it fits here."""
    plain: str = ""
    """The `columns` that read it as plain text, for a tokenizer without a chat template."""

    @property
    def key(self) -> str:
        """It alone has this key."""
        return f"{self.name}: {', '.join(self.columns)}"

    def __call__(self, row: Row, location: str) -> Row:
        """The row with the columns of its format; raises DataError if it breaks the layout."""
        for column in self.columns:
            if column not in row:
                raise DataError(f"{location} {missing(column, row)}")
        return {**row, **self.convert(row, location)}


@dataclass(frozen=True)
class ReadAs:
    """How the rows of a source are read."""

    form: Format
    layout: Layout | None = None
    said: str = ""
    """For users: "alpaca (instruction, input, output)"."""

    def to_json(self) -> dict[str, str]:
        """It as JSON."""
        return {"format": self.form.name, "layout": self.layout.key if self.layout else "", "said": self.said}

    @classmethod
    def from_json(cls, saved: Mapping[str, str]) -> ReadAs:
        """What `to_json` wrote."""
        layout = next((layout for layout in LAYOUTS if layout.key == saved["layout"]), None)
        return cls(Format[saved["format"]], layout, saved["said"])

    def check_template(self, template: Any, where: str) -> None:
        """Check that there is a chat template if the layout's rows become conversations.

        Raises:
            ModelError: there is none.
        """
        if template is None and self.layout is not None and self.layout.plain:
            raise ModelError(
                f"{where} is {self.said}, read as conversations, and the tokenizer has no chat template: set "
                f"model.chat_template=FILE.jinja, or read plain text with columns: {self.layout.plain}"
            )

    def chunk(
        self, chunk: Chunk, location: Callable[[int], str], drop: Callable[[DataError], None] | None = None
    ) -> Chunk:
        """The rows with the columns of their format; `lines` stay those of the file.

        Raises:
            DataError: a row breaks the layout; with `drop`, it is called instead, and the row is left out.
        """
        if self.layout is None:
            return chunk
        rows, kept = [], []
        for i, (row, number) in enumerate(zip(chunk.rows, chunk.numbers, strict=True)):
            try:
                rows.append(self.layout(row, location(number)))
                kept.append(i)
            except DataError as error:
                if drop is None:
                    raise DataError(f"{error}; malformed=drop leaves such rows out") from error
                drop(error)
        lines = chunk.lines and [chunk.lines[i] for i in kept]
        return Chunk(rows, [chunk.numbers[i] for i in kept], lines)


def read_as(
    rows: Sequence[Row], where: str, need: DataRole | None, named: Iterable[str] = (), made: bool = False
) -> ReadAs:
    """The format for `need`, and the layout if it takes one, by the first row.

    Args:
        rows: at least one.
        where: the source, for messages.
        need: what the stage needs; None for any text.
        named: the roles that the source's `columns` names; they choose where several fit.
        made: a function of the user's made the rows, so the columns of a format (but `text`) are meant as such.

    Raises:
        DataError: none fits, or several.
    """
    row = rows[0]
    for column in ("prompt", "completion", "chosen", "rejected", *(["reference"] if need is DataRole.triples else [])):
        if quoted_messages(row.get(column)) is not None:
            raise DataError(
                f"{where}: {column!r} is a text that is the JSON of messages: make lists of such texts with a `map`, "
                "or give them as `messages` or `conversations`, where JSON is read"
            )
    found = [layout for layout in LAYOUTS if need in layout.forms and _has(layout, row)]
    form = fitting(list(row), need)
    if form in (*_PAIR_FORMATS, Format.triple) and not found and "prompt" not in row and conversions.are_answers(row):
        form = None
    if form is not None and not any(form in layout.replaces for layout in found):
        found = [layout for layout in found if not set(layout.columns) <= _ROLES]
        if (
            not found
            or (made and form is not Format.text)
            or _is_named(COLUMNS[form], [layout.columns for layout in found], named)
        ):
            return ReadAs(form, None, form.value + _left_out(row, form))
        options = [(COLUMNS[form], form.value, COLUMNS[form][-1])]
    else:
        if not found:
            refuse(row, where, need)
        options = []
    for layout in found:
        others = [option[0] for option in options] + [o.columns for o in found if o is not layout]
        if not others or _is_named((*layout.columns, *layout.more), others, named):
            return ReadAs(layout.forms[need], layout, _said(layout, row) + _left_out(row, layout.forms[need]))
    options += [(o.columns, _said(o, row), o.columns[0]) for o in found]
    raise DataError(
        f"{where} can be read as {' and as '.join(said for _, said, _ in options)}: choose with "
        + " or ".join(f"columns: {{{column}: {column}}}" for _, _, column in options)
    )


def _has(layout: Layout, row: Row) -> bool:
    return all(column in row for column in layout.columns) and layout.fits(row)


def _is_named(columns: Iterable[str], others: Iterable[Iterable[str]], named: Iterable[str]) -> bool:
    """Whether `named` has more of these columns than of any of the others."""
    count = len(set(named) & set(columns))
    return all(count > len(set(named) & set(other)) for other in others)


def _said(layout: Layout, row: Row) -> str:
    read = [column for column in row if column in (*layout.columns, *layout.more)]
    return f"{layout.name} ({', '.join(read)})"


def _left_out(row: Row, form: Format) -> str:
    """What is said where a pair has a gold completion beside it, which only stages with `gold_coef` read."""
    return "; its column 'reference' is not read" if form in _PAIR_FORMATS and "reference" in row else ""


_ROLES = {column for columns in COLUMNS.values() for column in columns}


_TALKS: dict[DataRole | None, Format] = {
    None: Format.messages,
    DataRole.completions: Format.messages,
    DataRole.prompts: Format.opening,
}
_LABELS: dict[DataRole | None, Format] = {DataRole.labelled: Format.labelled}
_PAIRS: dict[DataRole | None, Format] = {
    None: Format.pair,
    DataRole.pairs: Format.pair,
    DataRole.ranked: Format.ranked_pair,
}
_RANKS: dict[DataRole | None, Format] = {DataRole.ranked: Format.ranked}
_PAIR_FORMATS = (Format.pair, Format.ranked_pair)
_ALPACA = ("input", *SYSTEM, "history")


def _of_conversations(column: str) -> tuple[Layout, ...]:
    """The layouts around a column of whole conversations."""
    own = column == "messages"
    answers, label = (column, "chosen", "rejected"), (column, "label")
    return (
        Layout(
            "sharegpt",
            (column,),
            SYSTEM,
            _TALKS,
            conversions.conversation(column),
            (lambda row: is_turns(row[column])) if own else _any_row,
            (Format.messages, Format.opening) if own else (),
        ),
        Layout("sharegpt", label, SYSTEM, _LABELS, conversions.labelled_conversation(column)),
        Layout(
            "sharegpt",
            answers,
            SYSTEM,
            _PAIRS,
            conversions.conversation_pair(column),
            conversions.are_answers,
            _PAIR_FORMATS,
        ),
    )


LAYOUTS = (
    Layout(
        "alpaca",
        ("instruction", "output"),
        _ALPACA,
        _TALKS,
        conversions.alpaca,
        conversions.has_its_input,
        plain=r'{prompt: "{instruction}\n{input}\n", completion: output}',
    ),
    Layout(
        "alpaca",
        ("instruction", "output", "label"),
        _ALPACA,
        _LABELS,
        conversions.alpaca_label,
        conversions.has_its_input,
        plain=r'{prompt: "{instruction}\n{input}\n", completion: output}',
    ),
    Layout(
        "alpaca",
        ("instruction", "chosen", "rejected"),
        _ALPACA,
        _PAIRS,
        conversions.alpaca_pair,
        conversions.are_answers,
        _PAIR_FORMATS,
        plain=r'{prompt: "{instruction}\n{input}\n"}',
    ),
    *(layout for column in _CONVERSATION for layout in _of_conversations(column)),
    Layout(
        "hh-rlhf",
        ("chosen", "rejected"),
        ("prompt",),
        _PAIRS,
        conversions.dialogue_pair,
        conversions.are_dialogues,
        _PAIR_FORMATS,
    ),
    Layout(
        "sharegpt",
        ("chosen", "rejected"),
        ("prompt",),
        _PAIRS,
        conversions.turns_pair,
        conversions.are_turns,
        _PAIR_FORMATS,
    ),
    Layout(
        "scored answers",
        ("prompt", "completions"),
        (),
        _RANKS,
        conversions.scored,
        conversions.is_scored,
        (Format.ranked,),
    ),
    Layout(
        "scored answers",
        ("instruction", "completions"),
        _ALPACA,
        _RANKS,
        conversions.asked_scored,
        conversions.is_scored,
    ),
)
"""All of them; adding one is adding a line, and a row to the table of docs/data.md."""
