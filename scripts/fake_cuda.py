"""Every stage's update, and sampling, on a device without memory: whether it mixes devices, and what waits for it.

    python scripts/fake_cuda.py                   # every case of stage_updates.py
    python scripts/fake_cuda.py "sft nll" grpo    # those whose names begin so
    python scripts/fake_cuda.py --cuda            # as `cuda`, under a build of PyTorch for it

An update is forward and backward passes and AdamW's step; once on prompts that are shared, in one pass, and once on
packed rows in several. As `cuda` the passes run in bfloat16 and attention in its kernels for GPUs, but no backward pass
does, which asks for a driver; gradients are zeros there. Exits with 1 if devices are mixed, or an update waits for the
device more than UPDATE_WAITS times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fake_device import Watch, register, where, without_driver
from families import EndTokenOnly
from stage_updates import CASES
from worlds import World, sampled_groups

from rlpost.engine.door import engine_for
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.engine.sampling import greedy
from rlpost.policy import adapters
from rlpost.policy.kernel_check import VARLEN
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy
from rlpost.policy.segment_attention import TILES
from rlpost.policy.value_head import ValueHeadModel
from rlpost.train.learner import Learner
from rlpost.types import Request

UPDATE_WAITS = 2
"""An update reads the device for its metrics, and for the gradient's norm; however many parts it has, or layers."""
PART = 60
"""Tokens of a part, where there are several."""
TOKENS = 24
"""Of a sampled completion."""

SAMPLINGS = {
    "all tokens": Sampling(max_new_tokens=TOKENS),
    "the likeliest": greedy(Sampling(max_new_tokens=TOKENS)),
    "filtered": Sampling(max_new_tokens=TOKENS, top_k=5, top_p=0.9, min_p=0.01),
}


class Tokens(EndTokenOnly):
    """A tokenizer for completions that nobody reads."""

    def decode(self, ids: list[int], **_: Any) -> str:
        """The numbers."""
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Row:
    """What one run found."""

    name: str
    error: str
    waits: int
    copies: int
    """Copies to the device that waited."""
    places: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is to be repaired; sampling has to see which rows have ended."""
        waits_little = not self.copies and self.waits <= UPDATE_WAITS
        return not self.error and (waits_little or self.name.startswith("sample"))


class FakeWorld(World):
    """Its models are on the device."""

    def __init__(self, watch: Watch, *, lora: bool = False, half: bool = False) -> None:
        super().__init__("llama", torch.float32, watch.device)
        self._watch, self._lora, self._half = watch, lora, half

    def placed(self, model: Any) -> Any:
        """The model without numbers."""
        if self._lora:
            model = adapters.add_policy_adapter(model.requires_grad_(False), Lora(r=2, alpha=4.0))
        return self._watch.placed(model)

    def _policy(self, layout: str = "shared", step: float = 0.0) -> Policy:
        policy = super()._policy(layout, step)
        policy.in_bfloat16 = self._half
        policy.kernels = VARLEN if self._half else TILES
        return policy

    def _scalar(self, layout: str = "shared", step: float = 0.0) -> ValueHeadModel:
        model = ValueHeadModel(self.policy(layout, step))
        self._watch.placed(model.head)
        return model


def update(world: FakeWorld, name: str, layout: str, tokens: int, learns: bool) -> Callable[[], None]:
    """A case's update, ready to run; without `learns`, its forward passes and the optimiser's step."""
    case = CASES[name](world)
    model = world.scalar(layout) if case.scalar else world.policy(layout)
    learner = Learner(model, learning_rate=1.0, max_tokens_per_microbatch=tokens, whole_groups=case.whole_groups)
    made = case.prepare(list(range(len(case.groups))), learner)

    def run() -> None:
        if learns:
            learner.update(made.loss, made.experience, made.stats)
            return
        with torch.enable_grad():
            model(model.batch(made.experience.groups), *([made.stats] if made.stats else []))
        learner.measure(made.loss, made.experience, made.stats)
        for p in model.trained().values():
            p.grad = torch.zeros_like(p)
        learner._clip()
        learner._optimizer.step()

    return run


def sample(world: FakeWorld, settings: Sampling) -> Callable[[], None]:
    """Two prompts' completions, ready to be sampled."""
    policy = world.policy()
    policy.tokenizer = Tokens()
    engine = engine_for(policy, EngineChoice(cache_gib=0))
    engine.update_weights(policy, 0)
    requests = [Request(g.prompt, 3, settings, seed=i) for i, g in enumerate(sampled_groups()[:2])]

    def run() -> None:
        engine.generate(requests)

    return run


def row_of(watch: Watch, name: str, prepare: Callable[[], Callable[[], None]]) -> Row:
    """What a run finds; what was prepared for it is not counted."""
    error = ""
    try:
        run = prepare()
        watch.clear()
        run()
    except Exception as reason:  # whatever stops it is what is looked for
        error = f"{type(reason).__name__}: {str(reason).splitlines()[0][:160]} at {where(reason)}"
    places = tuple(f"{place} ×{n}" for place, n in (watch.waits + watch.copies).items())
    return Row(name, error, watch.waits.total(), watch.copies.total(), places)


def rows(watch: Watch, names: list[str], learns: bool) -> list[Row]:
    """Every run."""
    half = not learns
    wanted = [n for n in CASES if not names or any(n.startswith(x) for x in names)]
    found = []
    for name in wanted:
        for layout, tokens in (("shared", 10**6), ("apart", PART)):
            world = FakeWorld(watch, half=half)
            how = f"{name}, {layout}"
            found.append(row_of(watch, how, lambda: update(world, name, layout, tokens, learns)))  # noqa: B023 - run at once
            print_row(found[-1])
    if not names or "lora" in names:
        world = FakeWorld(watch, lora=True, half=half)
        found.append(row_of(watch, "lora, sft nll", lambda: update(world, "sft nll", "shared", PART, learns)))
        print_row(found[-1])
    for name, settings in SAMPLINGS.items() if not names or "sample" in names else ():
        world = FakeWorld(watch, half=half)
        found.append(row_of(watch, f"sample {name}", lambda: sample(world, settings)))  # noqa: B023
        print_row(found[-1])
    return found


def print_row(row: Row) -> None:
    print(f"{row.name:<44} {'FAILED' if row.error else 'runs':<7} {row.waits:>5} {row.copies:>6}  ", end="")
    print(row.error or ", ".join(row.places))


def refuses(watch: Watch) -> bool:
    """Whether the device is one that cannot be mixed with the CPU: else nothing here means anything."""
    try:
        watch.moved(torch.zeros(2)) + torch.zeros(2)
    except RuntimeError:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases of stage_updates.py, `lora`, `sample`; by default all")
    parser.add_argument("--cuda", action="store_true", help="the device is called cuda")
    args = parser.parse_args()
    if args.cuda and torch.version.cuda is None:
        print("this build of PyTorch knows no cuda device; `make fake-cuda` installs one that does", file=sys.stderr)
        return 1
    with Watch(without_driver() if args.cuda else register()) as watch:
        if not refuses(watch):
            print("this PyTorch lets the device be mixed with the CPU, so nothing is found here", file=sys.stderr)
            return 1
        print(f"{'on ' + str(watch.device):<44} {'':<7} {'waits':>5} {'copies':>6}  where")
        found = rows(watch, args.names, learns=not args.cuda)
    wrong = [row.name for row in found if not row.sound]
    print(f"{len(found) - len(wrong)} of {len(found)} are sound" + (f"; not: {'; '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
