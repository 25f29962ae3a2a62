"""Opponents for self-play: the policy as it is, and as it was at earlier steps (fictitious play; Heinrich et al. 2015).

A policy that only meets itself may go round in circles: it learns to beat what it now is, and forgets what beat that.
So a pool of past versions is kept, and a group of episodes meets one of them, or the policy of now, by chance. All
episodes of a group meet the same one: their rewards are compared with each other.

Past versions are copies of the weights that train, of all or of an adapter, on the CPU. While one of them answers, its
weights take the place of the policy's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rlpost.engine.api import Engine
from rlpost.engine.params import Sampling
from rlpost.engine.seeds import uniforms
from rlpost.environments.played import Asked
from rlpost.errors import RecipeError, RewardError
from rlpost.policy.policy import Policy
from rlpost.recipe.specs.common import Rollouts
from rlpost.stages.context import Context
from rlpost.stages.params import Opponents
from rlpost.types import Request

LATEST = None
"""Among versions: the policy as it is."""


def past_versions(context: Context, cfg: Rollouts, policy: Policy) -> PastVersions:
    """The opponents that a stage asks for.

    Raises:
        RecipeError: its weights are in shards.
    """
    assert cfg.opponents is not None, "the caller has seen to it"
    if context.shards is not None:
        raise RecipeError(
            f"stages.{context.name}.opponents: past versions cannot take the place of weights in shards; "
            "remove it, or parallel.strategy"
        )
    return PastVersions(cfg.opponents, policy, context.engine(policy, cfg.rollouts), cfg.sampling)


class PastVersions:
    """The pool of opponents of a stage."""

    def __init__(self, cfg: Opponents, policy: Policy, engine: Engine, sampling: Sampling) -> None:
        """Begin with an empty pool.

        Args:
            cfg: how many versions there are, and how often one is added.
            policy: whose versions they are.
            engine: samples their turns with the weights that `policy` has at the time; it is used for nothing else.
            sampling: how turns are drawn.
        """
        self._cfg = cfg
        self._policy = policy
        self._engine = engine
        self._sampling = sampling
        self._pool: dict[int, dict[str, Tensor]] = {}
        """By the step that they were taken before, oldest first."""
        self._step = 0
        self._ready: int | None = -1
        """The version whose weights the engine has; -1: none of those there are."""

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that the versions of the pool were taken before, oldest first."""
        return tuple(self._pool)

    def begin(self, step: int) -> None:
        """Take note of the policy before a step: every so often it goes into the pool, and the oldest leaves it."""
        self._step, self._ready = step, -1
        if step % self._cfg.snapshot_every == 0 and step not in self._pool:
            self._pool[step] = {name: p.detach().cpu().clone() for name, p in self._policy.trained().items()}
        for old in self.steps[: -self._cfg.pool_size]:
            del self._pool[old]

    def chosen(self, prompt_seed: int) -> int | None:
        """Who plays a prompt's episodes: the step of a past version, or None for the policy as it is."""
        latest, which = uniforms([prompt_seed], [0], 2)[0].tolist()
        if latest < self._cfg.latest_ratio or not self._pool:
            return LATEST
        return self.steps[int(which * len(self._pool))]

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """[A] the text of each opponent's turn, sampled version by version.

        Raises:
            RewardError: the environment asks with more tokens than the model reads.
            EngineError: generation failed.
        """
        versions = [self.chosen(a.prompt_seed) for a in asked]
        requests = [self._request(a) for a in asked]
        texts = [""] * len(asked)
        for version in (LATEST, *self.steps):
            own = [i for i, v in enumerate(versions) if v == version]
            if not own:
                continue
            with self._acting(version):
                found = self._engine.generate([requests[i] for i in own])
            for i, (turn,) in zip(own, found, strict=True):
                texts[i] = turn.text
        return texts

    def weights(self) -> dict[str, Tensor]:
        """All versions' weights, as `step/name`."""
        return {f"{step}/{name}": x for step, version in self._pool.items() for name, x in version.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Restore what `weights()` returned."""
        pool: dict[int, dict[str, Tensor]] = {}
        for key, x in weights.items():
            step, name = key.split("/", 1)
            pool.setdefault(int(step), {})[name] = x
        self._pool = dict(sorted(pool.items()))
        self._ready = -1

    def _request(self, asked: Asked) -> Request:
        room = self._policy.max_positions - len(asked.prompt)
        if room < 1:
            raise RewardError(
                f"environment: `other` asks with {len(asked.prompt)} tokens, and the model reads "
                f"{self._policy.max_positions}; shorten it"
            )
        return Request(asked.prompt, 1, self._sampling, asked.seed, limit=min(self._sampling.max_new_tokens, room))

    @contextmanager
    def _acting(self, version: int | None) -> Iterator[None]:
        """Inside, the policy has the weights of a version, and the engine samples with them."""
        with self._in_place(self._pool[version]) if version is not LATEST else _nothing():
            if self._ready != version:
                self._engine.update_weights(self._policy, self._step if version is LATEST else version)
                self._ready = version
            yield

    @contextmanager
    def _in_place(self, version: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the policy's trained weights are these."""
        own = self._policy.trained()
        kept = {name: p.detach().clone() for name, p in own.items()}
        try:
            _write(own, version)
            yield
        finally:
            _write(own, kept)


@torch.no_grad()
def _write(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, p in own.items():
        p.copy_(weights[name])


@contextmanager
def _nothing() -> Iterator[None]:
    yield
