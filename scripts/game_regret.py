"""What a model falls short of perfect play at tic-tac-toe, by enumeration of its games.

    python scripts/game_regret.py CHECKPOINT [--temperature 1] [--tolerance 0.01] [--greedy-only]

Prints JSON. `greedy` is the model that always writes its most likely turn, `sampled` the one that draws it. Each plays
a `perfect` player and a `random` one, first and second: the mean result (won 1, drawn 0, lost -1), how much the best
play against the same player would get, the difference (`regret`), the share of games that end by a move that is not
legal, and the share that was not followed to its end, by which the others may be off (`tolerance`, and turns that end
otherwise than by the stop string). `worst` is the greedy model's result against the player who knows its every move.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlpost.data.codec import make_codec
from rlpost.data.encoders import plain_prompt
from rlpost.data.tasks._tictactoe import EMPTY, UNKNOWN, Moves, Node, Worth, free, played, turned, worst_value, worth
from rlpost.data.tasks.tictactoe import ENDS, cell_of, shown
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.engine.sampling import greedy as as_greedy
from rlpost.inference.checkpoint import frozen_policy, located
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.types import Completion, Group, Request

PLAYERS = {"perfect": 1.0, "random": 0.0}
SEATS = {"first": {EMPTY: 1.0}, "second": {turned(played(EMPTY, cell)): 1 / 9 for cell in range(9)}}
"""Boards that the model sees first; the first move of either player is any of the nine."""
LONGEST = 4
"""Tokens of a turn that the greedy model may write; longer ones name no cell."""


def context(node: Node) -> str:
    """What the model has read and written when it is to move."""
    before = "".join(f"{shown(board)}{cell + 1}{ENDS}" for board, cell in node.turns)
    return before + shown(node.board)


def greedy(policy: Policy) -> Moves:
    """The model that always writes its most likely turn."""
    codec, engine = make_codec(policy.tokenizer), frozen_engine(policy)
    sampling = as_greedy(Sampling(max_new_tokens=LONGEST, stop=[ENDS]))

    def moves(nodes: Sequence[Node]) -> list[dict[int, float]]:
        prompts = [plain_prompt(context(node), codec, "a game") for node in nodes]
        answers = engine.generate([Request(prompt, 1, sampling, 0) for prompt in prompts])
        cells = [
            cell_of(a.text, n.board) if a.finish == "stop" else None for n, (a,) in zip(nodes, answers, strict=True)
        ]
        return [{} if cell is None else {cell: 1.0} for cell in cells]

    return moves


def sampled(policy: Policy, temperature: float) -> Moves:
    """The model that draws its turns; those that end by the end token are not followed."""
    codec = make_codec(policy.tokenizer)
    (stop,) = codec.ids(ENDS, "a game")

    def group(node: Node) -> Group:
        digits = [codec.ids(str(cell + 1), "a game")[0] for cell in free(node.board)]
        turns = [Completion((digit, end), (True, True)) for digit in digits for end in (stop, codec.end)]
        return Group(plain_prompt(context(node), codec, "a game"), turns)

    def moves(nodes: Sequence[Node]) -> list[dict[int, float]]:
        found = logprobs(policy, map(group, nodes), temperature=temperature)
        chances = iter(found.double().view(-1, 2).sum(1).exp().tolist())
        return [_apart({cell: (next(chances), next(chances)) for cell in free(node.board)}) for node in nodes]

    return moves


def _apart(chances: Mapping[int, tuple[float, float]]) -> dict[int, float]:
    return {cell: p for cell, (p, _) in chances.items()} | {UNKNOWN: sum(q for _, q in chances.values())}


def report(moves: Moves, tolerance: float) -> dict[str, Any]:
    """Against each player, in each seat, and the mean of both seats."""
    found: dict[str, Any] = {}
    for name, skill in PLAYERS.items():
        seats = {seat: line(worth(moves, skill, boards, tolerance)) for seat, boards in SEATS.items()}
        found[name] = {"regret": fmean(seat["regret"] for seat in seats.values()), **seats}
    return found


def line(found: Worth) -> dict[str, float]:
    fields = ("value", "best", "regret", "illegal", "unknown", "positions")
    return {name: round(getattr(found, name), 6) for name in fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run, stage, checkpoint or model")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled model")
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of its games that need not be followed")
    parser.add_argument("--greedy-only", action="store_true", help="seconds instead of minutes")
    given = parser.parse_args()
    policy = frozen_policy(located(given.checkpoint))
    most_likely = greedy(policy)
    found: dict[str, Any] = {"checkpoint": given.checkpoint, "greedy": report(most_likely, 0.0)}
    found["greedy"]["worst"] = {seat: worst_value(most_likely, list(boards)) for seat, boards in SEATS.items()}
    if not given.greedy_only:
        found["sampled"] = report(sampled(policy, given.temperature), given.tolerance)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
