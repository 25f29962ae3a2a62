"""What stages choose from: weights, KL, corrections, critics, references that follow, pairs."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from rlpost.engine.params import EngineChoice
from rlpost.section import Choice, Local, Section


class Weight(Choice):
    """How much each token counts in the loss of an update (objectives/weights.py)."""

    token_mean = "token_mean"
    """Every token of the update counts the same."""
    sequence_mean = "sequence_mean"
    """Every completion counts the same, and so does every token within it."""
    sequence_sum = "sequence_sum"
    """The sum over a completion's tokens, averaged over completions."""
    constant_length = "constant_length"
    """As `sequence_sum`, divided by the longest completion allowed."""


class KlEstimator(Choice):
    """Estimators of a token's KL(policy || reference)."""

    k1 = "k1"
    """log r: exact in the reward, refused in the loss (docs/objectives.md#kl-to-the-reference)."""
    k2 = "k2"
    """½ (log r)²."""
    k3 = "k3"
    """1/r − 1 + log r: never negative."""
    k3_weighted = "k3_weighted"
    """k3 times π(token)/π_sampler(token): right for samples of earlier weights or of another engine; in the loss
    alone."""


class KlPlacement(Choice):
    """Where the KL term goes."""

    reward = "reward"
    """Subtracted from the reward."""
    loss = "loss"
    """Added to the loss; in `grpo` alone."""


class Kl(Section):
    """KL to the reference: `beta` times an estimator, in the reward or in the loss."""

    beta: float = Field(0.0, ge=0)
    """Coefficient; 0: no KL to the reference."""
    placement: KlPlacement = KlPlacement.reward
    """Where the term goes."""
    estimator: KlEstimator = KlEstimator.k1
    """Estimator of a token's KL, with r = π(token)/π_ref(token)."""
    target: float | None = Field(None, gt=0)
    """Adapt `beta` so that a completion's KL, in nats, comes to this (Ziegler et al. 2019, arXiv:1909.08593)."""
    horizon: int = Field(10000, ge=1)
    """Completions over which an adapting `beta` moves."""


class AdaptiveEntropy(Section):
    """An entropy bonus that is there only where the entropy has fallen to a target, and the larger the longer it stays
    there (Skywork-OR1, He et al. 2025, arXiv:2505.22312)."""

    target: float = Field(gt=0)
    """Nats a token, of the metric `entropy`; at most this, and the bonus counts and its weight rises, else the weight
    falls and nothing counts."""
    delta: float = Field(0.005, gt=0)
    """By how much the weight moves, once a step of sampling."""
    largest: float = Field(1.0, gt=0)
    """The most that the weight comes to; the least is 0."""

    def start_problems(self, coef: float, where: str) -> Iterator[str]:
        """Of a weight at the start that is beyond the largest one, in the stage at key path `where`."""
        if coef > self.largest:
            yield (
                f"{where}.entropy_coef: {coef:g} is where the weight begins, and beyond "
                f"adaptive_entropy.largest={self.largest:g} - lower it, or raise that"
            )


class OnTruncation(Choice):
    """What the length limit means to an episode."""

    terminate = "terminate"
    """An end like any other: nothing comes after it."""
    bootstrap = "bootstrap"
    """A cut: the critic's value of the last state stands for what would have come."""


class CreditUnit(Choice):
    """What is one action to a critic: what it values the states between, and what an advantage is of."""

    token = "token"
    """Each token. A step's reward is on its last token, and `gamma` and `gae_lambda` count tokens."""
    turn = "turn"
    """Each turn of an episode, or each step where `step_end` divides it: valued at its first token, rewarded at its
    end, with one advantage for all of it; `gamma` and `gae_lambda` count turns."""


class CorrectionMode(Choice):
    """What is done about probabilities that differ between sampler and trainer."""

    none = "none"
    """Nothing."""
    truncate = "truncate"
    """Weigh by trainer over sampler, at most `cap` (TIS)."""
    mask = "mask"
    """Weigh likewise, and leave out what lies beyond `cap` or below `floor` (MIS)."""


class Per(Choice):
    """What a ratio of probabilities is of."""

    token = "token"
    """One token."""
    completion = "completion"
    """A whole completion."""


class Correction(Section):
    """Importance weights between the sampler's probabilities and the trainer's (TIS, MIS)."""

    mode: CorrectionMode | None = None
    """What is done about probabilities that differ. By default `truncate` where another engine than the local one
    samples, or `rollouts.staleness` lets it sample with earlier weights; else `none`."""
    per: Per = Per.token
    """What a ratio of probabilities is of."""
    cap: float = Field(2.0, gt=0)
    """Largest weight."""
    floor: float = Field(0.0, ge=0)
    """With `mask`: smallest weight."""

    def mode_for(self, engine: EngineChoice | None) -> CorrectionMode:
        """The mode for samples of that engine; None: they were recorded."""
        if self.mode is not None:
            return self.mode
        return CorrectionMode.none if engine is None or engine.own_numerics else CorrectionMode.truncate

    def problems(self, where: str) -> Iterator[str]:
        """Of a floor above the cap."""
        if self.mode is not CorrectionMode.none and self.floor >= self.cap:
            yield f"{where}.floor: {self.floor:g} is not below cap={self.cap:g}"


class Opponents(Section):
    """Self-play: who plays the second player of an environment that has one (docs/games.md)."""

    pool_size: int = Field(4, ge=1)
    """Past versions of the policy that are kept; the oldest goes first."""
    snapshot_every: int = Field(20, ge=1)
    """Steps between versions that are added to the pool; the first is the policy that the stage begins with."""
    latest_ratio: float = Field(0.5, ge=0, le=1)
    """Share of prompts whose episodes are against the policy as it is; the others meet a version of the pool, each
    equally often."""


class Against(Section):
    """Whom the policy meets: as many completions of this other one answer each prompt, and are compared with its own.
    The local engine samples them, with the reference read beside the policy."""

    share: float = Field(1.0, gt=0, le=1)
    """The reference's share β of the policy that is met, π^(1−β)·π_ref^β in each state; 1: the reference itself."""


class Preference(Choice):
    """How likely a completion is preferred to another, by their rewards r and r'."""

    bradley_terry = "bradley_terry"
    """σ((r − r')/scale)."""
    step = "step"
    """1 where r is the greater, ½ where they are equal, else 0."""


class Contest(Against):
    """Whom the policy meets: a completion's reward is how likely it is preferred to the other policy's (Nash-MD-PG,
    arXiv:2312.00886). The local engine samples these, with the reference read beside the policy."""

    preference: Preference = Preference.bradley_terry
    """What makes a preference of two rewards."""
    scale: float = Field(1.0, gt=0)
    """With `bradley_terry`: what differences of rewards are divided by."""


class Trunk(Choice):
    """What a critic's head reads its features from."""

    own = "own"
    """An adapter of its own on the policy's base, or with full fine-tuning a model of its own; trained."""
    frozen = "frozen"
    """The model that the stage starts from, as it is; only the head is trained."""


class Critic(Section):
    """The value network of a `ppo` stage: a linear head on hidden states, trained at the same time as the policy."""

    learning_rate: float | None = Field(None, gt=0)
    """Peak of its learning rate; the policy's by default."""
    trunk: Trunk = Trunk.own
    """What the head reads."""
    start: Annotated[str | None, Local()] = None
    """A `reward_model` stage (or checkpoint) to begin from instead of the stage's own start."""
    clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the one it had when the samples were taken."""
    warmup_steps: int = Field(0, ge=0)
    """First steps that train the critic alone."""


class Refresh(Section):
    """A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""

    every: int = Field(100, ge=1)
    """Updates between moves."""
    share: float = Field(0.6, gt=0, le=1)
    """Share of the policy in the next reference."""


class PairChoice(Choice):
    """What rows a group of scored samples gives."""

    one = "one"
    """A pair: the best against the worst completion of each prompt."""
    all = "all"
    """Every better/worse combination of distinct completions."""
    ranked = "ranked"
    """All distinct completions with their rewards."""
    labelled = "labelled"
    """Each distinct completion by itself, desirable if its reward is above the prompt's mean."""
    valued = "valued"
    """No completions: each prompt once, with its `optimal_value`, β·log mean e^{r/β} over all of them that are scored,
    cut off or not (A*-PO, Brantley et al. 2025, arXiv:2505.20686)."""
