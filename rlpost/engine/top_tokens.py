"""The likeliest tokens where actions were taken: a policy's own, and what is looked at in those of others.

Axes: N actions, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpost.engine.answers import ROUNDING
from rlpost.engine.api import TopTokens
from rlpost.errors import EngineError
from rlpost.policy.logprobs import LogitStats
from rlpost.policy.policy import Policy
from rlpost.policy.score import over_passes
from rlpost.types import Group, completions

BUDGET = 16384
"""Tokens of one pass."""


@torch.no_grad()
def top_tokens(
    policy: Policy, groups: Sequence[Group], k: int, temperature: float = 1.0, *, budget: int = BUDGET
) -> TopTokens:
    """What `policy` says of the groups' actions, in passes of about `budget` tokens, of which ranks make a share each.

    Args:
        policy: as it is: its acting adapter, its precision.
        groups: the N actions are theirs, in order.
        k: K, at most as many tokens as there are.
        temperature: logits are divided by it.
        budget: tokens of one pass.

    Raises:
        EngineError: `k` is no number of tokens that there are, or the temperature is not above 0.
        OutOfMemoryError: a single completion does not fit.
    """
    must_be_askable(policy, k, temperature)
    stats = LogitStats(temperature, top=k)

    def work(some: list[Group]) -> TopTokens:
        output = policy(policy.batch(some), stats)
        ids_NK, logp_NK = output.top_ids_NK, output.top_logp_NK
        if ids_NK is None or logp_NK is None:
            ids_NK = logp_NK = torch.zeros(len(output.logp_N), 0)
        return TopTokens(ids_NK.long().cpu(), logp_NK.float().cpu(), output.logp_N.float().cpu())

    was_training = policy.training
    policy.eval()
    pieces = over_passes(policy, [g for g in groups if g.completions], budget, work)
    policy.train(was_training)
    return joined(pieces, k)


def must_be_askable(policy: Policy, k: int, temperature: float) -> None:
    """Check what is asked for against the tokens of `policy`, which may be those of its teacher.

    Raises:
        EngineError: there are not `k` tokens, or the temperature is not above 0.
    """
    known = policy.vocabulary - sum(i < policy.vocabulary for i in policy.known.unused)
    if not 0 <= k <= known:
        raise EngineError(f"the {k} likeliest tokens of {known}: ask for 0 to {known}")
    if not temperature > 0:
        raise EngineError(f"temperature {temperature:g}: scores are of a distribution, so give one above 0")


def joined(pieces: Sequence[TopTokens], k: int) -> TopTokens:
    """Several as one, in order."""
    if not pieces:
        return TopTokens(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k), torch.zeros(0))
    return TopTokens(
        torch.cat([p.ids_NK for p in pieces]),
        torch.cat([p.logp_NK for p in pieces]),
        torch.cat([p.logp_N for p in pieces]),
    )


def by_group(found: TopTokens, groups: Sequence[Group]) -> list[TopTokens]:
    """Those of each group."""
    counts = [sum(c.actions for c in g.completions) for g in groups]
    columns = (torch.split(x, counts) for x in (found.ids_NK, found.logp_NK, found.logp_N))
    return [TopTokens(*three) for three in zip(*columns, strict=True)]


def actions_of(groups: Sequence[Group]) -> Tensor:
    """[N] the ids of all actions."""
    ids = [c.ids[c.action].astype(np.int64) for c in completions(groups)]
    return torch.from_numpy(np.concatenate(ids, dtype=np.int64) if ids else np.zeros(0, np.int64))


def checked(found: Any, groups: Sequence[Group], k: int, policy: Policy) -> TopTokens | str:
    """An answer to `ScoringEngine.score`, its numbers as they should be; or what is wrong with it, and the remedy.

    Args:
        found: whatever an engine returned.
        groups: what it was to score.
        k: K.
        policy: whose vocabulary its ids are to be of.
    """
    try:
        ids_NK, logp_NK, logp_N = (torch.as_tensor(getattr(found, x)) for x in ("ids_NK", "logp_NK", "logp_N"))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return f"a {type(found).__name__}; return rlpost.engine.api.TopTokens"
    action_N = actions_of(groups)
    n = len(action_N)
    for name, x, shape in (("ids_NK", ids_NK, (n, k)), ("logp_NK", logp_NK, (n, k)), ("logp_N", logp_N, (n,))):
        if x.shape != shape:
            return f"{name} of shape {tuple(x.shape)}; for {n} actions and k={k} return {shape}"
    if ids_NK.is_floating_point() and k:
        return f"ids_NK of {ids_NK.dtype}; return int64"
    good = TopTokens(ids_NK.detach().long().cpu(), logp_NK.detach().float().cpu(), logp_N.detach().float().cpu())
    return _fault(good, action_N, policy) or good


def _fault(found: TopTokens, action_N: Tensor, policy: Policy) -> str:
    """What numbers of the right shape have wrong."""
    unknown = torch.isin(found.ids_NK, torch.tensor(policy.known.unused, dtype=torch.long))
    unknown |= (found.ids_NK < 0) | (found.ids_NK >= policy.vocabulary)
    if unknown.any():
        worst = int(found.ids_NK[unknown][0])
        return f"token {worst}, and the vocabulary has none such ({policy.vocabulary} ids); use a teacher of the same"
    every = torch.cat([found.logp_NK.flatten(), found.logp_N])
    if not torch.isfinite(every).all() or (every > ROUNDING).any():
        worst_logp = every[~torch.isfinite(every) | (every > ROUNDING)][0].item()
        return f"a log-probability of {worst_logp:g}; give finite ones of at most 0"
    if (found.logp_NK.diff(dim=1) > 0).any():
        return "tokens that are not in falling order of probability; sort them"
    if (found.ids_NK.sort(1).values.diff(dim=1) == 0).any():
        return "the same token twice; give each once"
    total_N = found.logp_NK.double().exp().sum(1)
    if (total_N > 1 + ROUNDING).any():
        return f"probabilities that sum to {total_N.max().item():.4g}; give log-probabilities, not logits"
    return _otherwise(found, action_N)


def _otherwise(found: TopTokens, action_N: Tensor) -> str:
    """Where an action's own log-probability is not the one it has among the likeliest tokens, or should be there."""
    if not found.ids_NK.shape[1]:
        return ""
    among_NK = found.ids_NK == action_N[:, None]
    there_N = torch.where(among_NK, found.logp_NK, 0).sum(1)
    is_among_N = among_NK.any(1)
    apart_N = torch.where(is_among_N, (found.logp_N - there_N).abs(), found.logp_N - found.logp_NK[:, -1])
    if (apart_N > ROUNDING).any():
        at = int(apart_N.argmax())
        return (
            f"{found.logp_N[at].item():g} for action {at}, token {int(action_N[at])}, and among the likeliest tokens "
            "there another; score each where it was taken"
        )
    return ""
