"""What stages choose from: weights, KL, corrections, critics, references that follow, pairs."""

from typing import Annotated

from pydantic import Field

from rlpost.section import Choice, Local, Section


class Weight(Choice):
    """How much each action counts in an update (objectives/weights.py)."""

    token_mean = "token_mean"
    sequence_mean = "sequence_mean"
    sequence_sum = "sequence_sum"
    constant_length = "constant_length"


class KlEstimator(Choice):
    """Per-token estimators of KL(policy || reference)."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KlPlacement(Choice):
    """Where the KL term goes."""

    reward = "reward"
    loss = "loss"


class Kl(Section):
    """KL to the reference: `beta` times an estimator in the reward or in the loss."""

    beta: float = Field(0.0, ge=0)
    placement: KlPlacement = KlPlacement.reward
    estimator: KlEstimator = KlEstimator.k1
    target: float | None = Field(None, gt=0)
    """Adapt beta so that a completion's KL, in nats, comes to this (Ziegler et al. 2019, arXiv:1909.08593)."""
    horizon: int = Field(10000, ge=1)
    """Completions over which an adapting beta moves."""


class AtLimit(Choice):
    """What the length limit means to an episode."""

    terminate = "terminate"
    """An end like any other: nothing comes after it."""
    bootstrap = "bootstrap"
    """A cut: the value of the last state stands for what would have come."""


class CorrectionMode(Choice):
    """What is done about log-probabilities that differ between sampler and trainer."""

    none = "none"
    truncate = "truncate"
    """Weigh by trainer over sampler, at most `cap` (TIS)."""
    mask = "mask"
    """Weigh likewise, and leave out what lies beyond `cap` or below `floor` (MIS)."""


class Per(Choice):
    """What a ratio of probabilities is of."""

    token = "token"
    completion = "completion"


class Correction(Section):
    """Importance weights between the engine's log-probabilities and the trainer's."""

    mode: CorrectionMode = CorrectionMode.none
    per: Per = Per.token
    cap: float = Field(2.0, gt=0)
    floor: float = Field(0.0, ge=0)


class Trunk(Choice):
    """What a critic reads its features from."""

    own = "own"
    """An adapter of its own on the policy's base, or with full fine-tuning a model of its own; trained."""
    frozen = "frozen"
    """The model that the stage starts from, as it is; only the head is trained."""


class Critic(Section):
    """The value network of a `ppo` stage."""

    learning_rate: float | None = Field(None, gt=0)
    """Its peak; the policy's by default."""
    trunk: Trunk = Trunk.own
    start: Annotated[str | None, Local()] = None
    """A reward_model stage (or checkpoint) to begin from instead of the stage's own start."""
    clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the one it had when the samples were taken."""
    warmup_steps: int = Field(0, ge=0)
    """First steps that train the critic alone."""


class Refresh(Section):
    """A reference that follows the policy: share·policy + (1−share)·reference, every so many updates."""

    every: int = Field(100, ge=1)
    share: float = Field(0.6, gt=0, le=1)


class PairChoice(Choice):
    """What rows a group of scored samples gives."""

    one = "one"
    """A pair: a best and a worst completion of each prompt."""
    all = "all"
    """Every better/worse combination of distinct completions."""
    ranked = "ranked"
    """All distinct completions with their rewards."""
    labelled = "labelled"
    """Each distinct completion by itself, desirable if its reward is above the prompt's mean."""
