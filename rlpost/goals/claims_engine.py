"""Claims about guided decoding by the real engine, on a tiny model whose completions can all be enumerated.

Axes: L leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.goals.claims_goals import some_goal
from rlpost.goals.exact import from_table, guided, posterior, reached
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.guide import Guide, Mode
from rlpost.goals.network_rows import NetworkRows
from rlpost.oracle import truth
from rlpost.oracle.policies import TinyModel
from rlpost.oracle.report import Row, Section, exact, holds
from rlpost.oracle.tree import END, Tree
from rlpost.policy.value_head import ValueHeadModel
from rlpost.types import Request

SAMPLES = 200


def engine_section(tree: Tree, seed: int) -> Section:
    """What the engine samples, and the probability it states, against the exact posterior."""
    model = TinyModel(tree, "gpt2", seed)
    with torch.no_grad():
        logp_XV = model.logp_XV()
    goal = some_goal(tree, seed)
    there_L = reached(tree, goal, truncated_counts=True)
    rows: list[Row] = []
    for mode, wanted_L in ((Mode.toward, there_L), (Mode.away, 1 - there_L)):
        value_X = truth.values(tree, logp_XV, wanted_L)
        guide = Guide(from_table(tree, value_X.log()), goal, {END}, mode, truncated_counts=True)
        rows += _rows(tree, model, guide, posterior(tree, logp_XV, wanted_L), wanted_L)
    rows.append(_network_row(tree, model, logp_XV, goal, seed))
    return Section(f"guided decoding by the engine: {SAMPLES} samples of a tiny gpt2", tuple(rows))


def _rows(tree: Tree, model: TinyModel, guide: Guide, posterior_L: Tensor, wanted_L: Tensor) -> list[Row]:
    at, logp_S = _sampled(tree, model, guide)
    missed = int((wanted_L[at] == 0).sum())
    return [
        exact(f"{guide.mode}: probability of each sample", float((logp_S.exp() / posterior_L[at] - 1).abs().max())),
        holds(f"{guide.mode}: samples that end where they must not", str(missed), "0", missed == 0),
    ]


def _network_row(tree: Tree, model: TinyModel, logp_XV: Tensor, goal: GoalSet, seed: int) -> Row:
    """A network that follows the rows in a cache of its own, against its values by plain passes over whole prefixes."""
    critic = ValueHeadModel(model.policy, trains_trunk=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        critic.head.weight.copy_(torch.randn(critic.head.weight.shape, generator=generator, dtype=torch.float64))
        log_X = F.logsigmoid(critic.head(model.hidden_XD())[:, 0])

    def follow(prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int], limit: int) -> NetworkRows:
        return NetworkRows(critic, F.logsigmoid, prompts, prompt_of_row, limit)

    guide = Guide(from_table(tree, log_X), goal, {END}, truncated_counts=True)
    expected_L = truth.leaf_logp(tree, guided(tree, logp_XV, guide))
    at, logp_S = _sampled(tree, model, replace(guide, follow=follow))
    error = float(((logp_S - expected_L[at]).exp() - 1).abs().max())
    return exact("toward, by any network that follows the rows in a cache: probability of each sample", error)


def _sampled(tree: Tree, model: TinyModel, guide: Guide) -> tuple[list[int], Tensor]:
    """Which leaf each sample is, and its log-probability as the engine states it."""
    leaf = {tuple(ids.tolist()): at for at, ids in enumerate(torch.split(tree.token_N, tree.length_L.tolist()))}
    engine = frozen_engine(model.policy, guide)
    (found,) = engine.generate([Request(model.prompt, SAMPLES, Sampling(max_new_tokens=tree.depth), seed=0)])
    logp_S = torch.tensor([sum(c.logprobs.tolist()) for c in found], dtype=torch.float64)
    return [leaf[tuple(c.ids.tolist())] for c in found], logp_S
