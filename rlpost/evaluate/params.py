"""Evaluation in a recipe."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from rlpost.data.params import Source
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.rewards.params import REWARD, Reward, reward_names
from rlpost.section import Local, Section
from rlpost.usercode.params import ENVIRONMENT, TOOL, EnvironmentFunction, ToolFunction, tool_problems


class Evaluation(Section):
    """Held-out evaluation."""

    data: dict[str, Source] = Field(default_factory=dict)
    """Sources of rows by name; at least one, and no rows of a stage."""
    rewards: Annotated[list[Reward], REWARD] = Field(default_factory=list)
    """The first is the accuracy (1 is right); the others are reported beside it."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How completions are drawn."""
    rollouts: EngineChoice | None = None
    """What samples; by default the recipe's `rollouts`."""
    greedy: bool = True
    """Also decode greedily: always the likeliest token."""
    samples: int = Field(1, ge=0)
    """Samples a prompt at `sampling.temperature`; 0: greedy only."""
    pass_at: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """The k of pass@k, each at most `samples`."""
    best_of: bool = False
    """Also report the best of a prompt's samples by the sum of rewards."""
    judge: Annotated[str | None, Local()] = None
    """A `reward_model` stage or a reverse one (docs/goals.md#reverse-models), or a checkpoint: also report the best of
    a prompt's samples by its score."""
    environment: Annotated[EnvironmentFunction | None, ENVIRONMENT] = None
    """What answers the model's turns, as in the stages."""
    tools: Annotated[list[ToolFunction], TOOL] = Field(default_factory=list)
    """Functions that the model can call, as in the stages."""
    max_turns: int = Field(2, ge=1)
    """With an environment or tools: most turns of the model."""
    slices: list[str] = Field(default_factory=list)
    """Columns: prompts for which one is true are reported apart."""
    every: int = Field(0, ge=0)
    """Steps between evaluations while a stage trains, beside one after its last step; 0: none. A stage's `eval_every`
    goes before it."""
    every_stage: bool = True
    """`rlpost train` evaluates the base model and each stage's result, and prints the table."""
    show: int = Field(3, ge=0)
    """Prompts whose answers are printed before and after."""
    batch: int = Field(256, ge=1)
    """Completions generated at a time."""

    def metrics(self) -> list[str]:
        """Names of the numbers that it gives while a stage trains, as `evaluator.numbers`."""
        modes = [("greedy", 1)] if self.greedy else []
        modes += [("sampled", self.samples)] if self.samples else []
        names = []
        for mode, samples in modes:
            own = ["accuracy", *(f"accuracy/{name}" for name in self.slices), "reward"]
            own += [f"reward/{name}" for name in reward_names(self.rewards)]
            own += ["unscored", "truncated", "length", *(f"pass@{k}" for k in self.pass_at if k <= samples)]
            own += ["best_of"] if self.best_of and samples > 1 else []
            own += ["judged"] if self.judge is not None and samples > 1 else []
            names += [f"{mode}/{name}" for name in own]
        return names

    def problems(self, where: str) -> Iterator[str]:
        """What needs several samples, or any."""
        if not self.data:
            yield f"{where}.data: missing - name at least one source, like {{test: {{path: rows.jsonl}}}}"
        yield from tool_problems(self.tools, self.environment, self.max_turns, where)
        for i, k in enumerate(self.pass_at):
            if k > self.samples:
                yield (
                    f"{where}.pass_at[{i}]: pass@{k} needs {k} samples a prompt, not {self.samples} - "
                    f"give {where}.samples={k} or more"
                )
        if self.best_of and self.samples < 2:
            yield f"{where}.best_of: needs at least 2 samples a prompt - give {where}.samples=8, say"
        if self.judge is not None and self.samples < 2:
            yield f"{where}.judge: chooses among at least 2 samples a prompt - give {where}.samples=8, say"
        if not self.greedy and self.samples == 0:
            yield f"{where}.samples: 0 without greedy leaves nothing to evaluate - give samples or greedy=true"
