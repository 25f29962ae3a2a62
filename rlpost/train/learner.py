"""The one place with a backward pass and an optimiser step.

An update is cut into shares of the ranks, and those into parts by a token budget; since every weight was counted over
the whole update, the sum of the parts' gradients is the update's gradient however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlpost import console, ranks
from rlpost.errors import DivergedError
from rlpost.policy.balance import Balance, Load, add
from rlpost.policy.batch import Batch
from rlpost.policy.logprobs import LogitStats
from rlpost.policy.memory import free_memory
from rlpost.policy.sharded import apart, is_sharded, like, local
from rlpost.train.experience import Experience
from rlpost.train.meter import BALANCE, LOSS, Meter, Sums, averages
from rlpost.train.microbatches import Microbatches
from rlpost.train.optimizers import Optimizer
from rlpost.train.params import OptimizerName
from rlpost.train.random_state import random_state, set_random_state
from rlpost.train.trainable import Trainable
from rlpost.unexpected import of_memory

T = TypeVar("T")
LossFunction = Callable[[Any, Experience], tuple[Tensor, Mapping[str, Tensor]]]
"""(the model's output on a part, the part) -> (Σ loss·weight, metrics: 1-D tensors averaged over the whole update)."""


_REMEDY = (
    "nothing was changed by it. Lower learning_rate (--allow-change goes on from the last checkpoint with it), "
    "or look at the last rollouts"
)


class Learner:
    """A model, its optimiser and its learning rate.

    Gradients are summed over ranks once an update, after its last part (docs/adr/0007).
    """

    def __init__(
        self,
        model: Trainable,
        *,
        learning_rate: float,
        factor: Callable[[int], float] = lambda _: 1.0,
        optimizer: OptimizerName = OptimizerName.adamw,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        max_tokens_per_microbatch: int = 4096,
        whole_groups: bool = False,
        balance: Balance | None = None,
    ) -> None:
        """Prepare to train the parameters that `model.trained()` names.

        Args:
            model: what is trained.
            learning_rate: the peak.
            factor: update number -> factor on the peak.
            optimizer: of the matrices in the model's layers; all else has AdamW.
            betas: of AdamW.
            weight_decay: on matrices only; gains and biases are left alone.
            max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
            max_tokens_per_microbatch: budget of one forward and backward pass; it never changes a gradient, and is
                halved where memory is short.
            whole_groups: groups are not cut (losses that compare completions).
            balance: the balance loss of a mixture of experts, added to every update.
        """
        self.model = model
        self.updates = 0
        self.trained_tokens = 0
        self.trained_samples = 0
        """Actions and completions of the updates since the process began, for the rate."""
        self.location = ""
        """Where training stands, for messages: `sft: step 5 (policy)`; empty outside a stage's steps."""
        self._peak = learning_rate
        self._factor = factor
        self._max_norm = max_grad_norm
        self._microbatches = Microbatches(model, max_tokens_per_microbatch, whole_groups=whole_groups)
        self._balance = balance
        self._named = model.trained()
        assert self._named, "nothing to train"
        self._in_shards = {name for name, p in self._named.items() if is_sharded(p)}
        layers = model.layer_matrices()
        self._optimizer = Optimizer(self._named, layers, optimizer, betas=betas, weight_decay=weight_decay)

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        return self._peak * self._factor(self.updates)

    def update(self, loss: LossFunction, experience: Experience, stats: LogitStats | None = None) -> dict[str, float]:
        """One optimiser step on the whole experience; returns its metrics.

        Args:
            loss: of a part of the experience; see `LossFunction`.
            experience: the update, the same on all ranks.
            stats: what a policy's forward pass computes for each action; by default the log-probability alone.

        Raises:
            DivergedError: if the gradient or a metric is not finite; nothing was changed then.
            OutOfMemoryError: if a pass of one completion does not fit into memory; nothing was changed then.
        """
        metrics = self._gradient(loss, experience, self._balance, stats)
        norm = self._clip()
        self.must_be_finite(metrics)
        rate = self.rate
        self._optimizer.step(rate)
        self.updates += 1
        rows = experience.rows
        self.trained_tokens += rows.actions
        self.trained_samples += rows.learned
        return {**metrics, "grad_norm": norm, "learning_rate": rate}

    def gradient(self, loss: LossFunction, experience: Experience, stats: LogitStats | None = None) -> dict[str, float]:
        """The update's gradient, summed over parts and ranks, left in the parameters; returns its metrics."""
        return self._gradient(loss, experience, None, stats)

    def _gradient(
        self, loss: LossFunction, experience: Experience, balance: Balance | None, stats: LogitStats | None
    ) -> dict[str, float]:
        def attempt() -> list[Sums] | None:
            whole = None
            # A single part is the whole update, so its own expert load is enough.
            if balance is not None and (ranks.count() > 1 or len(self._microbatches.parts(experience)) > 1):
                whole = self._whole_load(balance, experience, stats)
                if whole is None:
                    return None
            passes = partial(self._passes, loss, balance=balance, whole=whole, stats=stats)
            return self._attempt(experience, passes, gradient=True)

        self.model.train()
        everyone = self._until_it_fits(attempt)
        self.model.train(False)
        # Those of shards were summed by the backward pass.
        ranks.sum_over_ranks(p.grad for p in self._named.values() if p.grad is not None and not is_sharded(p))
        return {LOSS: 0.0, **averages(everyone)}

    def _passes(
        self,
        loss: LossFunction,
        parts: Sequence[Experience],
        *,
        balance: Balance | None,
        whole: Load | None,
        stats: LogitStats | None,
    ) -> Sums:
        """Forward and backward over this rank's parts; their gradients add up in the parameters."""
        meter = Meter()
        self._zero_gradients()
        for part in parts:
            batch = self.model.batch(part.groups)
            with balance.recording() if balance is not None else nullcontext() as recorded:
                output = self._output(batch, stats)
            total, metrics = loss(output, part.to(self.model.device))
            if balance is not None and recorded is not None:
                load = balance.load(recorded, batch)
                extra = load.loss_within(whole or load)
                meter.add({BALANCE: extra[None]})
                (total + balance.coefficient * extra).backward()  # type: ignore[no-untyped-call]
            else:
                total.backward()  # type: ignore[no-untyped-call]
            self.model.backward_done()
            meter.add_part(total.detach(), metrics)
        return meter.sums()

    @torch.no_grad()
    def _whole_load(self, balance: Balance, experience: Experience, stats: LogitStats | None) -> Load | None:
        """The expert load of the whole update, over all ranks; None if memory was short."""

        load = balance.empty(self.model.device)

        def own(parts: Sequence[Experience]) -> None:
            nonlocal load
            for part in parts:
                batch = self.model.batch(part.groups)
                with balance.recording() as recorded:
                    self._output(batch, stats)
                load = add(load, balance.load(recorded, batch))

        if self._attempt(experience, own) is None:
            return None
        chosen_E, tokens = load.chosen_E.clone(), load.tokens.clone()
        ranks.sum_over_ranks([chosen_E, tokens])
        return Load(chosen_E, load.probability_E, tokens)

    @torch.no_grad()
    def evaluate_no_grad(
        self, take: Callable[[Any, Experience], Tensor], experience: Experience, stats: LogitStats | None = None
    ) -> Tensor:
        """`take(output, part)` of every part, concatenated along the first axis; no gradient, on the CPU."""

        def own(parts: Sequence[Experience]) -> list[Tensor]:
            taken = []
            for part in parts:
                output = self._output(self.model.batch(part.groups), stats)
                taken.append(take(output, part.to(self.model.device)).cpu())
            return taken

        everyone = self._until_it_fits(lambda: self._attempt(experience, own))
        pieces = [piece for some in everyone for piece in some]
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def measure(self, loss: LossFunction, experience: Experience, stats: LogitStats | None = None) -> dict[str, float]:
        """The metrics of `loss` on the whole experience, without gradient."""

        @torch.no_grad()
        def own(parts: Sequence[Experience]) -> Sums:
            meter = Meter()
            for part in parts:
                output = self._output(self.model.batch(part.groups), stats)
                total, metrics = loss(output, part.to(self.model.device))
                meter.add_part(total, metrics)
            return meter.sums()

        return {LOSS: 0.0, **averages(self._until_it_fits(lambda: self._attempt(experience, own)))}

    def _until_it_fits(self, attempt: Callable[[], T | None]) -> T:
        """What `attempt` returns once it is not None, each time from the same random state."""
        before, state = self._microbatches.tokens, random_state()
        while (found := attempt()) is None:
            set_random_state(state)
        if self._microbatches.tokens < before:
            console.warn(
                f"{self._here}: out of memory with max_tokens_per_microbatch={before}; it goes on with "
                f"max_tokens_per_microbatch={self._microbatches.tokens}, which the stage can begin with"
            )
        return found

    def _attempt(
        self, experience: Experience, work: Callable[[Sequence[Experience]], T], *, gradient: bool = False
    ) -> list[T] | None:
        """What `work` returns on each rank of its parts; None if one ran out of memory, and the budget is lower now.

        `work` sends nothing to other ranks: it may end early on one of them.
        """

        def tried() -> tuple[T] | None:
            try:
                with self.model.in_turn(gradient=gradient):
                    return (work(self._microbatches.parts(experience)),)
            except (RuntimeError, MemoryError) as error:
                # A pass of shards that broke off cannot be made again: others wait within theirs.
                if self.model.in_shards or not of_memory(error):
                    raise
                return None

        everyone = ranks.together(tried)
        short = [rank for rank, found in enumerate(everyone) if found is None]
        if not short:
            return [found[0] for found in everyone if found is not None]
        self.model.backward_done()
        free_memory(self.model.device)
        self._microbatches.lower(experience, short, self._here)
        return None

    def _output(self, batch: Batch, stats: LogitStats | None) -> Any:
        """The model's output on a batch; a model with a value head takes no statistics."""
        return self.model(batch) if stats is None else self.model(batch, stats)

    def _zero_gradients(self) -> None:
        # Zeros, not None: the optimiser skips None, but a parameter without gradient this time (an unused expert)
        # must follow its momentum, in a resumed process as in an uninterrupted one.
        for p in self._named.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()

    def gradient_norm(self) -> float:
        """The norm of the gradient that `gradient` left.

        Raises:
            DivergedError: it is not finite.
        """
        return self._norm()[1]

    def _norm(self) -> tuple[Tensor, float]:
        """The norm, where gradients are, and as a number, which waits for them."""
        grads = {n: local(p.grad) for n, p in self._named.items() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm([x for n, x in grads.items() if n not in self._in_shards])
        if self._in_shards:
            own = torch.nn.utils.get_total_norm([x for n, x in grads.items() if n in self._in_shards])
            norm = torch.hypot(ranks.summed(own**2).sqrt(), norm.to(own))
        number = float(norm)
        if not math.isfinite(number):
            name = next((n for n, x in grads.items() if not x.isfinite().all()), "?")
            raise DivergedError(f"{self._here}: the gradient of {name} is not finite; {_REMEDY}")
        return norm, number

    def must_be_finite(self, metrics: Mapping[str, float]) -> None:
        """Check an update's metrics before any weight changes.

        Raises:
            DivergedError: a metric is not finite. The gradient may be finite all the same, where a clamp cut it off.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                what = "the loss" if name == LOSS else f"the metric {name}"
                raise DivergedError(f"{self._here}: {what} is not finite ({value}); {_REMEDY}")

    @property
    def _here(self) -> str:
        return ", ".join(filter(None, [self.location, f"update {self.updates + 1}"]))

    def _clip(self) -> float:
        norm, value = self._norm()
        if self._max_norm > 0:
            for some in apart(self._named.values()):
                torch.nn.utils.clip_grads_with_norm_(some, self._max_norm, norm)
        return value

    def flat_gradient(self) -> Tensor:
        """The gradient as one vector, a copy; of weights in shards, this rank's part."""
        return torch.cat([local(p.grad).flatten() for p in self._named.values() if p.grad is not None])

    def flat_weights(self) -> Tensor:
        """The trained parameters as one vector, a copy; of weights in shards, this rank's part."""
        return torch.cat([local(p.detach()).flatten() for p in self._named.values()])

    @property
    def dot(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The product of vectors such as `flat_gradient` gives, where each rank has a part; None where all have all."""
        return (lambda one, other: ranks.summed(one @ other)) if self._in_shards else None

    @torch.no_grad()
    def set_weights(self, flat: Tensor) -> None:
        """Write a vector as `flat_weights` gives it into the trained parameters."""
        weights = [local(p) for p in self._named.values()]
        for w, piece in zip(weights, torch.split(flat, [w.numel() for w in weights]), strict=True):
            w.copy_(piece.view_as(w))

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: p.detach() for name, p in self._named.items()}

    def weight_of(self, moment: str) -> Tensor | None:
        """The parameter that a tensor of `optimizer_state()` is about."""
        return self._named.get(moment.rpartition("/")[0])

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's moments and counts, keyed `parameter/what`."""
        return self._optimizer.tensors()

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Restore what `weights()` returned."""
        assert weights.keys() == self._named.keys(), weights.keys() ^ self._named.keys()
        for name, p in self._named.items():
            p.copy_(like(weights[name], p))

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], updates: int) -> None:
        """Restore what `weights()` and `optimizer_state()` returned after `updates` updates."""
        self.load_weights(weights)
        self._optimizer.load(optimizer)
        self.updates = updates
