"""Parameters of training."""

from collections.abc import Iterator

from pydantic import Field

from rlpost.section import Choice, Section


class Strategy(Choice):
    """What each process keeps of the models that are trained."""

    ddp = "ddp"
    """All of it; gradients are summed once an update."""
    fsdp2 = "fsdp2"
    """A share of every weight, gradient and optimiser state; a block's weights are gathered while it is used."""


class Parallel(Section):
    """How many processes share the work, and what each keeps (docs/runs.md#several-processes)."""

    processes: int = Field(1, ge=1)
    """Processes on this machine, each with a share of the work; the result is that of one up to rounding. A launcher
    may start them too: it then says how many."""
    strategy: Strategy = Strategy.ddp
    """What each keeps of the models that are trained, and of references."""
    cpu_offload: bool = False
    """With `fsdp2` on GPUs, the shares are kept in the host's memory, and the optimiser steps there."""

    def problems(self, where: str) -> Iterator[str]:
        """What only shares can do."""
        if self.cpu_offload and self.strategy is Strategy.ddp:
            yield f"{where}.cpu_offload: only shares are offloaded - set {where}.strategy=fsdp2 too"


class OptimizerName(Choice):
    """The optimiser of matrices in a model's layers; all else has AdamW (docs/how-it-works.md#optimisers)."""

    adamw = "adamw"
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)."""
    adamw_8bit = "adamw_8bit"
    """AdamW with moments of 8 bits (Dettmers et al. 2022, arXiv:2110.02861): 2 bytes a weight, and not 8; needs
    `pip install 'rlpost[bnb]'`."""
    muon = "muon"
    """Muon (Jordan et al. 2024), its steps scaled to the length of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that
    one learning rate serves both."""


class Schedule(Choice):
    """Shape of the learning rate after its warm-up."""

    constant = "constant"
    """Stays at the peak."""
    linear = "linear"
    """Falls towards 0 in a straight line."""
    cosine = "cosine"
    """Falls towards 0 along half a cosine."""


class Mode(Choice):
    """Which values of a metric are better."""

    max = "max"
    """Higher ones."""
    min = "min"
    """Lower ones."""


_LOWER = ("loss", "preference_loss", "nll", "chosen_nll", "truncated", "unscored")
"""Metrics of which lower values are better."""


class KeepBest(Section):
    """Keeps the weights of the best evaluation while the stage trained, rather than the last ones, and may stop early.

    A tie is no improvement.
    """

    metric: str
    """What is compared: a metric of `evaluations.jsonl`, such as `loss` or `greedy/accuracy`
    (docs/runs.md#evaluating-while-a-stage-trains)."""
    mode: Mode | None = None
    """Which values are better; by default `min` for losses, `nll`, `truncated` and `unscored`, `max` for others."""
    min_delta: float = Field(0.0, ge=0)
    """By how much a value has to be better to count."""
    patience: int | None = Field(None, ge=1)
    """Stop the stage early after so many evaluations in a row without a better value; by default it goes on."""

    @property
    def lower(self) -> bool:
        """Whether lower values are better."""
        return self.metric.rpartition("/")[2] in _LOWER if self.mode is None else self.mode is Mode.min
