"""Infilling, "x … goal": candidates from a forward model after x and from a reverse model before the goal.

A middle m is ranked by log p_forward(m, goal, end | x) + log p_reverse(m, x, end | goal): each model scores all of the
text that it is not given, up to the end token. For exact models that is 2·log p(x m goal) less a constant, so the most
probable text comes first; without x in the second term it does not (`rlpost verify goals`).

Axes: N action tokens, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from rlpost.data.direction import before_what
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.engine.seeds import prompt_seeds
from rlpost.errors import ModelError
from rlpost.objectives.ragged import Ragged
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.types import Completion, Group, Request, completions

MOST = 1024
"""Most candidates that are ranked."""
TOGETHER = 32
"""Candidates that share one copy of the prompt when they are scored."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Proposals:
    """Candidates for a middle."""

    middles: tuple[Ids, ...]
    """Distinct candidates."""
    sampled: int
    """Tokens sampled by both models, end tokens included."""


@dataclass(frozen=True)
class Middle:
    """A candidate with both models' scores."""

    ids: Ids
    forward: float
    """log p_forward(m, goal, end | x)."""
    reverse: float
    """log p_reverse(m, x, end | goal)."""

    @property
    def score(self) -> float:
        """The score that middles are ranked by."""
        return self.forward + self.reverse


@dataclass(frozen=True)
class Infilling:
    """The ranked middles, and the tokens it took."""

    middles: tuple[Middle, ...]
    """Best first."""
    sampled: int
    """Tokens sampled, by both models."""
    scored: int
    """Tokens whose log-probability was computed to rank them, by both models."""


def infill(
    forward: Policy,
    reverse: Policy,
    before: Sequence[int],
    after: Sequence[int],
    *,
    n: int,
    sampling: Sampling,
    seed: int = 0,
    most: int = MOST,
) -> Infilling:
    """Middles for "before … after", ranked.

    Args:
        forward: a policy.
        reverse: a model of reversed text with the same tokenizer.
        before: the beginning of the text, with the begin token if the forward model was trained with it.
        after: the end of the text, without an end token; may be empty if there is a begin token.
        n: samples of each model.
        sampling: of the samples; `max_new_tokens` is also the length of the longest middle.
        seed: of the samples.
        most: most candidates.

    Raises:
        ModelError: a model has no room for the text with its longest middle.
        DataError: `after` is empty and there is no begin token.
    """
    whole = len(before) + sampling.max_new_tokens + len(after) + 2
    limit = min(forward.max_positions, reverse.max_positions)
    if whole > limit:
        raise ModelError(f"the text with its middle may have {whole} tokens, the models read {limit}; ask for fewer")
    proposals = propose(forward, reverse, before, after, n=n, sampling=sampling, seed=seed, most=most)
    middles = rank(forward, reverse, before, after, proposals.middles)
    given = len(_text(before, forward)) + len(after) + 2
    scored = sum(2 * len(m.ids) + given for m in middles)
    return Infilling(tuple(middles), proposals.sampled, scored)


def propose(
    forward: Policy,
    reverse: Policy,
    before: Sequence[int],
    after: Sequence[int],
    *,
    n: int,
    sampling: Sampling,
    seed: int = 0,
    most: int = MOST,
) -> Proposals:
    """Candidates from both ends: a prefix of a forward sample, then a prefix of a reverse sample, reversed.

    Either may be empty. If there are more than `most`, candidates from one side come first, then those whose sides
    meet (the forward part ends with the token that the reverse model sampled next). Arguments and errors as of
    `infill`.
    """
    assert not sampling.stop, "stop strings are read forwards"
    seeds = prompt_seeds(seed, 0, 2)
    (heads,) = frozen_engine(forward).generate([Request(before, n, sampling, seeds[0])])
    reversed_suffix = before_what(after, reverse.tokenizer)
    (tails,) = frozen_engine(reverse).generate([Request(reversed_suffix, n, sampling, seeds[1])])
    sampled = sum(len(c.ids) for c in (*heads, *tails))
    found: dict[Ids, None] = {}
    for middle in _joined(_written(heads, forward), _written(tails, reverse)):
        if len(middle) <= sampling.max_new_tokens:
            found[middle] = None
        if len(found) == most:
            break
    return Proposals(tuple(found), sampled)


def rank(
    forward: Policy, reverse: Policy, before: Sequence[int], after: Sequence[int], middles: Sequence[Ids]
) -> list[Middle]:
    """The middles with their scores, best first; sums are in float64. Arguments as of `infill`."""
    end, text = reverse.tokenizer.eos_token_id, _text(before, forward)
    rest = [(*m, *after, end) for m in middles]
    turned = [(*reversed(m), *reversed(text), end) for m in middles]
    forward_C = _log_likelihoods(forward, tuple(before), rest)
    reverse_C = _log_likelihoods(reverse, before_what(after, reverse.tokenizer), turned)
    scored = [Middle(*of) for of in zip(middles, forward_C, reverse_C, strict=True)]
    return sorted(scored, key=lambda m: -m.score)


def _text(before: Sequence[int], forward: Policy) -> Ids:
    """The beginning of the text, without the begin token."""
    begin = forward.tokenizer.bos_token_id
    return tuple(before[1:] if begin is not None and before[0] == begin else before)


def _written(samples: Iterable[Completion], policy: Policy) -> list[Ids]:
    """The samples up to their end tokens."""
    written = (tuple(c.ids.tolist()) for c in samples)
    return [ids[:-1] if ids[-1] in policy.end_ids else ids for ids in written]


def _joined(heads: Sequence[Ids], tails: Sequence[Ids]) -> Iterator[Ids]:
    """All candidates, with repetitions; `tails` in the order in which they were sampled."""
    fronts = list(dict.fromkeys(h[:i] for h in heads for i in range(len(h) + 1)))
    backs = list(dict.fromkeys(t[:j] for t in tails for j in range(len(t) + 1)))
    next_to: dict[int, dict[Ids, None]] = {}
    for t in tails:
        for j, token in enumerate(t):
            next_to.setdefault(token, {})[t[:j]] = None
    alone = chain(fronts, (b[::-1] for b in backs))
    meeting = (f + b[::-1] for f in fronts if f for b in next_to.get(f[-1], ()))
    return chain(alone, meeting, (f + b[::-1] for f in fronts for b in backs))


def _log_likelihoods(policy: Policy, prompt: Ids, rests: Sequence[Ids]) -> list[float]:
    """[C] log-probability of each rest after the prompt."""
    every = [Completion(ids, (True,) * len(ids)) for ids in rests]
    groups = [Group(prompt, tuple(every[at : at + TOGETHER])) for at in range(0, len(every), TOGETHER)]
    rows = Ragged([c.actions for c in completions(groups)])
    summed: list[float] = rows.sum(logprobs(policy, groups).double()).tolist()
    return summed
