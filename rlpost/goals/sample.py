"""Completions guided toward or away from endings by a value network: `rlpost goals sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlpost.data.codec import Codec, make_codec
from rlpost.engine.collect import collect
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.errors import ModelError
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.guide import Guide
from rlpost.goals.value_network import load_value, read_settings
from rlpost.inference.checkpoint import frozen_policy, located
from rlpost.inference.sample import prompt_group, within
from rlpost.policy.load import is_backwards
from rlpost.policy.policy import Policy
from rlpost.run.lookup import find_checkpoint


def guided_sample(
    checkpoint: str,
    prompt: str,
    network: str,
    endings: Sequence[str],
    *,
    avoid: bool = False,
    candidates: int = 32,
    sampling: Sampling,
    n: int = 1,
    seed: int = 0,
) -> list[str]:
    """`n` guided completions of a prompt.

    Args:
        checkpoint: a run, a stage, a checkpoint or a model.
        prompt: text; it goes through the model's chat template, if there is one.
        network: a value network: its run's stage, or a checkpoint.
        endings: texts that completions should end in, or with `avoid` never end in.
        avoid: guide away from the endings.
        candidates: number of likeliest tokens that are weighed; 0: all.
        sampling: of the completions.
        n: number of completions.
        seed: of the completions.

    Raises:
        ModelError: the model reads backwards, or the network is none or is of another goal.
    """
    folder = located(checkpoint)
    if is_backwards(folder):
        raise ModelError(f"{checkpoint}: it reads backwards, so it cannot be guided; use `rlpost sample`")
    policy = frozen_policy(folder)
    codec = make_codec(policy.tokenizer)
    group = prompt_group({"prompt": prompt}, codec)
    engine = frozen_engine(policy, _guide(network, endings, avoid, candidates, policy, codec))
    sampling = within(sampling, policy.max_positions - len(group.prompt))
    (found,) = collect(engine, [group], n, sampling, seed=seed)
    return [c.text for c in found.completions]


def _guide(network: str, endings: Sequence[str], avoid: bool, candidates: int, policy: Policy, codec: Codec) -> Guide:
    """The guide; raises ModelError if the network reads one goal and there are several."""
    folder = find_checkpoint(network) or Path(network)
    members = [codec.ids(text, "--avoid" if avoid else "--goal") for text in endings]
    settings = read_settings(folder)
    if settings.condition is not None and len(members) > 1:
        raise ModelError(f"{folder}: it reads one goal, not {len(members)}; give one, or train a network for the set")
    value = load_value(folder, policy, members[0], avoid=avoid)
    return value.guide(GoalSet(members), policy.end_ids, candidates)
