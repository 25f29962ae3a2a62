"""The one place with a backward pass and an optimiser step.

An update is cut into shares of the ranks, and those into parts by a token budget; since every weight was counted over
the whole update, the sum of the parts' gradients is the update's gradient however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlpost import ranks
from rlpost.errors import DivergedError
from rlpost.policy.balance import Balance, Load, add
from rlpost.policy.batch import Batch
from rlpost.policy.logprobs import LogitStats
from rlpost.policy.sharded import apart, is_sharded, like, local
from rlpost.train.experience import Experience
from rlpost.train.optimizers import Optimizer
from rlpost.train.params import OptimizerName
from rlpost.types import Group

LossFunction = Callable[[Any, Experience], tuple[Tensor, Mapping[str, Tensor]]]
"""(the model's output on a part, the part) -> (Σ loss·weight, metrics: 1-D tensors averaged over the whole update)."""


_REMEDY = (
    "nothing was changed by it. Lower learning_rate (--allow-change goes on from the last checkpoint with it), "
    "or look at the last rollouts"
)

LOSS = "loss"
BALANCE = "router_balance"
"""The balance loss of a mixture of experts, before its coefficient; 1 would be the number of experts a token has."""
SUMMED = (LOSS, BALANCE)
"""The metrics that are summed over parts and ranks, since their weights were counted over the whole update."""


class Trainable(Protocol):
    """What a learner trains: a policy, or a model with a value head (a critic, a reward model)."""

    @property
    def device(self) -> torch.device:
        """Where its weights live."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """A prompt is computed once for its completions."""
        ...

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        ...

    def layer_matrices(self) -> frozenset[str]:
        """Which of them are matrices of linear layers between embeddings and output head."""
        ...

    def batch(self, groups: Sequence[Group]) -> Batch:
        """The batch that its forward pass takes."""
        ...

    def __call__(self, batch: Batch, *stats: LogitStats) -> Any:
        """Its output on the batch; a policy also takes the statistics to compute."""
        ...

    def backward_done(self) -> None:
        """The backward pass of the last forward pass is over."""
        ...

    def in_turn(self, *, gradient: bool = False) -> AbstractContextManager[None]:
        """Inside, ranks may make different numbers of passes."""
        ...

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Dropout on, as while training, or off."""
        ...


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
            max_tokens_per_microbatch: budget of one forward and backward pass; it never changes a gradient.
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
        self._budget = max_tokens_per_microbatch
        self._whole = whole_groups
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
        meter = Meter()
        self.model.train()
        self._zero_gradients()
        parts = self._parts(experience)
        # A single part is the whole update, so its own expert load is enough.
        alone = len(parts) == 1 and ranks.count() == 1
        whole = None if balance is None or alone else self._whole_load(balance, parts, stats)
        with self.model.in_turn(gradient=True):
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
        self.model.train(False)
        # Those of shards were summed by the backward pass.
        ranks.sum_over_ranks(p.grad for p in self._named.values() if p.grad is not None and not is_sharded(p))
        return {LOSS: 0.0, **meter.averages()}

    @torch.no_grad()
    def _whole_load(self, balance: Balance, parts: Sequence[Experience], stats: LogitStats | None) -> Load:
        """The expert load of the whole update, over all ranks."""
        load = balance.empty(self.model.device)
        with self.model.in_turn():
            for part in parts:
                batch = self.model.batch(part.groups)
                with balance.recording() as recorded:
                    self._output(batch, stats)
                load = add(load, balance.load(recorded, batch))
        chosen_E, tokens = load.chosen_E.clone(), load.tokens.clone()
        ranks.sum_over_ranks([chosen_E, tokens])
        return Load(chosen_E, load.probability_E, tokens)

    @torch.no_grad()
    def evaluate_no_grad(
        self, take: Callable[[Any, Experience], Tensor], experience: Experience, stats: LogitStats | None = None
    ) -> Tensor:
        """`take(output, part)` of every part, concatenated along the first axis; no gradient, on the CPU."""

        def own() -> list[Tensor]:
            taken = []
            with self.model.in_turn():
                for part in self._parts(experience):
                    output = self._output(self.model.batch(part.groups), stats)
                    taken.append(take(output, part.to(self.model.device)).cpu())
            return taken

        pieces = [piece for some in ranks.together(own) for piece in some]
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def measure(self, loss: LossFunction, experience: Experience, stats: LogitStats | None = None) -> dict[str, float]:
        """The metrics of `loss` on the whole experience, without gradient."""
        meter = Meter()
        with torch.no_grad(), self.model.in_turn():
            for part in self._parts(experience):
                output = self._output(self.model.batch(part.groups), stats)
                total, metrics = loss(output, part.to(self.model.device))
                meter.add_part(total, metrics)
        return {LOSS: 0.0, **meter.averages()}

    def _output(self, batch: Batch, stats: LogitStats | None) -> Any:
        """The model's output on a batch; a model with a value head takes no statistics."""
        return self.model(batch) if stats is None else self.model(batch, stats)

    def _parts(self, experience: Experience) -> list[Experience]:
        """Of this rank's share."""
        own = experience.share(ranks.index(), ranks.count(), whole_groups=self._whole)
        return own.cut(self._budget, whole_groups=self._whole, shared_prompts=self.model.shares_prompts)

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

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        """The product of two vectors such as `flat_gradient` gives."""
        own = one @ other
        return ranks.summed(own) if self._in_shards else own

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


class Meter:
    """Means over all elements of an update, whatever parts and ranks they came in."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the elements of each 1-D tensor."""
        for name, x in values.items():
            assert x.ndim == 1, name
            # In float64: statistics such as an explained variance are differences of these means.
            own = x.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + own if name in self._sums else own
            self._counts[name] = self._counts.get(name, 0) + x.numel()

    def add_part(self, total: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Add a part's metrics and its loss, which sums up over parts."""
        self.add({LOSS: total[None], **metrics})

    def averages(self) -> dict[str, float]:
        """Means over the elements of all ranks, and sums for `SUMMED`; a rank may have added nothing."""
        sums = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        own = dict(zip(self._sums, zip(sums, self._counts.values(), strict=True), strict=True))
        everyone = ranks.together(lambda: own)
        table: dict[str, tuple[float, int]] = {}
        for name, (total, count) in (item for one in everyone for item in one.items()):
            before = table.get(name, (0.0, 0))
            table[name] = (before[0] + total, before[1] + count)
        return {name: total if name in SUMMED else total / max(count, 1) for name, (total, count) in table.items()}
