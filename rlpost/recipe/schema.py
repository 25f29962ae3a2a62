"""The recipe as dataclasses: a key in YAML is a field here, and nothing else is a key.

Ranges and rules across fields live in `validate.py`; how YAML becomes these classes in `resolve.py`.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Optional

from omegaconf import MISSING

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


class Kind(StrEnum):
    """What a stage does."""

    sft = "sft"
    dpo = "dpo"
    grpo = "grpo"
    pairs = "pairs"


class Schedule(StrEnum):
    """Shape of the learning rate after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Weight(StrEnum):
    """How much each action counts in an update (objectives/weights.py)."""

    token_mean = "token_mean"
    sequence_mean = "sequence_mean"
    sequence_sum = "sequence_sum"
    constant_length = "constant_length"


class Precision(StrEnum):
    """Number format of the forward pass; `auto` measures once and remembers."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(StrEnum):
    """`flat` shares prompts, never pads; `padded` is the plain way; `auto` takes flat where it is exact."""

    auto = "auto"
    flat = "flat"
    padded = "padded"


class TooLong(StrEnum):
    """What happens to a row longer than `max_length`."""

    refuse = "refuse"
    drop = "drop"
    cut = "cut"


class TokenizerKind(StrEnum):
    """Tokenizers that can be made from scratch."""

    characters = "characters"
    bpe = "bpe"


class FoldPart(StrEnum):
    """Which side of a fold to keep."""

    train = "train"
    held_out = "held_out"


class KlEstimator(StrEnum):
    """Per-token estimators of KL(policy || reference)."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KlPlacement(StrEnum):
    """Where the KL term goes."""

    reward = "reward"
    loss = "loss"


class PairChoice(StrEnum):
    """Which pairs a group of scored samples gives."""

    one = "one"
    """A best and a worst completion of each prompt."""
    all = "all"
    """Every better/worse combination of distinct completions."""


@dataclass
class Function:
    """A function by name (or `file.py:function`) with its keyword arguments."""

    fn: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Reward(Function):
    """A reward function, its weight in the sum, and the name it is logged under (its own by default)."""

    weight: float = 1.0
    name: Optional[str] = None


@dataclass
class Fold:
    """Keep one side of a split in which rows with equal `by` stay together."""

    by: str = MISSING
    of: int = 5
    hold_out: int = 0
    part: FoldPart = FoldPart.train


@dataclass
class Source:
    """Where rows come from: exactly one of `path`, `stage`, `task`."""

    path: Optional[str] = None
    """A .jsonl or .parquet file, a folder in hub format, or the name of a dataset on the hub."""
    stage: Optional[str] = None
    """Rows that an earlier stage wrote (a `pairs` stage)."""
    task: Optional[Function] = None
    """Rows made by a function in `rlpost.data.tasks` or a file: `addition.train`."""
    config: Optional[str] = None
    """Configuration name of a hub dataset (`main` for openai/gsm8k)."""
    split: str = "train"
    weight: float = 1.0
    """Share of this source in a mixture; rows are drawn in proportion."""
    limit: Optional[int] = None
    """Only the first so many rows."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role -> column, or a template over columns: {prompt: "Q: {question}\\nA:", completion: answer}."""
    map: Optional[Function] = None
    """row -> row or rows, applied once when the source is read."""
    present: Optional[Function] = None
    """(row, random) -> row, applied anew every time a row is drawn."""
    fold: Optional[Fold] = None


@dataclass
class Tokenizer:
    """A tokenizer made from scratch."""

    kind: TokenizerKind = TokenizerKind.characters
    alphabet: str = ""
    """characters: every character it knows."""
    vocab_size: int = 4096
    """bpe: size of the vocabulary, special tokens included."""
    data: dict[str, Source] = field(default_factory=dict)
    """bpe: the rows whose text it is trained on."""


@dataclass
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), trained in float32."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Any = "all-linear"


@dataclass
class Model:
    """The model all stages start from: `path`, or `config` and `tokenizer` for one made from scratch."""

    path: Optional[str] = None
    """A folder, a checkpoint of rlpost, or the name of a model on the hub."""
    revision: Optional[str] = None
    config: dict[str, Any] = field(default_factory=dict)
    """From scratch: `model_type` and the fields of that configuration in transformers."""
    tokenizer: Optional[Tokenizer] = None
    chat_template: Optional[str] = None
    """A Jinja file, for models that bring no chat template."""
    lora: Optional[Lora] = None
    precision: Precision = Precision.auto
    attention: Attention = Attention.auto
    gradient_checkpointing: bool = False


@dataclass
class Sampling:
    """How completions are sampled."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)


@dataclass
class Kl:
    """KL to the reference: `beta` times an estimator in the reward or in the loss."""

    beta: float = 0.0
    placement: KlPlacement = KlPlacement.reward
    estimator: KlEstimator = KlEstimator.k1


@dataclass
class Stage:
    """What every stage has."""

    kind: Kind = MISSING
    enabled: bool = True
    """`stages.NAME.enabled=false` leaves the stage out of the pipeline."""
    start: Optional[str] = None
    """The stage whose model this one starts from: by default the one before it; `base` is the base model."""


@dataclass
class Training(Stage):
    """What every stage that updates weights has."""

    data: dict[str, Source] = field(default_factory=dict)
    steps: Optional[int] = None
    """Optimiser steps (grpo: rollout steps); or give `epochs`."""
    epochs: Optional[float] = None
    learning_rate: float = MISSING
    schedule: Schedule = Schedule.linear
    warmup: float = 0.0
    """A share of all updates below 1, a number of updates from 1 on."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    tokens_per_pass: int = 8192
    """Token budget of one forward and backward pass; the gradient does not depend on it."""
    max_length: int = 1024
    """Tokens of prompt and completion together."""
    too_long: TooLong = TooLong.refuse
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1


@dataclass
class Sft(Training):
    """Supervised fine-tuning: maximise the likelihood of completions."""

    kind: Kind = Kind.sft
    batch_size: int = 32
    """Rows an update."""
    loss: Function = field(default_factory=lambda: Function(fn="nll"))
    weight: Weight = Weight.token_mean


@dataclass
class Dpo(Training):
    """Direct preference optimisation and its relatives, on pairs."""

    kind: Kind = Kind.dpo
    batch_size: int = 32
    """Pairs an update."""
    loss: Function = field(default_factory=lambda: Function(fn="dpo"))
    nll: float = 0.0
    """Weight of the chosen completion's negative log-likelihood, per token, beside the pair loss."""
    reference: str = "start"
    """`start` (where this stage begins), `base`, or an earlier stage by name."""


@dataclass
class Grpo(Training):
    """Reinforcement learning from groups of sampled completions."""

    kind: Kind = Kind.grpo
    prompts: int = 32
    """Prompts a step."""
    group_size: int = 8
    """Completions a prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    rewards: list[Reward] = field(default_factory=list)
    advantage: Function = field(default_factory=lambda: Function(fn="group_normalised"))
    loss: Function = field(default_factory=lambda: Function(fn="clipped_surrogate"))
    weight: Weight = Weight.token_mean
    kl: Kl = field(default_factory=Kl)
    reference: str = "start"
    updates: int = 1
    """Optimiser updates a step, each on its share of the step's groups."""
    mask_truncated: bool = False
    """Leave completions cut at the length limit out of the advantage and the update."""
    entropy: float = 0.0
    """Weight of an entropy bonus, averaged over actions."""
    table_every: int = 100
    """Steps between tables of sample completions, which are also saved as rollouts (0: neither)."""


@dataclass
class Pairs(Stage):
    """Preference pairs from the model's own samples, ranked by rewards; the model passes unchanged."""

    kind: Kind = Kind.pairs
    data: dict[str, Source] = field(default_factory=dict)
    prompts: Optional[int] = None
    """How many prompts to sample (all of them by default)."""
    group_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    rewards: list[Reward] = field(default_factory=list)
    choice: PairChoice = PairChoice.one
    min_gap: float = 0.0
    """A pair's rewards must differ by more than this."""


@dataclass
class Evaluation:
    """Held-out evaluation: the first reward is the accuracy (1 is right), others are reported beside it."""

    data: dict[str, Source] = field(default_factory=dict)
    rewards: list[Reward] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    greedy: bool = True
    samples: int = 1
    """Samples a prompt at `sampling.temperature` (0: greedy only)."""
    pass_at: list[int] = field(default_factory=list)
    """The k of pass@k, each at most `samples`."""
    best_of: bool = False
    """Also report the best of a prompt's samples by the sum of rewards."""
    slices: list[str] = field(default_factory=list)
    """Columns with true or false, reported apart."""
    every_stage: bool = True
    """`rlpost train` evaluates the base model and each stage's result, and prints the table."""
    show: int = 3
    """Prompts whose answers are printed before and after."""
    batch: int = 256
    """Completions generated at a time."""


@dataclass
class Recipe:
    """A whole recipe."""

    description: str = ""
    run: str = MISSING
    """Name of the run directory."""
    runs: str = "runs"
    """Folder that holds run directories."""
    folder: Optional[str] = None
    """What relative paths and `file.py:function` refer to: the recipe's own folder by default.
    A resolved recipe, which lies in its run, names the folder it came from."""
    seed: int = 0
    threads: Optional[int] = None
    """CPU threads (as torch chooses by default)."""
    vars: dict[str, Any] = field(default_factory=dict)
    """The recipe's own variables, for `${vars.name}`."""
    model: Model = field(default_factory=Model)
    stages: dict[str, Any] = field(default_factory=dict)
    """Stages by name, in order; the name is the stage's directory."""
    evaluation: Optional[Evaluation] = None


STAGES: dict[Kind, type[Stage]] = {Kind.sft: Sft, Kind.dpo: Dpo, Kind.grpo: Grpo, Kind.pairs: Pairs}
