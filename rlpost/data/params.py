"""Where rows come from, how long they may be, and tokenizers made from scratch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Optional

from omegaconf import MISSING

from rlpost.key import key
from rlpost.usercode.params import TASKS, Lookup, TimedFunction

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


class Need(StrEnum):
    """What a stage does with its rows."""

    completions = "completions"
    pairs = "pairs"
    prompts = "prompts"
    labelled = "labelled"
    ranked = "ranked"
    steps = "steps"
    recorded = "recorded"


class TooLong(StrEnum):
    """What happens to a row longer than `max_length`."""

    refuse = "refuse"
    drop = "drop"
    cut = "cut"


class Unrendered(StrEnum):
    """What happens to a row that says more than its chat template renders."""

    refuse = "refuse"
    drop = "drop"
    ignore = "ignore"


class Direction(StrEnum):
    """The way a text is read."""

    forward = "forward"
    reverse = "reverse"


class FoldPart(StrEnum):
    """Which side of a fold to keep."""

    train = "train"
    held_out = "held_out"


@dataclass
class Fold:
    """Keep one side of a split in which rows with equal `by` stay together."""

    by: str = MISSING
    of: int = key(5, ge=2)
    hold_out: int = key(0, ge=0)
    part: FoldPart = FoldPart.train


TASK = Lookup("task", TASKS, (), by_name=True, apart=True)
MAP = Lookup("map", TASKS, ("row",), by_name=True, apart=True)
PRESENT = Lookup("present", TASKS, ("row", "random"), by_name=True, apart=True)


@dataclass
class Source:
    """Where rows come from: exactly one of `path`, `stage`, `task`."""

    path: Optional[str] = key(None, path=True)
    """A .jsonl or .parquet file, a folder in hub format, or the name of a dataset on the hub."""
    stage: Optional[str] = None
    """Rows that an earlier stage wrote (a `pairs` stage)."""
    task: Optional[TimedFunction] = key(None, lookup=TASK)
    """Rows made by a function in `rlpost.data.tasks` or a file: `addition.train`."""
    config: Optional[str] = None
    """Configuration name of a hub dataset (`main` for openai/gsm8k)."""
    split: str = "train"
    weight: float = key(1.0, gt=0)
    """Share of this source in a mixture; rows are drawn in proportion."""
    limit: Optional[int] = key(None, ge=1)
    """Only the first so many rows."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role -> column, or a template over columns: {prompt: "Q: {question}\\nA:", completion: answer}."""
    map: Optional[TimedFunction] = key(None, lookup=MAP)
    """row -> row or rows, applied once when the source is read."""
    present: Optional[TimedFunction] = key(None, lookup=PRESENT)
    """(row, random) -> row, applied anew every time a row is drawn."""
    fold: Optional[Fold] = None
    unrendered: Unrendered = Unrendered.refuse
    """`ignore` reads the row without what the template leaves out."""
    direction: Direction = Direction.forward
    """`reverse`, in sft alone: prompt and completion are one text, learned from its end to its beginning."""


class TokenizerKind(StrEnum):
    """Tokenizers that can be made from scratch."""

    characters = "characters"
    bpe = "bpe"


@dataclass
class Tokenizer:
    """A tokenizer made from scratch."""

    kind: TokenizerKind = TokenizerKind.characters
    alphabet: str = ""
    """characters: every character it knows."""
    vocab_size: int = key(4096, ge=2)
    """bpe: size of the vocabulary, special tokens included."""
    data: dict[str, Source] = field(default_factory=dict)
    """bpe: the rows whose text it is trained on."""
