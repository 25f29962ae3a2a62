"""One point of the growth table, in a process of its own: seconds of a sampling pass and of an update, and memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlpost.engine.door import engine_for
from rlpost.engine.params import Sampling
from rlpost.objectives.supervised import nll
from rlpost.objectives.weights import token_mean
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.stages.supervised import supervised_loss
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import Completion, Group, Request


def groups_of(point: dict[str, Any], vocabulary: int) -> tuple[Group, ...]:
    """Prompts with completions of random tokens, all of one length."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(point["prompts"]):
        answers = [rng.integers(2, vocabulary, point["completion"]) for _ in range(point["group"])]
        completions = tuple(Completion(ids=ids, action=np.ones(len(ids), bool)) for ids in answers)
        made.append(Group(prompt=rng.integers(2, vocabulary, point["prompt"]), completions=completions, example={}))
    return tuple(made)


def fastest(work: Callable[[], Any], most: float = 4.0) -> float:
    """Seconds of the faster of some calls."""
    work()
    found: list[float] = []
    end = time.perf_counter() + most
    while not found or (len(found) < 3 and time.perf_counter() < end):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def update(policy: Policy, groups: tuple[Group, ...]) -> Callable[[], Any]:
    """An optimiser step on the groups."""
    learner = Learner(policy, learning_rate=1e-5)
    experience = Experience(groups)
    experience = experience.with_actions(weight=token_mean(experience.rows))
    loss = supervised_loss(nll)
    return lambda: learner.update(loss, experience)


def sampling(policy: Policy, groups: tuple[Group, ...], new: int) -> Callable[[], Any]:
    """As many completions as the groups have, of `new` tokens at most."""
    engine = engine_for(policy)
    settings = Sampling(max_new_tokens=new)

    def sample() -> None:
        engine.update_weights(policy, 0)
        engine.generate([Request(g.prompt, len(g.completions), settings, seed=i) for i, g in enumerate(groups)])

    return sample


def main() -> None:
    point = json.loads(sys.argv[1])
    policy = load_policy(point["model"], Model(path=point["model"]), trainable=True)
    groups = groups_of(point, policy.vocabulary)
    found: dict[str, float] = {}
    if point["what"] == "sampling":
        with torch.no_grad():
            found["seconds"] = fastest(sampling(policy, groups, point["new"]))
    else:
        found["seconds"] = fastest(update(policy, groups))
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(found))


if __name__ == "__main__":
    main()
