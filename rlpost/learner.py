"""The one place with a backward pass and an optimiser step.

An update is cut into parts by a token budget; since every weight was counted over the whole update, on all
ranks, the sum of the parts' gradients is the update's gradient however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlpost.errors import DivergedError
from rlpost.experience import Experience
from rlpost.policy.policy import Policy, Scores

LossFunction = Callable[[Scores, Experience], tuple[Tensor, Mapping[str, Tensor]]]
"""(scores of a part, the part) -> (Σ loss·weight, metrics: 1-D tensors averaged over all elements of the update)."""


@dataclass(frozen=True)
class Totals:
    """What an update holds on all ranks together."""

    actions: int
    completions: int
    """Those with at least one action."""
    groups: int


class Learner:
    """A policy, its optimiser and its learning rate."""

    def __init__(
        self,
        policy: Policy,
        accelerator: Accelerator,
        *,
        learning_rate: float,
        factor: Callable[[int], float] = lambda _: 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        tokens_per_pass: int = 8192,
        whole_groups: bool = False,
    ) -> None:
        """Prepare to train the parameters of `policy` that require a gradient.

        Args:
            policy: what is trained.
            accelerator: of the whole program; wraps the policy for several processes.
            learning_rate: its peak.
            factor: update number -> factor on it.
            betas: of AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).
            weight_decay: on matrices only; gains and biases are left alone.
            max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
            tokens_per_pass: budget of one forward and backward pass; it never changes a gradient.
            whole_groups: groups are not cut (losses that compare completions).
        """
        self.policy = policy
        self.accelerator = accelerator
        self.updates = 0
        self._peak = learning_rate
        self._factor = factor
        self._max_norm = max_grad_norm
        self._budget = tokens_per_pass
        self._whole = whole_groups
        self._named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        assert self._named, "nothing to train"
        matrices = [p for p in self._named.values() if p.ndim >= 2]
        others = [p for p in self._named.values() if p.ndim < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=betas,
            fused=True,
        )
        self._module: nn.Module = accelerator.prepare_model(policy)

    def totals(self, experience: Experience) -> Totals:
        """Counts of this update over all ranks: what weights divide by."""
        rows = experience.rows
        counts = torch.tensor([rows.actions, rows.learned, len(experience.groups)], device=self.policy.device)
        actions, learned, groups = self.accelerator.reduce(counts, "sum").tolist()
        return Totals(actions, learned, groups)

    def total(self, count: int) -> int:
        """The sum of `count` over all ranks."""
        return int(self.accelerator.reduce(torch.tensor(count, device=self.policy.device), "sum"))

    def update(
        self, loss: LossFunction, experience: Experience, *, temperature: float = 1.0, entropy: bool = False
    ) -> dict[str, float]:
        """One optimiser step on the whole experience; returns its metrics, averaged over all ranks.

        Args:
            loss: of a part of the experience; see `LossFunction`.
            experience: this rank's share of the update.
            temperature: the one the actions were sampled at.
            entropy: score the entropy of every action's distribution too.

        Raises:
            DivergedError: if the gradient is not finite; nothing was changed then.
        """
        meter = Meter()
        self.policy.train()
        self._zero_gradients()
        parts = experience.cut(self._budget, whole_groups=self._whole, shared_prompts=self.policy.shares_prompts)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            meter.add_part(*self._backward(loss, part, temperature, entropy, synchronise=last))
        if not parts:
            self._stand_by(loss, experience, meter, temperature, entropy)
        norm = self._clip()
        rate = self._peak * self._factor(self.updates)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.policy.eval()
        self.updates += 1
        return {**meter.averages(self.accelerator), "grad_norm": norm, "learning_rate": rate}

    def _backward(
        self,
        loss: LossFunction,
        part: Experience,
        temperature: float,
        entropy: bool,
        *,
        synchronise: bool,
        scale: float = 1.0,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        # Ranks may have different numbers of parts: only each rank's last one synchronises.
        together = nullcontext() if synchronise else self.accelerator.no_sync(self._module)
        with together:
            scores = self._module(self.policy.batch(part.groups), temperature, entropy)
            total, metrics = loss(scores, part.to(self.policy.device))
            # Data-parallel wrapping averages over ranks; counts are global already, so the sum is wanted.
            self.accelerator.backward(total * (scale * self.accelerator.num_processes))
        self.policy.backward_done()
        return total.detach(), metrics

    def _stand_by(
        self, loss: LossFunction, experience: Experience, meter: Meter, temperature: float, entropy: bool
    ) -> None:
        """Nothing here adds to the gradient; the step is taken all the same, since momentum goes on."""
        if self.accelerator.num_processes == 1:
            meter.add({"loss": torch.zeros(1)}, sums=True)
            return
        # Other ranks wait for this one's backward pass: it runs one group at weight zero.
        one = experience.first_group()
        total, metrics = self._backward(loss, one, temperature, entropy, synchronise=True, scale=0.0)
        meter.add_part(0.0 * total, {name: x[:0] for name, x in metrics.items()})

    def _zero_gradients(self) -> None:
        # Never None, which the optimiser would pass over: a parameter that no action reaches this time (an expert)
        # follows its momentum, in a resumed process as in one that went on.
        for p in self._named.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()

    def _clip(self) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._named.values() if p.grad is not None])
        if not torch.isfinite(norm):
            name = next((n for n, p in self._named.items() if p.grad is not None and not p.grad.isfinite().all()), "?")
            raise DivergedError(
                f"update {self.updates + 1}: the gradient of {name} is not finite; nothing was changed by it. "
                "Lower learning_rate, or look at the last rollouts; the run resumes from its last checkpoint"
            )
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._named.values(), self._max_norm, norm)
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: p.detach() for name, p in self._named.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's moments and counts, keyed `parameter/what`."""
        state = self._optimizer.state
        return {f"{n}/{key}": v for n, p in self._named.items() for key, v in state.get(p, {}).items()}

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], updates: int) -> None:
        """Take up where `weights()` and `optimizer_state()` were read, after that many updates."""
        assert weights.keys() == self._named.keys(), weights.keys() ^ self._named.keys()
        with torch.no_grad():
            for name, p in self._named.items():
                p.copy_(weights[name])
        state: dict[Tensor, dict[str, Tensor]] = {}
        for key, value in optimizer.items():
            name, what = key.rsplit("/", 1)
            p = self._named[name]
            # The step count too: a fused optimiser wants it where the parameter is.
            state.setdefault(p, {})[what] = value.to(p.device).clone()
        self._optimizer.state.clear()
        self._optimizer.state.update(state)
        self.updates = updates


class Meter:
    """Means over all elements of an update, whatever parts and ranks they came in."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], sums: bool = False) -> None:
        """Add the elements of each 1-D tensor; with `sums`, they add up instead of being averaged."""
        for name, x in values.items():
            assert x.ndim == 1, name
            self._sums[name] = self._sums.get(name, x.new_zeros(())) + x.detach().sum()
            self._counts[name] = 1 if sums else self._counts.get(name, 0) + x.numel()

    def add_part(self, total: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Add a part's loss, which sums up over parts, and its metrics."""
        self.add({"loss": total[None]}, sums=True)
        self.add(metrics)

    def averages(self, accelerator: Accelerator) -> dict[str, float]:
        """The means; every rank must have added the same names."""
        names: Sequence[str] = list(self._sums)
        if not names:
            return {}
        table = torch.stack([self._sums[n].double() for n in names])
        counts = torch.tensor([float(self._counts[n]) for n in names], dtype=torch.float64, device=table.device)
        if accelerator.num_processes > 1:
            table, counts = accelerator.reduce(table, "sum"), accelerator.reduce(counts, "sum")
            counts = torch.where(torch.tensor([n == "loss" for n in names], device=counts.device), 1.0, counts)
        return dict(zip(names, (table / counts.clamp(min=1)).tolist(), strict=True))
