"""Infilling between two texts by two checkpoints: `rlpost goals infill`."""

from __future__ import annotations

from rlpost.data.codec import make_codec
from rlpost.data.encoders import begin_token, plain_prompt
from rlpost.engine.params import Sampling
from rlpost.errors import ModelError
from rlpost.goals.infill import Middle, infill
from rlpost.inference.checkpoint import frozen_policy, located
from rlpost.inference.sample import within
from rlpost.policy.judge import same_tokens


def infill_text(
    forward: str,
    reverse: str,
    before: str,
    after: str,
    *,
    n: int,
    sampling: Sampling,
    seed: int = 0,
    begin: bool = True,
) -> tuple[list[tuple[str, Middle]], int]:
    """The middles between two texts, best first, and the number of tokens sampled.

    Args:
        forward: a run, a stage, a checkpoint or a model.
        reverse: the same, of reversed text.
        before: how the text begins.
        after: how it ends.
        n: samples of each model.
        sampling: how they are drawn.
        seed: of the samples.
        begin: the forward model's texts begin with the begin token, if there is one.

    Raises:
        ModelError: one reads the wrong way, or their tokenizers differ.
    """
    ahead = frozen_policy(located(forward))
    back = frozen_policy(located(reverse), backwards=True)
    if not same_tokens(ahead.tokenizer, back.tokenizer):
        raise ModelError(f"{forward} and {reverse} have different tokenizers; train both from one model")
    codec = make_codec(ahead.tokenizer)
    prefix, end = plain_prompt(before, codec, "BEFORE"), codec.ids(after, "AFTER")
    first = begin_token(codec)
    if begin and prefix[:1] != first:
        prefix = (*first, *prefix)
    sampling = within(sampling, min(ahead.max_positions, back.max_positions) - len(prefix) - len(end) - 2)
    found = infill(ahead, back, prefix, end, n=n, sampling=sampling, seed=seed)
    return [(codec.tokenizer.decode(list(m.ids)), m) for m in found.middles], found.sampled
