"""What the stages of a recipe will take of the device's memory: the table of `rlpost train --dry-run`.

An estimate of the most a stage takes at once: what stays (weights, gradients, moments, models beside), and the larger
of an update's largest pass and of sampling. `scripts/memory_check.py` compares it with what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlpost.data.codec import Codec, make_codec
from rlpost.data.params import DataRole
from rlpost.engine.local import KEPT_BYTES, ROWS_AT_ONCE
from rlpost.engine.params import LOCAL
from rlpost.errors import ModelError
from rlpost.inference.machine import memory
from rlpost.inference.recipe_model import config_of, positions_in, tokenizer_of
from rlpost.policy.cache import FIRST_ROOM
from rlpost.policy.footprint import SINGLE, Footprint, footprint
from rlpost.policy.load import decide_bfloat16
from rlpost.policy.params import Attention
from rlpost.recipe.resolve import Resolved
from rlpost.recipe.specs.common import Rollouts, Training
from rlpost.rewards.params import reward_leaves
from rlpost.stage_rows import open_rows, own_sources
from rlpost.stages.params import Trunk
from rlpost.train.params import OptimizerName

FRAGMENTS = 0.2
"""Share by which a CPU's allocator takes more than is asked for: it keeps what passes of other sizes have freed."""
PROCESS = 12 << 20
"""Bytes that a stage takes besides: rows, tokenizer, products prepared by oneDNN."""
SMALLEST = 4096
"""Numbers of a matrix from which on moments have 8 bits."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage."""

    name: str
    weights: int
    gradients: int
    moments: int
    beside: int
    """Models beside the trained one: reference, critic, teacher, reward models; a process that samples ahead."""
    passes: int
    """The largest pass of an update."""
    sampling: int
    """Cache, packed weights and logits of decoding."""
    slack: int
    """What the allocator and the process take besides."""

    @property
    def total(self) -> int:
        """The most at once."""
        lasting = self.weights + self.gradients + self.moments + self.beside
        return lasting + max(self.passes, self.sampling) + self.slack


@dataclass(frozen=True)
class Rows:
    """Tokens of a stage's rows: of one row on average, and of the longest."""

    mean: float
    longest: int
    scored: float
    """Share of tokens that are actions."""


@dataclass(frozen=True)
class Device:
    """What training would run on."""

    kind: str
    total: int | None

    @property
    def cpu(self) -> bool:
        """No GPU."""
        return self.kind == "cpu"


def here() -> Device:
    """The device of this process, and its memory."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type == "cuda":
        return Device("cuda", int(torch.cuda.get_device_properties(0).total_memory))
    return Device("cpu" if found is None else found.type, memory()[0])


def plan(resolved: Resolved, device: Device) -> list[StageMemory]:
    """The memory of every stage that trains.

    Raises:
        ModelError: the recipe's model is not there, or cannot be estimated. DataError: a row is wrong.
    """
    model = resolved.config.model
    if model.quantization:
        raise ModelError("model.quantization: weights in four bits are not counted yet")
    tokenizer = tokenizer_of(resolved)
    config = config_of(resolved, len(tokenizer))
    if config is None:
        raise ModelError(f"model.path: {model.path} is converted when the run begins")
    bfloat16 = decide_bfloat16(model.precision, device.kind, int(config.get_text_config().hidden_size))
    of_model = footprint(config, model, bfloat16=bfloat16, cpu=device.cpu)
    codec, positions = make_codec(tokenizer), positions_in(resolved)
    stages = {n: s for n, s in resolved.config.stages.items() if s.enabled and isinstance(s, Training)}
    shares = model.attention is not Attention.padded and not (model.lora and model.lora.dropout)
    return [
        _of_stage(
            name,
            stage,
            of_model,
            _rows(resolved, name, codec, positions),
            _slots(resolved, stage),
            shares=shares,
            cpu=device.cpu,
        )
        for name, stage in stages.items()
    ]


def lines(resolved: Resolved) -> Iterator[str]:
    """The table, and a warning for each stage that is beyond the device; one line where nothing can be said."""
    device = here()
    try:
        table = plan(resolved, device)
    except ModelError as error:
        yield f"memory: not estimated: {error}"
        return
    if not table:
        return
    where = "the CPU" if device.cpu else f"the {device.kind} device"
    yield f"memory, about, of {_size(device.total)} for {where}"
    heads = ("weights", "gradients", "moments", "beside", "passes", "sampling", "at most")
    width = max(len(s.name) for s in table)
    yield f"  {'':{width}}" + "".join(f"{head:>11}" for head in heads)
    for s in table:
        found = (s.weights, s.gradients, s.moments, s.beside, s.passes, s.sampling, s.total)
        yield f"  {s.name:{width}}" + "".join(f"{_size(x):>11}" for x in found)
    for s in table:
        if device.total is not None and s.total > device.total:
            yield f"warning: stages.{s.name}: needs about {_size(s.total)} of {_size(device.total)}: {_remedy(s)}"


def _remedy(s: StageMemory) -> str:
    """The keys to lower, by what takes most."""
    lasting = s.weights + s.gradients + s.moments + s.beside
    if lasting > max(s.passes, s.sampling):
        return "set model.lora, optimizer: adamw_8bit, or take a smaller model"
    if s.passes >= s.sampling:
        return "lower max_tokens_per_microbatch or max_length, or set model.gradient_checkpointing=true"
    return "lower prompts_per_step, group_size or sampling.max_new_tokens"


def _size(size: int | None) -> str:
    if size is None:
        return "an unknown size"
    return f"{size / 2**20:.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def _rows(resolved: Resolved, name: str, codec: Codec, positions: int) -> Rows:
    """Of the stage's data; rows that an earlier stage writes are taken for the longest allowed."""
    stage = resolved.config.stages[name]
    assert isinstance(stage, Training)
    longest = min(stage.max_length, positions)
    if len(own_sources(stage)) < len(stage.data):
        return Rows(longest, longest, 1.0)
    # What is compared is read in one pass.
    reach = sum if stage.rows() in (DataRole.pairs, DataRole.triples, DataRole.ranked) else max
    tokens, actions, most = [], 0, 0
    for group in open_rows(resolved, name, codec, positions).every():
        own = [len(c.ids) for c in group.completions]
        tokens.append(len(group.prompt) + sum(own))
        actions += sum(c.actions for c in group.completions)
        most = max(most, len(group.prompt) + reach([0, *own]))
    return Rows(sum(tokens) / len(tokens), most, actions / max(sum(tokens), 1))


def _slots(resolved: Resolved, stage: Training) -> int:
    """Versions of the weights for which the process that samples ahead of training has room; 0: there is none."""
    if not isinstance(stage, Rollouts) or stage.rows() is DataRole.recorded:
        return 0
    chosen = stage.rollouts or resolved.config.rollouts
    return chosen.staleness + 1 if chosen.staleness and chosen.engine == LOCAL else 0


def _of_stage(
    name: str, stage: Training, f: Footprint, rows: Rows, slots: int, *, shares: bool, cpu: bool
) -> StageMemory:
    total, longest, scored = _update(stage, rows, shares=shares)
    # As Experience.cut makes parts of about equal size.
    budget, parts = stage.max_tokens_per_microbatch, max(1, -(-total // stage.max_tokens_per_microbatch))
    tokens = max(min(total, budget, -(-total // parts) + longest), longest)
    passes = round(tokens * f.a_token(longest)) + f.head(round(tokens * scored)) + f.joined + f.halves
    sampling, packed = _sampling(stage, f, rows) if isinstance(stage, Rollouts) else (0, 0)
    moments = 0 if stage.kind == "trpo" else moments_of(stage.optimizer, f.matrices, f.others)
    vectors = 6 * SINGLE * f.trained if stage.kind == "trpo" else 0
    slack = PROCESS + round(FRAGMENTS * max(passes, sampling)) if cpu else 0
    ahead = 0
    if slots:  # a process with a copy of the model, which samples while this one learns
        ahead = f.base + f.adapter + slots * SINGLE * f.trained + packed + sampling + (PROCESS if cpu else 0)
        sampling = packed = 0
    return StageMemory(
        name,
        weights=f.base + f.adapter + packed,
        gradients=SINGLE * f.trained,
        moments=moments + vectors,
        beside=_beside(stage, f, moments) + ahead,
        passes=passes,
        sampling=sampling,
        slack=slack,
    )


def _update(stage: Training, rows: Rows, *, shares: bool) -> tuple[int, int, float]:
    """Tokens of an update, of its longest row, and the share of them that is scored."""
    if not isinstance(stage, Rollouts) or stage.rows() is DataRole.recorded:
        groups = int(getattr(stage, "batch_size", getattr(stage, "prompts_per_step", 1)))
        return round(groups * rows.mean), rows.longest, rows.scored
    prompts, new = -(-stage.prompts_per_step // stage.num_minibatches), stage.sampling.max_new_tokens
    written = stage.group_size * new
    group = written + rows.mean * (1 if shares else stage.group_size)
    return round(prompts * group), rows.longest + new, written / group


def _sampling(stage: Rollouts, f: Footprint, rows: Rows) -> tuple[int, int]:
    """Bytes while sampling, and of packed weights that stay while the stage learns."""
    at_once = min(ROWS_AT_ONCE, stage.prompts_per_step * stage.group_size)
    room = FIRST_ROOM
    while room < stage.sampling.max_new_tokens:
        room *= 2
    own = at_once * min(room, stage.sampling.max_new_tokens)
    prompts = -(-at_once // stage.group_size) * rows.longest
    # Prompts are read in a pass, then laid out for decoding; logits are drawn from in float32.
    read = prompts * (f.read + f.cached)
    stays = 0 < f.packed <= KEPT_BYTES
    decoding = f.cached * (own + prompts) + 2 * SINGLE * at_once * f.vocabulary
    # While weights are packed there is a copy of them besides.
    most = round(max(decoding, read, f.packed))
    return (most, f.packed) if stays else (most + f.packed, 0)


def moments_of(optimizer: OptimizerName, matrices: Sequence[int], others: int) -> int:
    """Bytes of an optimiser's moments; all else than matrices of layers has AdamW's two."""
    if optimizer is OptimizerName.muon:
        return SINGLE * sum(matrices) + 2 * SINGLE * others
    if optimizer is OptimizerName.adamw:
        return 2 * SINGLE * (sum(matrices) + others)
    small = sum(n for n in matrices if n < SMALLEST)
    large = sum(matrices) - small
    return 2 * large + 2 * SINGLE * large // 256 + 2 * SINGLE * (small + others)


def _beside(stage: Any, f: Footprint, moments: int) -> int:
    """Bytes of the models beside the trained one, each taken to be of its size."""
    copy = f.adapter if f.adapter else f.base
    frozen = sum(bool(leaf.model) for leaf, _ in reward_leaves(getattr(stage, "rewards", []), ""))
    frozen += int(_has_reference(stage)) + int(getattr(stage, "teacher", None) not in (None, "self"))
    found = frozen * copy
    critic = getattr(stage, "critic", None)
    if critic is not None:
        trains = critic.trunk is Trunk.own
        found += copy + (SINGLE * f.trained + moments if trains else 0)
    return found


def _has_reference(stage: Any) -> bool:
    if isinstance(stage, Rollouts):
        meets = getattr(stage, "against", None) is not None
        return stage.needs_reference or stage.kind == "online_dpo" or meets
    return getattr(stage, "reference", None) is not None
