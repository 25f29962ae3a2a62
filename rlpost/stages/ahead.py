"""Samples of later steps, drawn and scored by one thread while earlier steps train (docs/adr/0024).

Step t learns from samples of version max(0, t - staleness) of the weights, always: which side is faster decides only
which one waits.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from statistics import fmean
from typing import Any

import torch

from rlpost import ranks
from rlpost.data.dataset import Dataset
from rlpost.engine.api import SideEngine
from rlpost.errors import DataError
from rlpost.rewards.score import RewardBatch
from rlpost.stages.rollouts import AHEAD, Rollout, Sampler, learned_from
from rlpost.types import completions
from rlpost.usercode import wire
from rlpost.usercode.stop import Stop

CLOSING = 5.0
"""Seconds that the thread may take to end once its engine is closed; a user's function may hold it longer."""


class Ahead:
    """The samples of a stage, drawn up to `staleness` steps before they are learned from."""

    def __init__(self, sampler: Sampler, steps: int) -> None:
        """Draw by `sampler`, for so many steps in all; nothing is drawn yet."""
        assert isinstance(sampler.engine, SideEngine), "made so where a recipe has staleness"
        self._sampler = sampler
        self._engine = sampler.engine
        self._steps = steps
        self._drawn: dict[int, Future[Rollout]] = {}
        """By step, in order: those that are drawn, or will be, and not learned from yet."""
        self._next = 0
        """The first step that is not among them."""
        self._waited = 0.0
        self._thread = _Thread()
        Stop.all_are_waited_for = True
        sampler.context.opened.callback(self.close)

    @property
    def data(self) -> Dataset:
        """The stage's rows."""
        return self._sampler.data

    @property
    def seconds(self) -> Mapping[str, float]:
        """Spent on waiting for samples so far."""
        return {"waited": self._waited}

    def sample(self, step: int) -> Rollout:
        """The step's samples, once they are there; further steps are begun with the weights of now.

        Raises:
            RlpostError: drawing or scoring them failed, in the other thread.
        """
        self._begin(step)
        began = time.perf_counter()
        rollout = self._drawn.pop(step).result()
        self._waited += time.perf_counter() - began
        versions = [c.weights_version for c in completions(rollout.groups) if c.weights_version is not None]
        behind = fmean(step - version for version in versions)
        return self._sampler.signal.report(replace(rollout, staleness=behind), step)

    def settle(self) -> None:
        """Wait until all that was begun is drawn; raises what it was ended by."""
        for future in self._drawn.values():
            future.result()

    def state(self) -> dict[str, Any]:
        """The position in the data, and all that was drawn for later steps."""
        drawn = {step: future.result() for step, future in self._drawn.items()}
        try:
            return {**self._sampler.state(), AHEAD: {str(step): packed(rollout) for step, rollout in drawn.items()}}
        except wire.CannotCrossError as error:
            raise DataError(
                f"stages.{self._sampler.context.name}.data: a row holds {error}, which a checkpoint of samples drawn "
                "ahead cannot keep: take that column out, or set rollouts.staleness=0"
            ) from error

    def load(self, state: dict[str, Any]) -> None:
        """Go on after what was drawn."""
        self._sampler.load({key: value for key, value in state.items() if key != AHEAD})
        for step, text in state.get(AHEAD, {}).items():
            future: Future[Rollout] = Future()
            future.set_result(unpacked(text, self._sampler))
            self._drawn[int(step)] = future
            self._next = max(self._next, int(step) + 1)

    def close(self) -> None:
        """End the engine and the thread, whatever they do."""
        self._engine.close()
        self._thread.end()
        Stop.all_are_waited_for = False

    def _begin(self, step: int) -> None:
        """Begin all steps that are to be drawn with the weights of this one."""
        begun = range(max(self._next, step), min(step + self._sampler.staleness + 1, self._steps))
        if not begun:
            return
        switch: Callable[[], None] | None = self._engine.stage(self._sampler.policy, step)
        for number in begun:
            self._drawn[number] = self._thread.run(partial(self._draw, number, switch))
            switch = None  # the others have the same weights
        self._next = begun.stop

    def _draw(self, step: int, switch: Callable[[], None] | None) -> Rollout:
        if switch is not None:
            switch()
        return self._sampler.draw(step)


class _Thread:
    """A thread that does one thing after the other; after one that fails, all others fail with it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # Threads have their own settings.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        settings = ranks.beside(), torch.get_num_threads(), device
        self._thread = threading.Thread(target=self._run, args=settings, daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], Rollout]) -> Future[Rollout]:
        """What `work` will have returned or raised."""
        future: Future[Rollout] = Future()
        self._queue.put((future, work))
        return future

    def end(self) -> None:
        """End it, within `CLOSING` seconds or with the program."""
        self._queue.put(None)
        self._thread.join(CLOSING)

    def _run(self, enter: Callable[[], None], threads: int, device: int | None) -> None:
        enter()
        torch.set_num_threads(threads)
        if device is not None:
            torch.cuda.set_device(device)
        failed: BaseException | None = None
        while (job := self._queue.get()) is not None:
            future, work = job
            try:
                if failed is not None:
                    raise failed
                future.set_result(work())
            except BaseException as error:  # whatever it is, the thread that trains raises it
                failed = error
                future.set_exception(error)


def packed(rollout: Rollout) -> str:
    """A step's samples as text, exactly.

    Raises:
        CannotCrossError: a row has a value that JSON cannot hold.
    """
    rewards = rollout.rewards
    fields = {
        "groups": [wire.encode(g) for g in rollout.groups],
        "total": rewards.total,
        "by_name": rewards.by_name,
        "by_step": rewards.by_step,
        "drawn": rollout.drawn,
        "drawn_means": dict(rollout.drawn_means),
    }
    return base64.b64encode(zlib.compress(json.dumps(fields).encode())).decode("ascii")


def unpacked(text: str, sampler: Sampler) -> Rollout:
    """The samples that were packed, as `sampler` had drawn them."""
    fields = json.loads(zlib.decompress(base64.b64decode(text)))
    groups = [wire.decode(g) for g in fields["groups"]]
    learned, reward_PG = learned_from(groups, sampler.cfg.mask_truncated)
    weights = sampler.scorer.weights
    rewards = RewardBatch(fields["total"], fields["by_name"], fields["by_step"], given=bool(weights))
    return Rollout(groups, learned, reward_PG, rewards, fields["drawn"], weights, fields["drawn_means"])
