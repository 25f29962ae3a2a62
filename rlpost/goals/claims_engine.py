"""Claims about guided decoding by the real engine, on a tiny model whose completions can all be enumerated.

Axes: L leaves.
"""

from __future__ import annotations

import torch

from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.goals.claims_goals import some_goal
from rlpost.goals.exact import from_table, posterior, reached
from rlpost.goals.guide import Guide, Mode
from rlpost.oracle import truth
from rlpost.oracle.policies import TinyModel
from rlpost.oracle.report import Row, Section, exact, holds
from rlpost.oracle.tree import END, Tree
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
    return Section(f"guided decoding by the engine: {SAMPLES} samples of a tiny gpt2", tuple(rows))


def _rows(tree: Tree, model: TinyModel, guide: Guide, posterior_L: torch.Tensor, wanted_L: torch.Tensor) -> list[Row]:
    leaf = {tuple(ids.tolist()): at for at, ids in enumerate(torch.split(tree.token_N, tree.length_L.tolist()))}
    engine = frozen_engine(model.policy, guide)
    (sampled,) = engine.generate([Request(model.prompt, SAMPLES, Sampling(max_new_tokens=tree.depth), seed=0)])
    at = [leaf[tuple(c.ids.tolist())] for c in sampled]
    said = torch.tensor([sum(c.logprobs.tolist()) for c in sampled], dtype=torch.float64)
    missed = int((wanted_L[at] == 0).sum())
    return [
        exact(f"{guide.mode}: probability of each sample", float((said.exp() / posterior_L[at] - 1).abs().max())),
        holds(f"{guide.mode}: samples that end where they must not", str(missed), "0", missed == 0),
    ]
