"""The recipe as dataclasses: a key in YAML is a field here, and nothing else is a key.

Ranges and rules across fields live in `validate.py`; how YAML becomes these classes in `resolve.py`.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from rlpost.data.params import Direction
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.evaluate.params import Evaluation
from rlpost.goals.params import Goals, ValueTarget
from rlpost.policy.params import Model
from rlpost.recipe.parts import Kind, Stage, Training
from rlpost.recipe.row_stages import Guesses, Guided, Pairs, StepLabels
from rlpost.rewards.params import Reward
from rlpost.stages.params import MAKES_JUDGES, MAKES_ROWS, AtLimit, Correction, Critic, Kl, Refresh, Weight
from rlpost.usercode.params import EnvironmentFunction, Function

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


@dataclass
class Sft(Training):
    """Supervised fine-tuning: maximise the likelihood of completions, or imitate a teacher's distributions."""

    kind: Kind = Kind.sft
    batch_size: int = 32
    """Rows an update."""
    loss: Function = field(default_factory=lambda: Function(fn="nll"))
    weight: Weight = Weight.token_mean
    teacher: Optional[str] = None
    """For losses that ask for a teacher: a model of the same tokenizer, by stage, checkpoint, folder or hub name."""


@dataclass
class Dpo(Training):
    """Direct preference optimisation and its relatives, on pairs (with `ranking`, on ranked completions)."""

    kind: Kind = Kind.dpo
    batch_size: int = 32
    """Pairs an update."""
    loss: Function = field(default_factory=lambda: Function(fn="dpo"))
    nll: float = 0.0
    """Weight of the chosen completion's negative log-likelihood, per token, beside the pair loss."""
    reference: str = "start"
    """`start` (where this stage begins), `base`, or an earlier stage by name."""
    modifiers: list[Function] = field(default_factory=list)
    """What is done to the pairs before the loss, in order (objectives/preference_modifiers.py)."""
    refresh: Optional[Refresh] = None


@dataclass
class Kto(Training):
    """Learning from completions that are each desirable or not, without pairs."""

    kind: Kind = Kind.kto
    batch_size: int = 32
    """Rows an update."""
    loss: Function = field(default_factory=lambda: Function(fn="kto"))
    reference: str = "start"
    """`start` (where this stage begins), `base`, or an earlier stage by name."""


@dataclass
class RewardModel(Training):
    """A model that scores completions, from pairs or from ranked completions; the policy passes unchanged."""

    kind: Kind = Kind.reward_model
    batch_size: int = 32
    """Pairs, or ranked groups, an update."""
    loss: Function = field(default_factory=lambda: Function(fn="bradley_terry"))


@dataclass
class ProcessRewardModel(Training):
    """A model that scores every step of a completion, from labelled steps; the policy passes unchanged."""

    kind: Kind = Kind.process_reward_model
    batch_size: int = 32
    """Rows an update."""
    loss: Function = field(default_factory=lambda: Function(fn="process_reward"))


@dataclass
class Value(Training):
    """A model of the probability that a completion ends in a goal, from every state on; the policy passes unchanged."""

    kind: Kind = Kind.value
    prompts: int = 32
    """Prompts a step."""
    group_size: int = 8
    """Completions a prompt, sampled from the policy as it is."""
    updates: int = 1
    """Optimiser updates a step, each on its share of the prompts."""
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    goals: Goals = field(default_factory=Goals)
    target: ValueTarget = ValueTarget.monte_carlo
    avoid: bool = False
    """Model the probability of not ending in the goal, which is what guiding away needs."""
    condition: Optional[str] = None
    """The model reads the goal: this text, with {goal} for it, stands before the prompt. Without, one model is of all
    goals together."""
    hindsight: float = 0.0
    """Share of prompts whose goal is instead an ending that one of their own completions reached."""
    hindsight_tokens: int = 4
    """Tokens of such an ending, at most."""


@dataclass
class Rollouts(Training):
    """What every stage that learns from samples of its own policy has."""

    prompts: int = 32
    """Prompts a step."""
    group_size: int = 8
    """Completions a prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    rewards: list[Reward] = field(default_factory=list)
    kl: Kl = field(default_factory=Kl)
    reference: str = "start"
    """`start` (where this stage begins), `base`, or an earlier stage by name."""
    updates: int = 1
    """Optimiser updates a pass over the step's samples, each on its share of the step's groups."""
    passes: int = 1
    """Passes over the step's samples."""
    mask_truncated: bool = False
    """Leave completions cut at the length limit out of the advantage and the update."""
    environment: Optional[EnvironmentFunction] = None
    """What answers the model's turns: (text, turns, example) -> reply, or null when the episode is over."""
    turns: int = 2
    """With an environment: most turns of the model."""
    step_end: Optional[str] = None
    """A step of a completion ends with this text (empty: every token is a step); for rewards and advantages by step."""
    table_every: int = 100
    """Steps between tables of sample completions, which are also saved as rollouts (0: neither)."""


@dataclass
class Grouped(Rollouts):
    """What the stages with a baseline from groups have."""

    advantage: Function = field(default_factory=lambda: Function(fn="group_normalised"))
    weight: Weight = Weight.token_mean
    whiten: bool = False
    """Shift and scale the advantages of all actions of a step to mean 0 and variance 1."""
    resample: int = 0
    """Rounds of further prompts drawn while groups without a signal are left (dynamic sampling)."""
    fresh_rollouts: int = 4
    """For `monte_carlo_values`: rollouts from the start of every step of a completion."""
    recorded: bool = False
    """Rows are rollouts that another policy made (rollouts/*.jsonl of a run): nothing is sampled."""
    correction: Correction = field(default_factory=Correction)


@dataclass
class Grpo(Grouped):
    """Reinforcement learning from groups of sampled completions."""

    kind: Kind = Kind.grpo
    loss: Function = field(default_factory=lambda: Function(fn="clipped_surrogate"))
    entropy: float = 0.0
    """Weight of an entropy bonus, averaged over actions."""


@dataclass
class Trpo(Grouped):
    """Trust-region policy optimisation: the natural gradient, as far as the trust region allows."""

    kind: Kind = Kind.trpo
    learning_rate: float = 1.0
    """The share of the largest allowed step that is tried first."""
    delta: float = 0.01
    """Radius of the trust region: KL(old || new) in nats, averaged over actions."""
    damping: float = 0.1
    """Added to the Fisher matrix in the solve, not in the step's length."""
    iterations: int = 10
    """Of conjugate gradients."""
    backtracks: int = 10
    """Halvings of the step before it is given up."""


@dataclass
class Ppo(Rollouts):
    """Proximal policy optimisation with a critic."""

    kind: Kind = Kind.ppo
    gamma: float = 1.0
    """Discount of a reward, per action."""
    lam: float = 0.95
    """λ of generalised advantage estimation."""
    at_limit: AtLimit = AtLimit.terminate
    whiten: bool = True
    """Shift and scale the advantages of all actions of a step to mean 0 and variance 1."""
    loss: Function = field(default_factory=lambda: Function(fn="clipped_surrogate"))
    weight: Weight = Weight.token_mean
    entropy: float = 0.0
    """Weight of an entropy bonus, averaged over actions."""
    critic: Critic = field(default_factory=Critic)


@dataclass
class OnlineDpo(Rollouts):
    """DPO on pairs of fresh samples, the best and the worst of each group by reward."""

    kind: Kind = Kind.online_dpo
    loss: Function = field(default_factory=lambda: Function(fn="dpo"))
    min_gap: float = 0.0
    """A pair's rewards must differ by more than this."""


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
    rollouts: EngineChoice = field(default_factory=EngineChoice)
    """What samples, unless a stage or the evaluation says otherwise for itself."""
    stages: dict[str, Any] = field(default_factory=dict)
    """Stages by name, in order; the name is the stage's directory."""
    evaluation: Optional[Evaluation] = None


STAGES: dict[Kind, type[Stage]] = {
    Kind.sft: Sft,
    Kind.dpo: Dpo,
    Kind.kto: Kto,
    Kind.online_dpo: OnlineDpo,
    Kind.reward_model: RewardModel,
    Kind.process_reward_model: ProcessRewardModel,
    Kind.value: Value,
    Kind.grpo: Grpo,
    Kind.ppo: Ppo,
    Kind.trpo: Trpo,
    Kind.pairs: Pairs,
    Kind.guided: Guided,
    Kind.guesses: Guesses,
    Kind.step_labels: StepLabels,
}


def reads_backwards(stage: Any) -> bool:
    """Whether the stage trains a model of reversed text, which is no policy; the model passes unchanged."""
    return any(source.direction is Direction.reverse for source in stage.data.values())


def leaves_policy(stage: Stage) -> bool:
    """Whether the next stage starts from this one's result."""
    return stage.kind not in (*MAKES_ROWS, *MAKES_JUDGES) and not reads_backwards(stage)
