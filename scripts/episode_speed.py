"""Episodes whose environment takes a random time for each reply: in lock-step, and each at its own pace.

    .venv-engines/bin/python scripts/episode_speed.py [--rounds 3] [--episodes 32] [--turns 5]

The local engine runs episodes in lock-step, vLLM freely; the environment is one file and the same for both. A reply
takes a lognormal time, half a second on average, drawn from the episode and its turn. Printed are the medians of both,
beside the least that any way could take (the longest episode's replies) and what lock-step must (each turn's slowest).
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from engine_speed import VOCABULARY, write_model

from rlpost.engine.door import engine_for
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.environments.loop import collector
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.types import Group
from rlpost.usercode.binding import bind
from rlpost.usercode.params import ENVIRONMENT, EnvironmentFunction

SPREAD = 1.0
SLOW = """\
import asyncio


async def reply(text, turns, example):
    await asyncio.sleep(example["seconds"][len(turns) - 1])
    return "w1 w2"
"""


def waits(episodes: int, turns: int) -> list[list[float]]:
    """Seconds of every reply of every episode."""
    drawn = random.Random(0)
    mean = math.log(0.5) - SPREAD**2 / 2
    return [[drawn.lognormvariate(mean, SPREAD) for _ in range(turns - 1)] for _ in range(episodes)]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--episodes", type=int, default=32)
    asked.add_argument("--turns", type=int, default=5)
    args = asked.parse_args()
    seconds = waits(args.episodes, args.turns)
    groups = [Group([1, 2, 3], (), {"seconds": own}) for own in seconds]
    took: dict[str, list[float]] = {"local": [], "vllm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        (folder / "slow.py").write_text(SLOW, "utf-8")
        environment = bind(EnvironmentFunction(fn="slow.py:reply"), ENVIRONMENT, "environment", folder)
        policy = load_policy(str(folder), Model(path=str(folder)))
        policy.end_ids = tuple(range(0, VOCABULARY, 8))  # a turn has eight tokens or so
        engines = {name: engine_for(policy, EngineChoice(engine=name, cache_gib=1)) for name in took}
        for round in range(args.rounds + 1):
            for name, engine in engines.items():
                engine.update_weights(policy, round)
                begun = time.perf_counter()
                found = collector(engine, policy, environment, args.turns)(
                    groups, 1, Sampling(max_new_tokens=600), seed=round
                )
                assert all(c.finish == "stop" for g in found for c in g.completions)
                if round:  # the first warms up
                    took[name].append(time.perf_counter() - begun)
        for engine in engines.values():
            engine.close()
    for name, way in (("local", "in lock-step"), ("vllm", "freely")):
        sys.stdout.write(f"{way:13} {statistics.median(took[name]):6.2f} s\n")
    ratios = [a / b for a, b in zip(took["local"], took["vllm"], strict=True)]
    sys.stdout.write(f"lock-step / freely {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n")
    slowest = sum(max(turn) for turn in zip(*seconds, strict=True))
    sys.stdout.write(f"the replies alone: {slowest:.2f} s in lock-step, {max(map(sum, seconds)):.2f} s freely\n")


if __name__ == "__main__":
    main()
