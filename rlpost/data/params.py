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
    prompts = "prompts"
    labelled = "labelled"
    ranked = "ranked"
    steps = "steps"
    recorded = "recorded"


class TooLong(Choice):
    """What happens to a row longer than `max_length`."""

    refuse = "refuse"
    drop = "drop"
    cut = "cut"


class Unrendered(Choice):
    """What happens to a row that says more than its chat template renders."""

    refuse = "refuse"
    drop = "drop"
    ignore = "ignore"


class Direction(Choice):
    """The way a text is read."""

    forward = "forward"
    reverse = "reverse"


class FoldPart(Choice):
    """Which side of a fold to keep."""

    train = "train"
    held_out = "held_out"


class Fold(Section):
    """Keep one side of a split in which rows with equal `by` stay together."""

    by: str
    of: int = Field(5, ge=2)
    hold_out: int = Field(0, ge=0)
    part: FoldPart = FoldPart.train


TASK = Lookup("task", TASKS, (), by_name=True, apart=True)
MAP = Lookup("map", TASKS, ("row",), by_name=True, apart=True)
PRESENT = Lookup("present", TASKS, ("row", "random"), by_name=True, apart=True)


class Source(Section):
    """Where rows come from: exactly one of `path`, `stage`, `task`."""

    path: Annotated[str | None, Local()] = None
    """A .jsonl or .parquet file, a folder in hub format, or the name of a dataset on the hub."""
    stage: str | None = None
    """Rows that an earlier stage wrote (a `pairs` stage)."""
    task: Annotated[TimedFunction | None, TASK] = None
    """Rows made by a function in `rlpost.data.tasks` or a file: `addition.train`."""
    config: str | None = None
    """Configuration name of a hub dataset (`main` for openai/gsm8k)."""
    split: str = "train"
    weight: float = Field(1.0, gt=0)
    """Share of this source in a mixture; rows are drawn in proportion."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Role -> column, or a template over columns: {prompt: "Q: {question}\\nA:", completion: answer}."""
    map: Annotated[TimedFunction | None, MAP] = None
    """row -> row or rows, applied once when the source is read."""
    present: Annotated[TimedFunction | None, PRESENT] = None
    """(row, random) -> row, applied anew every time a row is drawn."""
    fold: Fold | None = None
    unrendered: Unrendered = Unrendered.refuse
    """`ignore` reads the row without what the template leaves out."""
    direction: Direction = Direction.forward
    """`reverse`, in sft alone: prompt and completion are one text, learned from its end to its beginning."""

    def problems(self, where: str) -> Iterator[str]:
        """Where its rows come from, and its fold."""
        given = [key for key in ("path", "stage", "task") if getattr(self, key)]
        if len(given) != 1:
            yield f"{where}: give exactly one of path, stage, task ({' and '.join(given) or 'none'} given)"
        if self.fold and self.fold.hold_out >= self.fold.of:
            yield (
                f"{where}.fold.hold_out: {self.fold.hold_out} of {self.fold.of} parts - counted from 0, "
                f"it is at most {self.fold.of - 1}"
            )


class TokenizerKind(Choice):
    """Tokenizers that can be made from scratch."""

    characters = "characters"
    bpe = "bpe"


class Tokenizer(Section):
    """A tokenizer made from scratch."""

    kind: TokenizerKind = TokenizerKind.characters
    alphabet: str = ""
    """characters: every character it knows."""
    vocab_size: int = Field(4096, ge=2)
    """bpe: size of the vocabulary, special tokens included."""
    data: dict[str, Source] = Field(default_factory=dict)
    """bpe: the rows whose text it is trained on."""

    def problems(self, where: str) -> Iterator[str]:
        """What its kind needs."""
        if self.kind == TokenizerKind.characters and not self.alphabet:
            yield f"{where}.alphabet: missing - give the characters it knows, such as '0123456789+='"
        if self.kind == TokenizerKind.bpe and not self.data:
            yield f"{where}.data: missing - a bpe tokenizer is trained on the text of some rows"
