"""What environments cost: episodes a second without a model, by kind of environment.

    python scripts/environment_speed.py [--rounds 5] [--episodes 256] [--turns 4]

An engine that says the same words each turn takes the model's place, so what is measured is rlpost's own: calls of the
environment (a function or a class of a user's file, in its process), chat template and tokens between turns. Kinds are
measured in turn; printed are medians, as a table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlpost.data.codec import make_codec
from rlpost.data.params import Tokenizer, TokenizerKind
from rlpost.data.tokenizers import make_tokenizer
from rlpost.engine.params import Sampling
from rlpost.environments.delta import TurnDelta
from rlpost.environments.loop import collect_turns
from rlpost.types import Completion, Group, Request
from rlpost.usercode.binding import bind
from rlpost.usercode.params import ENVIRONMENT, EnvironmentFunction
from rlpost.usercode.process import end_all

TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FILE = """\
TURNS = {turns}


def function(text, turns):
    return "and then?" if len(turns) < TURNS else None


class Texts:
    def reset(self, example):
        self.turns = 0
        return "begin"

    def step(self, action):
        self.turns += 1
        return "and then?", 1.0, self.turns == TURNS, False, {{}}


class Messages(Texts):
    def reset(self, example):
        self.turns = 0
        return [{{"role": "user", "content": "begin"}}]

    def step(self, action):
        said, *rest = super().step(action)
        return [{{"role": "user", "content": said}}], *rest


class Coroutines(Messages):
    async def step(self, action):
        return super().step(action)
"""
KINDS = ("function", "Texts", "Messages", "Coroutines")


class Says:
    """An engine that says the same each turn."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """A turn for each request."""
        n = len(self._ids)
        return [(Completion(self._ids, [True] * n, "once more", "stop", [-1.0] * n),) for _ in requests]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--episodes", type=int, default=256)
    asked.add_argument("--turns", type=int, default=4)
    args = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kinds.py").write_text(FILE.format(turns=args.turns))
        runs = {kind: episodes_of(Path(folder), kind, args.episodes, args.turns) for kind in KINDS}
        took: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(args.rounds + 1):
            for kind, run in runs.items():
                began = time.perf_counter()
                run()
                if number:  # the first starts the processes
                    took[kind].append(time.perf_counter() - began)
        end_all()
    print(f"| environment | episodes/s | ms a turn |  ({args.episodes} episodes of {args.turns} turns)\n|---|---|---|")
    for kind, seconds in took.items():
        middle = statistics.median(seconds)
        print(f"| {kind} | {args.episodes / middle:,.0f} | {1000 * middle / args.episodes / args.turns:.2f} |")


def episodes_of(folder: Path, kind: str, episodes: int, turns: int) -> Callable[[], object]:
    """What runs that many episodes, eight a prompt."""
    tokenizer = make_tokenizer(
        Tokenizer(kind=TokenizerKind.bpe, vocab_size=300), ["user assistant once more and then?"]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    codec = make_codec(tokenizer)
    assert codec.template is not None
    environment = bind(EnvironmentFunction(fn=f"kinds.py:{kind}"), ENVIRONMENT, "environment", folder)
    delta = TurnDelta(tokenizer, codec.template)
    groups = [Group([1, 2, 3], (), {"n": n}) for n in range(episodes // 8)]
    engine = Says(tokenizer.encode("once more<|im_end|>", add_special_tokens=False))
    sampling = Sampling(max_new_tokens=1000)
    settings = {"environment": environment, "turns": turns, "max_positions": 2000, "delta": delta}
    return lambda: collect_turns(engine, codec, groups, 8, sampling, 0, **settings)


if __name__ == "__main__":
    main()
