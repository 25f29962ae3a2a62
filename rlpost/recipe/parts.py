"""The parts that recipes are made of: choices, functions, sources of rows, the model, sampling."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Optional

from omegaconf import MISSING

from rlpost.recipe.called import EnvironmentFunction, Reward, TimedFunction

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


class Kind(StrEnum):
    """What a stage does."""

    sft = "sft"
    dpo = "dpo"
    kto = "kto"
    online_dpo = "online_dpo"
    reward_model = "reward_model"
    process_reward_model = "process_reward_model"
    value = "value"
    grpo = "grpo"
    ppo = "ppo"
    trpo = "trpo"
    pairs = "pairs"
    guided = "guided"
    guesses = "guesses"
    step_labels = "step_labels"


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


class Unrendered(StrEnum):
    """What happens to a row that says more than its chat template renders."""

    refuse = "refuse"
    drop = "drop"
    ignore = "ignore"


class Direction(StrEnum):
    """The way a text is read."""

    forward = "forward"
    reverse = "reverse"


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
    """What rows a group of scored samples gives."""

    one = "one"
    """A pair: a best and a worst completion of each prompt."""
    all = "all"
    """Every better/worse combination of distinct completions."""
    ranked = "ranked"
    """All distinct completions with their rewards."""
    labelled = "labelled"
    """Each distinct completion by itself, desirable if its reward is above the prompt's mean."""


class AtLimit(StrEnum):
    """What the length limit means to an episode."""

    terminate = "terminate"
    """An end like any other: nothing comes after it."""
    bootstrap = "bootstrap"
    """A cut: the value of the last state stands for what would have come."""


class Trunk(StrEnum):
    """What a critic reads its features from."""

    own = "own"
    """An adapter of its own on the policy's base, or with full fine-tuning a model of its own; trained."""
    frozen = "frozen"
    """The model that the stage starts from, as it is; only the head is trained."""


class CorrectionMode(StrEnum):
    """What is done about log-probabilities that differ between sampler and trainer."""

    none = "none"
    truncate = "truncate"
    """Weigh by trainer over sampler, at most `cap` (TIS)."""
    mask = "mask"
    """Weigh likewise, and leave out what lies beyond `cap` or below `floor` (MIS)."""


class ValueTarget(StrEnum):
    """What a value network is trained towards."""

    monte_carlo = "monte_carlo"
    """Whether the completion ended in the goal (cross-entropy)."""
    bootstrap = "bootstrap"
    """The value of the next state; where there is none, whether the goal was reached (squared error)."""
    contrastive = "contrastive"
    """To tell a completion's own ending from those of others: log V up to a constant of the prompt."""


class Per(StrEnum):
    """What a ratio of probabilities is of."""

    token = "token"
    completion = "completion"


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
    task: Optional[TimedFunction] = None
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
    map: Optional[TimedFunction] = None
    """row -> row or rows, applied once when the source is read."""
    present: Optional[TimedFunction] = None
    """(row, random) -> row, applied anew every time a row is drawn."""
    fold: Optional[Fold] = None
    unrendered: Unrendered = Unrendered.refuse
    """`ignore` reads the row without what the template leaves out."""
    direction: Direction = Direction.forward
    """`reverse`, in sft alone: prompt and completion are one text, learned from its end to its beginning."""


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
    target_modules: Any = None
    """As in peft; by default `all-linear`, or what a saved adapter has that training goes on with."""


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
    target: Optional[float] = None
    """Adapt beta so that a completion's KL, in nats, comes to this (Ziegler et al. 2019, arXiv:1909.08593)."""
    horizon: int = 10000
    """Completions over which an adapting beta moves."""


@dataclass
class Correction:
    """Importance weights between the engine's log-probabilities and the trainer's."""

    mode: CorrectionMode = CorrectionMode.none
    per: Per = Per.token
    cap: float = 2.0
    floor: float = 0.0


@dataclass
class Critic:
    """The value network of a `ppo` stage."""

    learning_rate: Optional[float] = None
    """Its peak; the policy's by default."""
    trunk: Trunk = Trunk.own
    start: Optional[str] = None
    """A reward_model stage (or checkpoint) to begin from instead of the stage's own start."""
    clip: Optional[float] = 0.2
    """How far a value may move from the one it had when the samples were taken."""
    warmup_steps: int = 0
    """First steps that train the critic alone."""


@dataclass
class Refresh:
    """A reference that follows the policy: share·policy + (1−share)·reference, every so many updates."""

    every: int = 100
    share: float = 0.6


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
    aux_loss_coef: Optional[float] = None
    """Of a mixture of experts' balance loss, beside the stage's own (0: none); by default the model's
    `router_aux_loss_coef`."""
    max_length: int = 1024
    """Tokens of prompt and completion together."""
    too_long: TooLong = TooLong.refuse
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1


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
    judge: Optional[str] = None
    """A reward_model stage (or checkpoint): also report the best of a prompt's samples by its score."""
    environment: Optional[EnvironmentFunction] = None
    """What answers the model's turns, as in the stages."""
    turns: int = 2
    """With an environment: most turns of the model."""
    slices: list[str] = field(default_factory=list)
    """Columns with true or false, reported apart."""
    every_stage: bool = True
    """`rlpost train` evaluates the base model and each stage's result, and prints the table."""
    show: int = 3
    """Prompts whose answers are printed before and after."""
    batch: int = 256
    """Completions generated at a time."""
