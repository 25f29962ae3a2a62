"""What is left of forbidden endings after each way of avoiding them, and what it costs.

    python scripts/safety.py [--seeds 0 1 2] [--runs runs] [--prompts 100] [--samples 2000] [OVERRIDE ...]

Trains `recipes/safety.yaml` once a seed (finished runs are not repeated) and prints a Markdown table. On the first
held-out problems every completion is enumerated through the real model: mass on forbidden endings, KL to the start,
likelihood and probability of the right answer of problems whose answer is safe. On `--samples` of them one sample
each is drawn by the real engine, for a 95 % upper bound that needs no enumeration (of all seeds together, and
how many samples ended so). Other numbers are means over problems: of all seeds, in brackets the least and the
greatest seed's.

Axes: X states, V tokens, L leaves of the tree of completions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from rlpost import pipeline
from rlpost.data.tasks import addition
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.evaluate.statistics import upper_bound
from rlpost.goals.claims_safety import divergence
from rlpost.goals.exact import reached
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.model_tables import Tokens, guided_away, network_table, policy_table
from rlpost.goals.value_network import ValueNetwork, load_value
from rlpost.oracle import truth
from rlpost.oracle.tree import END, Tree
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.recipe.resolve import resolve
from rlpost.types import Request

LENGTH = 4
"""Tokens of a completion, its end token included."""
BEFORE, AWAY, AWAY_EXACT, REWARD, UNLIKELY, BOTH = (
    *("before", "guided away", "guided away, true S", "reward −1", "unlikelihood", "reward −1, guided away"),
)


@dataclass(frozen=True)
class Measured:
    """A policy after one prompt."""

    mass: float
    """On forbidden endings."""
    kl: float
    """To the start, in nats a completion."""
    right: float | None
    """Log-probability of the right answer; None where that is forbidden."""


class World:
    """The models of one run, and the tree of all completions."""

    def __init__(self, run: Path, forbidden: list[str]) -> None:
        self.policies = {name: policy_of(run / name / "final") for name in ("sft", "reward", "unlikely")}
        start = self.policies["sft"]
        self.tree, self.tokens = Tree(start.vocabulary, LENGTH), Tokens.made_for(start)
        self.members = [tuple(start.tokenizer.encode(text)) for text in forbidden]
        self.unsafe_L = reached(self.tree, self.tokens.goal(self.members), truncated_counts=True)
        pieces = torch.split(self.tree.token_N, self.tree.length_L.tolist())
        self.leaf = {tuple(ids.tolist()): at for at, ids in enumerate(pieces)}
        self.network: ValueNetwork = load_value(run / "guide/final", start, (), avoid=True)

    def tables(self, prompt: list[int]) -> Iterator[tuple[str, Tensor]]:
        """(way, [X, V]) of every way but that of the true S; the start comes first."""
        tree, tokens = self.tree, self.tokens
        start_XV, reward_XV, unlikely_XV = (
            policy_table(self.policies[name], prompt, tree, tokens) for name in ("sft", "reward", "unlikely")
        )
        log_X = network_table(self.network, prompt, tree, tokens)
        yield BEFORE, start_XV
        yield AWAY, guided_away(tree, start_XV, log_X, self.unsafe_L)
        yield REWARD, reward_XV
        yield BOTH, guided_away(tree, reward_XV, log_X, self.unsafe_L)
        yield UNLIKELY, unlikely_XV

    def measure(self, row: dict[str, str]) -> dict[str, Measured]:
        """Every way on one problem, by all completions."""
        tokenizer, tree = self.policies["sft"].tokenizer, self.tree
        number = {real: v for v, real in enumerate(self.tokens.of_V)}
        answer = self.leaf[(*(number[i] for i in tokenizer.encode(row["answer"])), END)]
        found: dict[str, Measured] = {}
        start_XV = None
        for way, logp_XV in self.tables(tokenizer.encode(row["prompt"])):
            start_XV = logp_XV if start_XV is None else start_XV
            logp_L = truth.leaf_logp(tree, logp_XV)
            right = None if self.unsafe_L[answer] else float(logp_L[answer])
            found[way] = Measured(float(logp_L.exp() @ self.unsafe_L), divergence(tree, logp_XV, start_XV), right)
        # Given that it does not end so: what the guide would be with the true S, which the oracle proves.
        before = found[BEFORE]
        price = -float(torch.tensor(1 - before.mass, dtype=torch.float64).log())
        found[AWAY_EXACT] = Measured(0.0, price, None if before.right is None else before.right + price)
        return found

    def sampled(self, way: str, rows: list[dict[str, str]]) -> int:
        """How many of one sample a problem end in the forbidden set."""
        policy = self.policies[{BEFORE: "sft", AWAY: "sft", UNLIKELY: "unlikely"}.get(way, "reward")]
        goal = GoalSet(self.members)
        guide = None
        if way in (AWAY, BOTH):
            guide = self.network.guide(goal, policy.end_ids, 0)
        prompts = [policy.tokenizer.encode(row["prompt"]) for row in rows]
        asked = [Request(p, 1, Sampling(max_new_tokens=LENGTH), seed) for seed, p in enumerate(prompts)]
        drawn = frozen_engine(policy, guide).generate(asked)
        return sum(goal.reached([i for i in c.ids.tolist() if i not in policy.end_ids]) for (c,) in drawn)


def policy_of(folder: Path) -> Policy:
    return load_policy(folder, Model(), trainable=False)


def summary(measured: list[Measured]) -> tuple[float, float, float, float]:
    """Means: forbidden mass, KL, NLL a token and probability of the right answers that are safe."""
    right = [m.right for m in measured if m.right is not None]
    return (
        fmean(m.mass for m in measured),
        fmean(m.kl for m in measured),
        -fmean(right) / LENGTH,
        fmean(torch.tensor(right).exp().tolist()),
    )


def over_seeds(values: list[float], form: str) -> str:
    mean, *ends = (form.format(x) for x in (fmean(values), min(values), max(values)))
    return f"{mean} [{', '.join(ends)}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    held_out = addition.held_out()
    exact: dict[str, list[tuple[float, ...]]] = {}
    ended: dict[str, int] = {}
    for seed in given.seeds:
        words = [f"runs={given.runs}", f"run=safety_seed{seed}", f"seed={seed}", *given.overrides]
        resolved = resolve("safety", words)
        pipeline.train(resolved)
        world = World(given.runs / f"safety_seed{seed}", list(resolved.config.vars["forbidden"]))
        rows = [world.measure(row) for row in held_out[: given.prompts]]
        for way in (BEFORE, AWAY, AWAY_EXACT, REWARD, BOTH, UNLIKELY):
            exact.setdefault(way, []).append(summary([row[way] for row in rows]))
            if way != AWAY_EXACT:
                ended[way] = ended.get(way, 0) + world.sampled(way, held_out[: given.samples])
    trials = len(given.seeds) * given.samples
    print("| | forbidden mass, % | sampled, at most % | KL to the start | NLL of safe answers | accuracy on them, % |")
    print("|---|---|---|---|---|---|")
    for way, by_seed in exact.items():
        mass, kl, nll, right = (list(column) for column in zip(*by_seed, strict=True))
        bound = f"{100 * upper_bound(ended[way], trials):.2f} ({ended[way]})" if way in ended else "–"
        cells = [
            over_seeds([100 * x for x in mass], "{:.2f}" if max(mass) else "{:.0f}"),
            bound,
            over_seeds(kl, "{:.3f}"),
            over_seeds(nll, "{:.4f}"),
            over_seeds([100 * x for x in right], "{:.1f}"),
        ]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
