"""The one place with a backward pass and an optimiser step.

An update is cut into shares of the ranks, and those into parts by a token budget; since every weight was counted over
the whole update, the sum of the parts' gradients is the update's gradient however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
from rlpost.train.meter import BALANCE, LOSS, Meter, Sums, averages, by_term
from rlpost.train.microbatches import Microbatches
from rlpost.train.optimizers import Optimizer
from rlpost.train.params import OptimizerName
from rlpost.train.random_state import random_state, set_random_state
from rlpost.train.trainable import Trainable
from rlpost.unexpected import of_memory

T = TypeVar("T")
LossFunction = Callable[[Any, Experience], tuple[Tensor, Mapping[str, Tensor]]]
"""(the model's output on a part, the part) -> (Σ loss·weight, metrics: 1-D tensors averaged over the whole update)."""

Stats = LogitStats | Callable[[Experience], LogitStats]
"""What a policy's forward pass computes for each action; or that of each part of an experience."""


@dataclass(frozen=True)
class Term:
    """A loss of an experience: all that an update minimises, or a part of it beside others."""

    loss: LossFunction
    experience: Experience
    stats: Stats | None = None
    """What the forward pass computes; by default the log-probability alone."""
    factor: float = 1.0
    """What its gradient is multiplied by; at 0 nothing of it is computed."""
    name: str = ""
    """Its metrics are called NAME/METRIC; those of a term without a name as they are."""


Parts = Sequence[tuple[int, Experience]]
"""What one process computes of some experiences, a pass each: the number of the experience, and a part of it."""


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

    def update(self, loss: LossFunction, experience: Experience, stats: Stats | None = None) -> dict[str, float]:
        """One optimiser step on the whole experience; returns its metrics.

        Args:
            loss: of a part of the experience; see `LossFunction`.
            experience: the update, the same on all ranks.
            stats: what the forward pass computes; by default the log-probability alone.

        Raises:
            DivergedError: if the gradient or a metric is not finite; nothing was changed then.
            OutOfMemoryError: if a pass of one completion does not fit into memory; nothing was changed then.
        """
        return self.update_on([Term(loss, experience, stats)])

    def update_on(self, terms: Sequence[Term]) -> dict[str, float]:
        """One optimiser step on Σ factor·loss of several terms, each of an experience of its own; as `update`.

        Metrics are those of each term, and `loss`, their sum.
        """
        terms = [term for term in terms if term.factor]
        metrics = self._gradient(terms, self._balance)
        norm = self._clip()
        self.must_be_finite(metrics)
        rate = self.rate
        self._optimizer.step(rate)
        self.updates += 1
        for term in terms:
            rows = term.experience.rows
            self.trained_tokens += rows.actions
            self.trained_samples += rows.learned
        return {**metrics, "grad_norm": norm, "learning_rate": rate}

    def gradient(self, loss: LossFunction, experience: Experience, stats: Stats | None = None) -> dict[str, float]:
        """The update's gradient, summed over parts and ranks, left in the parameters; returns its metrics."""
        return self._gradient([Term(loss, experience, stats)], None)

    def _gradient(self, terms: Sequence[Term], balance: Balance | None) -> dict[str, float]:
        def attempt() -> list[dict[str, Sums]] | None:
            whole = None
            # A single part is the whole update, so its own expert load is enough.
            if balance is not None and (ranks.count() > 1 or len(self._parts(experiences)) > 1):
                whole = self._whole_load(balance, terms)
                if whole is None:
                    return None
            return self._attempt(experiences, partial(self._passes, terms, balance=balance, whole=whole), gradient=True)

        experiences = [term.experience for term in terms]

        self.model.train()
        everyone = self._until_it_fits(attempt)
        self.model.train(False)
        # Those of shards were summed by the backward pass.
        ranks.sum_over_ranks(p.grad for p in self._named.values() if p.grad is not None and not is_sharded(p))
        return by_term({term.name: term.factor for term in terms}, everyone)

    def _passes(
        self, terms: Sequence[Term], parts: Parts, *, balance: Balance | None, whole: Load | None
    ) -> dict[str, Sums]:
        """Forward and backward over this rank's parts; their gradients add up in the parameters. Sums by term."""
        meters: dict[str, Meter] = {"": Meter()}
        self._zero_gradients()
        for number, part in parts:
            term = terms[number]
            batch = self.model.batch(part.groups)
            with balance.recording() if balance is not None else nullcontext() as recorded:
                output = self._output(batch, part, term.stats)
            total, metrics = term.loss(output, part.to(self.model.device))
            minimised = total if term.factor == 1 else term.factor * total
            if balance is not None and recorded is not None:
                load = balance.load(recorded, batch)
                extra = load.loss_within(whole or load)
                meters[""].add({BALANCE: extra[None]})
                (minimised + balance.coefficient * extra).backward()  # type: ignore[no-untyped-call]
            else:
                minimised.backward()  # type: ignore[no-untyped-call]
            self.model.backward_done()
            meters.setdefault(term.name, Meter()).add_part(total.detach(), metrics)
        return {name: meter.sums() for name, meter in meters.items()}

    def _parts(self, experiences: Sequence[Experience]) -> Parts:
        """Those of this rank."""
        return [(i, part) for i, one in enumerate(experiences) for part in self._microbatches.parts(one)]

    @torch.no_grad()
    def _whole_load(self, balance: Balance, terms: Sequence[Term]) -> Load | None:
        """The expert load of the whole update, over all ranks; None if memory was short."""

        load = balance.empty(self.model.device)

        def own(parts: Parts) -> None:
            nonlocal load
            for number, part in parts:
                batch = self.model.batch(part.groups)
                with balance.recording() as recorded:
                    self._output(batch, part, terms[number].stats)
                load = add(load, balance.load(recorded, batch))

        if self._attempt([term.experience for term in terms], own) is None:
            return None
        chosen_E, tokens = load.chosen_E.clone(), load.tokens.clone()
        ranks.sum_over_ranks([chosen_E, tokens])
        return Load(chosen_E, load.probability_E, tokens)

    @torch.no_grad()
    def evaluate_no_grad(
        self, take: Callable[[Any, Experience], Tensor], experience: Experience, stats: Stats | None = None
    ) -> Tensor:
        """`take(output, part)` of every part, concatenated along the first axis; no gradient, on the CPU."""

        def own(parts: Parts) -> list[Tensor]:
            taken = []
            for _, part in parts:
                output = self._output(self.model.batch(part.groups), part, stats)
                taken.append(take(output, part.to(self.model.device)).cpu())
            return taken

        everyone = self._until_it_fits(lambda: self._attempt([experience], own))
        pieces = [piece for some in everyone for piece in some]
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def measure(self, loss: LossFunction, experience: Experience, stats: Stats | None = None) -> dict[str, float]:
        """The metrics of `loss` on the whole experience, without gradient."""

        @torch.no_grad()
        def own(parts: Parts) -> Sums:
            meter = Meter()
            for _, part in parts:
                output = self._output(self.model.batch(part.groups), part, stats)
                total, metrics = loss(output, part.to(self.model.device))
                meter.add_part(total, metrics)
            return meter.sums()

        return {LOSS: 0.0, **averages(self._until_it_fits(lambda: self._attempt([experience], own)))}

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
        self, experiences: Sequence[Experience], work: Callable[[Parts], T], *, gradient: bool = False
    ) -> list[T] | None:
        """What `work` returns on each rank of its parts; None if one ran out of memory, and the budget is lower now.

        `work` sends nothing to other ranks: it may end early on one of them.
        """

        def tried() -> tuple[T] | None:
            try:
                with self.model.in_turn(gradient=gradient):
                    return (work(self._parts(experiences)),)
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
        self._microbatches.lower(experiences, short, self._here)
        return None

    def _output(self, batch: Batch, part: Experience, stats: Stats | None) -> Any:
        """The model's output on a part's batch; a model with a value head takes no statistics."""
        if stats is None:
            return self.model(batch)
        return self.model(batch, stats(part) if callable(stats) else stats)

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
