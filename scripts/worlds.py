"""What the updates of scripts/stage_updates.py are made of: tiny models near each other, and groups of many shapes.

Log-probabilities of reference, teacher and sampler come from models near the trained one, so that ratios are away
from 1, some of them clipped, and margins differ in rank.

Axes: P prompts, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import VOCABULARY, EndTokenOnly, tiny

from rlpost.engine.params import EngineChoice, Sampling
from rlpost.policy.adapters import add_policy_adapter
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.batch import Batch
from rlpost.policy.load import remove_dropout
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference
from rlpost.policy.score import logprobs
from rlpost.policy.value_head import ValueHeadModel
from rlpost.recipe.specs.common import Stage
from rlpost.rewards.score import RewardBatch
from rlpost.stages import rollouts
from rlpost.stages.rollouts import Rollout
from rlpost.types import Completion, Group, completions
from rlpost.usercode.binding import bind, functions_at
from rlpost.usercode.bound import Bound

SAMPLING = Sampling(max_new_tokens=12, temperature=0.8)
GROUP_SIZE = 4
SHAPES = (
    (9, ((7,), (3, 4, 5), (0,), (11,))),
    (4, ((3,), (6,), (6,), (2,))),
    (17, ((5,), (0, 3, 2), (6,), (4,))),
    (1, ((6,), (3,), (7,), (3,))),
)
"""Groups: length of the prompt, and of each completion's runs of actions and of what it reads, in turn."""
RIGHT: list[list[float | None]] = [
    [1.0, 0.5, 0.0, 0.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.5, None, 2.0, 1.0],
    [0.0, 1.0, 0.5, 0.25],
]
"""[P][G] rewards: a group without a signal, a completion without a reward, ties."""
REFERENCE, SAMPLER = 0.06, 0.015
"""Size of the random step from the trained model to the one that is the reference and the teacher, or that sampled."""


class Apart(Policy):
    """Flat rows in which every completion has its own copy of the prompt."""

    shares_prompts = False


class Memory:
    """Lets a policy's passes over more than `tokens` fail for lack of memory, forward or backward."""

    def __init__(self, policy: Policy, tokens: int, *, backward: bool = False, error: Exception | None = None) -> None:
        self.failed = 0
        plain = policy._hidden

        def fail(*_: Any) -> None:
            self.failed += 1
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        def hidden(batch: Batch) -> torch.Tensor:
            found = plain(batch)
            if sum(p.ids_BT.numel() for p in batch.passes) <= tokens:
                return found
            if not backward:
                fail()
            if found.requires_grad:
                found.register_hook(fail)
            return found

        policy._hidden = hidden  # type: ignore[method-assign]


class World:
    """The models of one family and precision, full or with LoRA, on a device.

    To a stage's functions it is the context: functions, a reference, the local engine.
    """

    name = "world"
    rollouts = EngineChoice()

    def __init__(
        self, family: str, dtype: torch.dtype, device: torch.device | str = "cpu", *, lora: bool = False
    ) -> None:
        self.family, self.dtype, self.device, self.lora = family, dtype, torch.device(device), lora
        self.policy, self.scalar = cache(self._policy), cache(self._scalar)

    def _policy(self, layout: str = "shared", step: float = 0.0) -> Policy:
        """The trained model, or one a small random step away, on flat rows with each prompt once (`shared`).

        Or on flat rows with a prompt a completion (`apart`), or on one padded row a completion (`padded`).
        """
        model = tiny(self.family, self.dtype)
        remove_dropout(model)
        use_attention(model, "sdpa" if layout == "padded" else FLAT)
        generator = torch.Generator().manual_seed(int(1000 * step))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(step * torch.randn(p.shape, generator=generator))
        if self.lora:
            model = add_policy_adapter(model, Lora(r=2, alpha=4.0)).to(self.dtype)
            with torch.no_grad():  # the product of new ones is 0, and so is half of their gradients
                for name, p in model.named_parameters():
                    if "lora_" in name:
                        p.normal_(std=0.2, generator=generator)
        kind = Apart if layout == "apart" else Policy
        return kind(self.placed(model), EndTokenOnly(), flat=layout != "padded").eval()

    def placed(self, model: Any) -> Any:
        """The model on the world's device."""
        return model.to(self.device)

    def _scalar(self, layout: str = "shared", step: float = 0.0) -> ValueHeadModel:
        model = ValueHeadModel(self.policy(layout, step))
        with torch.no_grad():
            weight = torch.empty(model.head.weight.shape, dtype=model.head.weight.dtype)
            model.head.weight.copy_(weight.normal_(std=0.1, generator=torch.Generator().manual_seed(3)))
        return model

    def function(self, cfg: Stage, key: str) -> Bound:
        """The function of objectives/ that a key of a stage names."""
        (found,) = self.functions(cfg, key)
        return found

    def functions(self, cfg: Stage, key: str) -> list[Bound]:
        """The same of a key that may name several."""
        return [bind(*named, Path()) for named in functions_at(cfg, key, "stage")]

    def reference(self, *_: Any) -> Reference:
        """The one reference there is, whatever its name."""
        return Reference(self.policy(step=REFERENCE), None)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Sampled groups, with the sampler's log-probabilities."""
        bare = sampled_groups()
        scored = logprobs(self.policy(step=SAMPLER), bare, temperature=SAMPLING.temperature)
        pieces = iter(torch.split(scored, [c.actions for c in completions(bare)]))
        return tuple(
            replace(g, completions=tuple(replace(c, logprobs=tuple(next(pieces).tolist())) for c in g.completions))
            for g in bare
        )


def sampled_groups() -> list[Group]:
    """The groups of SHAPES; every third completion was cut off, and a step is three actions."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist())

    def completion(number: int, runs: tuple[int, ...]) -> Completion:
        action = tuple(i % 2 == 0 for i, n in enumerate(runs) for _ in range(n))
        steps = tuple(min(3, sum(action) - first) for first in range(0, sum(action), 3))
        finish = "length" if number % 3 == 0 else "stop"
        return Completion(draw(len(action)), action, finish=finish, steps=steps)

    return [Group(draw(prompt), tuple(completion(i, runs) for i, runs in enumerate(each))) for prompt, each in SHAPES]


def singles() -> list[Group]:
    """Groups of one completion: most of the sampled ones, each labelled, as a whole and by step."""
    kept = [replace(g, completions=(c,)) for g in sampled_groups() for c in g.completions[:3]]
    return [
        replace(g, completions=(replace(c, label=i % 3 > 0, step_labels=(i + np.arange(len(c.steps))) % 3 / 2),))
        for i, g in enumerate(kept)
        for c in g.completions
    ]


def pairs() -> list[Group]:
    """Groups of two completions, chosen and rejected, of lengths so near that margins are not ranked by them."""
    by_length = [replace(g, completions=sorted(g.completions, key=lambda c: c.actions)) for g in sampled_groups()]
    return [
        Group(g.prompt, tuple(g.completions[first : first + 2][:: 1 - 2 * (i % 2)]), {"margin": 0.5 * (i % 3)})
        for i, g in enumerate(by_length)
        for first in (0, 2)
    ]


def ranked() -> list[Group]:
    """Groups of four completions, and one of two, with scores of which some are equal and one is missing."""
    groups = [
        replace(g, completions=tuple(replace(c, score=s) for c, s in zip(g.completions, RIGHT[i], strict=True)))
        for i, g in enumerate(sampled_groups())
    ]
    return [*groups[:-1], Group(groups[-1].prompt, groups[-1].completions[1:3])]


def rollout_of(groups: Sequence[Group], share: Sequence[int]) -> Rollout:
    """The scored samples of some groups: a reward that also has a value a step, and one for being brief."""
    own = [groups[i] for i in share]
    right = [RIGHT[i] for i in share]
    brief = [[-0.5 * (len(c.ids) > 6) for c in g.completions] for g in own]
    total = [
        [None if r is None else r + 0.5 * b for r, b in zip(*row, strict=True)]
        for row in zip(right, brief, strict=True)
    ]
    by_step = [[0.25 * (k % 3) for k in range(len(c.steps))] for c in completions(own)]
    rewards = RewardBatch(total, {"right": right, "brief": brief}, {"right": by_step})
    return rollouts.rollout_of(own, rewards, {"right": 1.0, "brief": 0.5}, mask_truncated=False)
