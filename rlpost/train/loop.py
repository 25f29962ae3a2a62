"""What every training stage does around its steps: resume, log, save, stop when asked, show progress."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlpost import console, ranks
from rlpost.errors import DivergedError, Interrupted, ModelError, RecipeError
from rlpost.policy.identity import Inputs, first_difference
from rlpost.policy.pissa import INITIAL
from rlpost.policy.sharded import local
from rlpost.policy.value_head import initial_of
from rlpost.ranks import first_writes
from rlpost.run.interrupt import Interrupts
from rlpost.run.names import EVALUATIONS
from rlpost.run.stage import BEST, StageDirectory
from rlpost.trackers.api import EVAL
from rlpost.trackers.mirrors import Mirrors
from rlpost.train.evaluation import StageEvaluation
from rlpost.train.learner import Learner
from rlpost.train.random_state import random_states, set_random_states
from rlpost.train.rollout_rows import rollout_row
from rlpost.train.symptoms import Watch
from rlpost.train.throughput import SPEED, Throughput, shown
from rlpost.types import Group
from rlpost.usercode.calls import in_use

POLICY = "policy"
"""Name of the learner whose model is the stage's result."""


class Stateful(Protocol):
    """Something whose state is saved with a checkpoint and restored from it."""

    def state(self) -> dict[str, Any]:
        """Its state as JSON."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Restore that state."""
        ...


@runtime_checkable
class Beside(Stateful, Protocol):
    """Something that works in a thread beside training."""

    def settle(self) -> None:
        """Wait until it has done what it was given."""
        ...


class Weights(Protocol):
    """Weights that change without a learner (a moving reference); checkpoints hold them too."""

    def weights(self) -> dict[str, Tensor]:
        """By name."""
        ...

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore them."""
        ...


class Loop:
    """The steps of one stage.

    Everything that a step changes is in a checkpoint: weights, optimiser, random generators, `states`; a resumed
    stage does bit for bit what an uninterrupted one would have done.
    """

    def __init__(
        self,
        title: str,
        out: StageDirectory,
        learners: Mapping[str, Learner],
        states: Mapping[str, Stateful],
        weights: Mapping[str, Weights],
        interrupts: Interrupts,
        inputs: Inputs,
        *,
        steps: int,
        checkpoint_every: int,
        keep: int,
        log_every: int = 1,
        mirrors: Mirrors | None = None,
        evaluation: StageEvaluation | None = None,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            title: the stage's name.
            out: its directory.
            learners: by name: `policy`, and others such as `critic`.
            states: further state that checkpoints hold, by name.
            weights: further tensors that checkpoints hold, by name.
            interrupts: signals that ask to stop.
            inputs: the models and rows that the stage reads besides its data.
            steps: how many in all.
            checkpoint_every: steps between checkpoints; there is one after the last step in any case.
            keep: checkpoints kept.
            log_every: steps between lines of the log.
            mirrors: trackers that are sent what is logged.
            evaluation: measures held-out rows while the stage trains.
        """
        self._title = title
        self._out = out
        self._learners = learners
        self._states = states
        self._beside = [one for one in states.values() if isinstance(one, Beside)]
        initial = {f"{name}_{INITIAL}": initial_of(learner.model) for name, learner in learners.items()}
        self._weights = {**weights, **{name: found for name, found in initial.items() if found is not None}}
        self._interrupts = interrupts
        self._inputs = inputs
        self._steps = steps
        self._every = checkpoint_every
        self._keep = keep
        self._log_every = log_every
        self._mirrors = mirrors or Mirrors()
        self._evaluation = evaluation or StageEvaluation(0, (), None)
        self._evaluated = 0
        self._live: dict[str, float] = {}
        self._live_evaluation: dict[str, float] = {}
        self.done = 0
        """Steps done, in this process and before."""
        self._saved = 0
        self._watch = Watch(title)
        self.throughput = Throughput(list(learners.values()))
        """Told by a stage that samples what its steps spend their time on."""

    def steps(self) -> Iterator[int]:
        """Step numbers from the last checkpoint on; checkpoints are written between steps.

        The state after the last step is saved too: the result can be made from it again, or more steps added. With
        `keep_best` the policy has the weights of the best evaluation in the end.

        Raises:
            Interrupted: after a checkpoint, when a signal asked to stop.
            DivergedError: what a checkpoint or the result would hold is not finite; it is not written.
            ModelError: a model or rows that the stage depends on have changed since its checkpoint.
            RecipeError: more steps are done than the recipe asks for.
        """
        first = self._resume()
        if first > self._steps:
            raise RecipeError(
                f"stages.{self._title}: {first} steps are done but the recipe asks for {self._steps}; "
                f"ask for at least {first}, or remove {self._out.path} to train it again"
            )
        self._out.reopen()
        self._mirrors.catch_up(self._title, self._out.path)
        if first:
            console.say(f"{self._title}: resumes after step {first} of {self._steps}")
        with console.Progress(self._title, self._steps, start=first) as progress:
            self._evaluate_again(first)
            for step in range(first, self._steps):
                if self._evaluation.stops:
                    break
                self.throughput.begin()
                self._set_location(step + 1)
                self._begin_rescue(step)
                yield step
                self._interrupts.rescue = None
                done = self.done = step + 1
                timing = self.throughput.end()
                if done % self._log_every == 0:
                    self._out.timing(done, timing)
                measured = self._evaluation.due(done, self._steps)
                if measured and (done == self._steps or self._interrupts.agreed() is None):
                    self._evaluate(done)
                rates = shown(timing)
                # On a narrow terminal the first ones are seen.
                progress.advance({**self._live, SPEED: rates[SPEED], **self._live_evaluation, **rates})
                over = done == self._steps or self._evaluation.stops
                stopping = None if over else self._interrupts.agreed()
                due = done % self._every == 0 or done == self._evaluation.best_step
                if due or over or stopping is not None:
                    self._save(done)
                if stopping is not None:
                    raise Interrupted(
                        f"{self._title} stopped after step {done} with a checkpoint; run the same command to go on",
                        stopping,
                    )
        self._take_best()

    def log(self, step: int, metrics: Mapping[str, float], live: Sequence[str] = ()) -> None:
        """Write a step's metrics; those named in `live` also go to the progress line.

        Raises:
            DivergedError: one is not finite.
        """
        wrong = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
        if wrong is not None:
            raise DivergedError(
                f"{self._title}: step {step + 1}: {wrong} is not finite ({metrics[wrong]}); {self._remedy}"
            )
        self._live = {name: metrics[name] for name in live if name in metrics}
        if (step + 1) % self._log_every == 0:
            self._out.log(step + 1, metrics)
            self._watch.see(step + 1, metrics)
            self._mirrors.log(self._title, step + 1, metrics)

    @first_writes
    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Save this step's samples with their rewards."""
        self._mirrors.rollouts(self._title, self._out.rollouts(step + 1, map(rollout_row, groups)))

    @property
    def about_result(self) -> dict[str, Any]:
        """Of the policy after the last step: the step its weights are from, and with `keep_best` why."""
        return self._evaluation.about_result(self.done)

    def _evaluate_again(self, done: int) -> None:
        """After a resume: make the evaluation that a signal left out."""
        if done and self._evaluation.due(done, self._steps) and self._evaluated < done:
            self._evaluate(done)
            if self._evaluation.best_step == done:
                self._save(done)

    def _evaluate(self, done: int) -> None:
        """Evaluate, and log it. Nothing of training changes."""
        began = time.perf_counter()
        for one in self._beside:  # it may call the same functions of the user's
            one.settle()
        self._begin_rescue(done)
        metrics = self._evaluation.measure([learner.model for learner in self._learners.values()])
        self._interrupts.rescue = None
        self._evaluation.note(done, metrics)
        self._evaluated = done
        self._out.evaluation(done, metrics)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._mirrors.log(f"{self._title}/{EVAL}", done, finite)
        self._live_evaluation = self._evaluation.shown(metrics)
        seconds = time.perf_counter() - began
        console.say(f"{self._title}: step {done}: {self._evaluation.line(done, metrics)}, in {seconds:.1f}s")

    def _take_best(self) -> None:
        """Give the policy the weights of the best evaluation."""
        best = self._evaluation.best_step
        if best not in (None, self.done):
            weights, _ = _files(POLICY)
            learner = self._learners[POLICY]
            learner.load_weights(self._out.checkpoint(best).tensors(weights, learner.weights().get))
        for line in self._evaluation.outcome(self.done, self._steps):
            console.say(f"{self._title}: {line}")

    def _resume(self) -> int:
        checkpoint = self._out.resume()
        before = checkpoint.state["inputs"] if checkpoint else {}
        now = self._inputs.identities(before)
        if checkpoint is None:
            return 0
        changed = first_difference(before, now)
        if changed is not None:
            name, difference = changed
            raise ModelError(
                f"{self._title}: {self._inputs.path(name)} is not the one training began with: {difference}; restore "
                f"it, remove {self._out.path} to train it again, or choose another run=NAME"
            )
        for name, learner in self._learners.items():
            weights, optimizer = _files(name)
            updates = int(checkpoint.state["updates"][name])
            learner.load(
                checkpoint.tensors(weights, learner.weights().get),
                checkpoint.tensors(optimizer, learner.weight_of),
                updates,
            )
        set_random_states(checkpoint.tensors("random"))
        for name, extra in self._weights.items():
            extra.load_weights(checkpoint.tensors(name, extra.weights().get))
        for name, stateful in self._states.items():
            if name in checkpoint.state["states"]:  # else it is new to the stage, and begins
                stateful.load(checkpoint.state["states"][name])
        self._evaluation.load(checkpoint.state.get("evaluation", {}))
        self._evaluated = int(max((row.get("step", 0) for row in self._out.logged(EVALUATIONS)), default=0))
        self._watch.replay(self._out.logged())
        self._saved = self.done = checkpoint.step
        return checkpoint.step

    def _set_location(self, step: int) -> None:
        for name, learner in self._learners.items():
            whose = "" if name == POLICY else f" ({name})"
            learner.location = f"{self._title}: step {step}{whose}"

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors that training changes, by checkpoint file."""
        tensors: dict[str, Mapping[str, Tensor]] = {}
        for name, learner in self._learners.items():
            tensors |= zip(_files(name), (learner.weights(), learner.optimizer_state()), strict=True)
        return tensors | {name: extra.weights() for name, extra in self._weights.items()}

    def _must_be_finite(self, done: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        every = ranks.together(lambda: not_finite(tensors))
        found = next(filter(None, every), None)
        if found is not None:
            raise DivergedError(
                f"{self._title}: step {done}: {found} is not finite, so nothing is saved of it; {self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return (
            "lower learning_rate and go on from the last checkpoint with --allow-change, or look at the last rollouts"
        )

    def _position(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All state but the weights: that of random generators, and the JSON of a checkpoint."""
        evaluation = self._evaluation.state()
        return random_states(), {
            "updates": {name: learner.updates for name, learner in self._learners.items()},
            "states": {name: stateful.state() for name, stateful in self._states.items()},
            **({"evaluation": evaluation, BEST: self._evaluation.best_step} if evaluation else {}),
        }

    def _begin_rescue(self, done: int) -> None:
        """Until `rescue` is None again, a signal that ends a call of a user's function leaves the state of now.

        Where something works beside training, that state is known only once it is done.
        """
        if in_use() and not self._beside:
            self._interrupts.rescue = partial(self._rescue, done, copy.deepcopy(self._position()))

    def _rescue(self, step: int, position: tuple[dict[str, Tensor], dict[str, Any]]) -> str:
        """Save the state from before an interrupted step, unless its weights have changed; returns what was saved."""
        if any(position[1]["updates"][name] != learner.updates for name, learner in self._learners.items()):
            return f"{self._title} stopped within step {step + 1}, without a checkpoint of it"
        if step and step != self._saved:
            self._save(step, position)
        return f"{self._title} stopped while a user's function ran, after step {step} with a checkpoint"

    def _save(self, done: int, position: tuple[dict[str, Tensor], dict[str, Any]] | None = None) -> None:
        random, state = position or self._position()
        tensors = self._tensors()
        self._must_be_finite(done, tensors)
        state = {**state, "inputs": self._inputs.identities()}
        self._out.save(done, {"random": random, **tensors}, state, self._keep)
        self._saved = done


def not_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The first tensor that holds a NaN or an infinity, as `FILE/TENSOR`; None if all are finite."""
    for file, named in tensors.items():
        # One transfer from the device for all of them.
        names = [name for name, x in named.items() if x.is_floating_point()]
        if not names:
            continue
        finite = torch.stack([local(named[name]).isfinite().all() for name in names]).tolist()
        if not all(finite):
            return f"{file}/{names[finite.index(False)]}"
    return None


def _files(learner: str) -> tuple[str, str]:
    """Names of the files that hold a learner's weights and optimiser in a checkpoint."""
    return ("weights", "optimizer") if learner == POLICY else (f"{learner}_weights", f"{learner}_optimizer")
