"""Where rows come from, how long they may be, and tokenizers made from scratch."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from rlpost.section import Choice, Local, Section
from rlpost.usercode.params import TASKS, Lookup, TimedFunction


class DataRole(StrEnum):
    """What a stage does with its rows."""

    completions = "completions"
    pairs = "pairs"
    triples = "triples"
    prompts = "prompts"
    labelled = "labelled"
    ranked = "ranked"
    steps = "steps"
    recorded = "recorded"


class TooLong(Choice):
    """What happens to a row longer than `max_length`."""

    refuse = "refuse"
    """The run stops, and names the row."""
    drop = "drop"
    """The row is left out, and counted."""
    cut = "cut"
    """Its completion is cut, and is not taught to stop there; a prompt is never cut."""


class Unrendered(Choice):
    """What happens to a row that says more than its chat template renders."""

    refuse = "refuse"
    """The run stops, and names the row."""
    drop = "drop"
    """The row is left out, and counted."""
    ignore = "ignore"
    """The row is read without what the template leaves out, and counted."""


class Malformed(Choice):
    """What happens to a row that breaks its format."""

    refuse = "refuse"
    """The run stops, and names the row."""
    drop = "drop"
    """The row is left out, and counted. A line that is not JSON stops the run all the same."""


class Direction(Choice):
    """The way a text is read."""

    forward = "forward"
    """From its beginning to its end."""
    reverse = "reverse"
    """In `sft` alone: prompt and completion are one text, learned from its end to its beginning
    (docs/goals.md#reverse-models)."""


class KFoldPart(Choice):
    """A side of a split."""

    train = "train"
    """All parts but the one held out."""
    held_out = "held_out"
    """The part held out."""


class KFold(Section):
    """One side of a split in which rows with equal `by` stay together."""

    by: str
    """The column: rows with equal values stay on one side."""
    of: int = Field(5, ge=2)
    """Number of parts."""
    hold_out: int = Field(0, ge=0)
    """The part that is held out, counted from 0."""
    part: KFoldPart = KFoldPart.train
    """The side to keep."""


TASK = Lookup("task", TASKS, (), by_name=True, apart=True)
MAP = Lookup("map", TASKS, ("row",), by_name=True, apart=True)
AUGMENT = Lookup("augment", TASKS, ("row", "random"), by_name=True, apart=True)


class Source(Section):
    """Where rows come from: exactly one of `path`, `stage` and `task` (docs/data.md)."""

    path: Annotated[str | None, Local()] = None
    """A file (`.jsonl`, `.json`, `.csv`, `.tsv`, these also as `.gz` or `.zst`, or `.parquet`), a folder in hub format,
    or the name of a dataset on the hub."""
    stage: str | None = None
    """The rows of an earlier `pairs`, `guided`, `value_annotations` or `step_labels` stage."""
    task: Annotated[TimedFunction | None, TASK] = None
    """Rows made by a function: `addition.train`, or `file.py:function`."""
    config: str | None = None
    """Configuration of a dataset on the hub (`main` for openai/gsm8k)."""
    split: str = "train"
    """Split of a dataset on the hub."""
    weight: float = Field(1.0, gt=0)
    """Share of this source in a mixture: rows are drawn in proportion."""
    limit: int | None = Field(None, ge=1)
    """Take only this many rows, the first ones."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names the columns that a format needs: role -> column, or a template over columns, like `{prompt: "Q:
    {question}\\nA:", completion: answer}`."""
    map: Annotated[TimedFunction | None, MAP] = None
    """A function (row) -> row, rows or nothing, applied once when the source is read."""
    augment: Annotated[TimedFunction | None, AUGMENT] = None
    """A function (row, random) -> row, applied anew every time a row is drawn."""
    kfold: KFold | None = None
    """Keep one side of a split of the rows."""
    malformed: Malformed = Malformed.refuse
    """What happens to a row that breaks its format (docs/data.md#data-as-it-comes)."""
    unrendered: Unrendered = Unrendered.refuse
    """What happens to a row that says more than its chat template renders
    (docs/data.md#chat-templates-and-what-is-trained)."""
    direction: Direction = Direction.forward
    """The way the text of a row is read."""

    @property
    def is_made(self) -> bool:
        """Whether a function makes its rows."""
        return bool(self.task or self.map or self.augment)

    def problems(self, where: str) -> Iterator[str]:
        """Where its rows come from, and its fold."""
        given = [key for key in ("path", "stage", "task") if getattr(self, key)]
        if len(given) != 1:
            yield f"{where}: give exactly one of path, stage, task ({' and '.join(given) or 'none'} given)"
        if self.kfold and self.kfold.hold_out >= self.kfold.of:
            yield (
                f"{where}.kfold.hold_out: {self.kfold.hold_out} of {self.kfold.of} parts - counted from 0, "
                f"it is at most {self.kfold.of - 1}"
            )


class TokenizerKind(Choice):
    """Tokenizers that can be made from scratch."""

    characters = "characters"
    """One token a character."""
    bpe = "bpe"
    """Byte-level BPE, trained on data."""


class Tokenizer(Section):
    """A tokenizer made from scratch. It adds no token by itself, and its padding is not its end token."""

    kind: TokenizerKind = TokenizerKind.characters
    """What a token is."""
    alphabet: str = ""
    """With `characters`: every character it knows."""
    vocab_size: int = Field(4096, ge=2)
    """With `bpe`: size of the vocabulary, special tokens included; at least 259."""
    data: dict[str, Source] = Field(default_factory=dict)
    """With `bpe`: sources of the rows whose text it is trained on."""

    def problems(self, where: str) -> Iterator[str]:
        """What its kind needs."""
        if self.kind == TokenizerKind.characters and not self.alphabet:
            yield f"{where}.alphabet: missing - give the characters it knows, such as '0123456789+='"
        if self.kind == TokenizerKind.bpe and not self.data:
            yield f"{where}.data: missing - a bpe tokenizer is trained on the text of some rows"
