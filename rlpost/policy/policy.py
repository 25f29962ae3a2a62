"""The policy as one module whose forward takes a batch: the only thing that calls into the model it holds.

Calling the inner model of a wrapped module would silently skip gradient synchronisation, so stages, the learner and
the engine only see this class.

Axes: N action tokens, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.objectives.ragged import widen
from rlpost.policy import adapters
from rlpost.policy.batch import (
    Batch,
    Build,
    Pass,
    flat_passes,
    laid_out,
    padded_passes,
    single_passes,
    switched_batch,
)
from rlpost.policy.heads import reproduced_head
from rlpost.policy.logprobs import LOGPROBS, Distributions, Head, LogitStats, PolicyOutput, score
from rlpost.policy.recognise import NotRecognised, layer_matrices
from rlpost.policy.segment_attention import TILES, Kernels
from rlpost.policy.sharded import Sharding
from rlpost.policy.trunk import Trunk
from rlpost.policy.vocabulary import Vocabulary
from rlpost.types import Group


class Decoding(StrEnum):
    """How a policy continues prompts token by token."""

    flat = "flat"
    """With each prompt in the cache once."""
    padded = "padded"
    """On left-padded rows, with the model's own cache."""
    recomputed = "recomputed"
    """Without a cache: every step reads the whole row again, as scoring does."""


class Policy(nn.Module):
    """A causal language model, with or without adapters, and its tokenizer."""

    sharding: Sharding | None = None
    """Of its weights over ranks (sharded.py); None while each has all of them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        flat: bool,
        bfloat16: bool = False,
        tiled: bool = True,
        base: str = "",
        revision: str | None = None,
        single: bool = False,
        decoding: Decoding | None = None,
        extends: bool = True,
        fused: bool = False,
        trunk: bool = False,
        blocks: bool = True,
        kernels: Kernels = TILES,
        switch: int | None = None,
        reach: int | None = None,
        known: Vocabulary | None = None,
    ) -> None:
        """Hold `model`; use `load.load_policy` to get one that has been checked.

        Args:
            model: a transformers causal language model or a peft model around one.
            tokenizer: its tokenizer.
            flat: batches are flat rows with shared prompts, else plain padded rows.
            bfloat16: run under autocast.
            tiled: the head may run on tiles of hidden states; else the model's own forward computes all logits.
            base: the folder or hub name of the model without adapters.
            revision: of that hub name.
            single: each row is read in a pass of its own, since padding changes its logits.
            decoding: by default flat where rows are, else padded.
            extends: flat decoding may continue from the cache of earlier rows.
            fused: single tokens may be decoded on packed weights (fused.py).
            trunk: flat rows may be read layer by layer in one operation each (trunk.py).
            blocks: attention over flat rows may be computed in blocks of queries (tile_attention.py).
            kernels: those that may compute attention over flat rows where segments lie (segment_attention.py).
            switch: longer rows are read with other rotary factors (LongRoPE's long ones).
            reach: the longest row whose logits agree with those of its prefixes, if the model has more positions.
            known: the tokenizer's tokens; by default they are read from it.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.flat = flat
        self.in_bfloat16 = bfloat16
        self.tiled = tiled
        self.base = base
        self.revision = revision
        self.single = single
        self.decoding = decoding or (Decoding.flat if flat else Decoding.padded)
        self.extends = extends and self.decoding is Decoding.flat
        self.fused = fused and self.decoding is Decoding.flat
        self.trunk, self.blocks, self.kernels = trunk and flat, blocks, kernels
        self.switch = switch
        self._reach = reach
        self.end_ids = end_ids(self.causal_lm, tokenizer)
        self.known = known or Vocabulary(tokenizer, int(self.causal_lm.get_output_embeddings().weight.shape[0]))
        self._awaiting_backward = False

    def around(self, model: Any, *, bfloat16: bool) -> Policy:
        """A policy of another model of the same family, with the same settings."""
        return Policy(
            model,
            self.tokenizer,
            flat=self.flat,
            bfloat16=bfloat16,
            tiled=self.tiled,
            base=self.base,
            revision=self.revision,
            single=self.single,
            decoding=self.decoding,
            extends=self.extends,
            fused=self.fused,
            trunk=self.trunk,
            blocks=self.blocks,
            kernels=self.kernels,
            switch=self.switch,
            reach=self._reach,
            known=self.known,
        )

    @property
    def causal_lm(self) -> Any:
        """The transformers model, without peft's wrapping (its layers carry the adapters)."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """True with LoRA, False for full fine-tuning."""
        return adapters.are_in(self.model)

    @property
    def device(self) -> torch.device:
        """Where its passes run."""
        if self.sharding is not None:
            return self.sharding.device
        parameter: Tensor = next(self.model.parameters())
        return parameter.device

    @property
    def vocabulary(self) -> int:
        """Number of tokens the policy can write: those of the tokenizer."""
        return self.known.size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest row that the model has positions for."""
        limit = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return min(int(limit) if limit else 1 << 30, self._reach or 1 << 30)

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for its completions; under dropout that would not be the same."""
        return self.flat and not (
            self.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())
        )

    def batch(self, groups: Sequence[Group]) -> Batch:
        """The batch that `forward` takes, on the policy's device."""
        build: Build = single_passes if self.single else padded_passes
        if self.flat:
            build = partial(flat_passes, share=self.shares_prompts, blocks=self.blocks, kernels=self.kernels)
        longest = (
            0
            if self.switch is None
            else max((len(g.prompt) + len(c.ids) for g in groups for c in g.completions), default=0)
        )
        if self.switch is not None and longest > self.switch:
            return switched_batch(groups, build, self.switch).to(self.device)
        return laid_out(groups, build).to(self.device)

    def trained(self) -> dict[str, nn.Parameter]:
        """The policy's trainable parameters by name, without those of a critic's adapter on the same base."""
        named = {n: p for n, p in self.named_parameters() if p.requires_grad}
        return {n: p for n, p in named.items() if not self.has_adapter or adapters.belongs(n, adapters.POLICY)}

    def layer_matrices(self) -> frozenset[str]:
        """Which of `trained()` are matrices of linear layers between embeddings and output head."""
        return layer_matrices(self.causal_lm, self.trained())

    def forward(self, batch: Batch, stats: LogitStats = LOGPROBS) -> PolicyOutput:
        """Score every action of the batch.

        Args:
            batch: from `self.batch`.
            stats: what to compute for an action besides its log-probability, and the temperature it was sampled at.
        """
        # Before this pass, since the teacher may be another adapter of the same model.
        teacher = stats.loss.teacher.distributions(batch) if stats.loss and stats.loss.teacher else None
        # A pass without gradient does not clear the flag of an earlier pass whose backward is still to come.
        self._awaiting_backward = self._awaiting_backward or torch.is_grad_enabled()
        hidden_ND, head = self._scored_states(batch, batch.before_N)
        with self.precision():
            return score(hidden_ND, head, self.vocabulary, batch.target_N, stats, teacher, compiled=self.blocks)

    @property
    def in_shards(self) -> bool:
        """Every pass gathers weights from all ranks."""
        return self.sharding is not None

    def in_turn(self, *, gradient: bool = False) -> AbstractContextManager[None]:
        """Inside, ranks may make different numbers of passes, all with a gradient or all without."""
        return nullcontext() if self.sharding is None else self.sharding.in_turn(gradient)

    def run(self, **inputs: Any) -> Any:
        """The transformers model's own output, as decoders ask for it."""
        return self.causal_lm(**inputs)

    def distributions(self, batch: Batch) -> Distributions:
        """For some of the batch's actions: [n, V] log-probabilities of the whole vocabulary, without gradient."""
        assert self.sharding is None, "the head is used after the pass"
        with torch.no_grad():
            hidden_ND, head = self._scored_states(batch, batch.before_N)

        @torch.no_grad()
        def some(where: slice) -> Tensor:
            with self.precision():
                return widen(head(hidden_ND[where])).log_softmax(-1)

        return some

    def states(self, batch: Batch, adapter: str | None = adapters.POLICY) -> Tensor:
        """[all passes' B·T, D] the last hidden state after every token, in at least float32, with `adapter` active.

        With gradients on, the adapter stays active until `backward_done`: checkpointing runs parts of this again.
        """
        assert not (self._awaiting_backward and torch.is_grad_enabled()), "a forward pass still waits for its backward"
        if torch.is_grad_enabled():
            self._awaiting_backward = True
            if self.has_adapter:
                adapters.select(self.model, adapter)
            return self._states(batch)
        with adapters.acting(self.model, adapter) if self.has_adapter else nullcontext():
            return self._states(batch)

    def _states(self, batch: Batch) -> Tensor:
        with self.precision():
            return widen(self._hidden(batch))

    def _hidden(self, batch: Batch) -> Tensor:
        """[all passes' B·T, D]."""
        trunk = self.written_out()
        found = [self._states_of(p, trunk) for p in batch.passes]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _states_of(self, p: Pass, trunk: Trunk | None) -> Tensor:
        """[B·T, D] of one pass."""
        if trunk is not None and p.layout is not None and trunk.serves(p.layout):
            return trunk.states(p.ids_BT[0], p.position_BT[0], p.layout)
        states: Tensor = self.causal_lm.base_model(**_inputs(p)).last_hidden_state
        return states.flatten(0, 1)

    def written_out(self) -> Trunk | None:
        """The model's layers with the adapters that are active now, if they are exact in that way."""
        sharded = self.sharding is not None
        if not self.trunk or sharded or self.device.type != "cpu" or self.causal_lm.is_activation_checkpointing:
            return None
        try:
            return Trunk(self.causal_lm, bfloat16=self.in_bfloat16)
        except NotRecognised:  # an adapter with dropout, for example
            return None

    def next_logits(self, batch: Batch) -> Tensor:
        """[S, V] logits of what would follow each completion."""
        hidden_SD, head = self._scored_states(batch, batch.after_S)
        with self.precision():
            return head(hidden_SD)

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.in_bfloat16 else nullcontext()

    @contextmanager
    def acting_as(self, adapter: str | None) -> Iterator[None]:
        """Another adapter is active inside (None: the bare base), the policy's again afterwards.

        Under gradient checkpointing, backward runs parts of forward again and must find the same adapter active;
        so a switch between a forward pass and its backward is a bug.
        """
        assert self.has_adapter, "a fully fine-tuned model has no adapter to switch"
        assert not self._awaiting_backward, "an adapter switched between a forward pass and its backward"
        with adapters.acting(self.model, adapter):
            yield
            assert not self._awaiting_backward, "a forward pass under another adapter needs no gradient: use no_grad"

    def backward_done(self) -> None:
        """Adapters may be switched again: the pending backward pass is over, or will never come."""
        self._awaiting_backward = False
        if self.has_adapter:
            adapters.select(self.model, adapters.POLICY)

    def _scored_states(self, batch: Batch, where_N: Tensor) -> tuple[Tensor, Head]:
        """Hidden states at some positions and the head for them; or logits, and a head that only cuts them."""
        with self.precision():
            if self.tiled:
                whole = reproduced_head(self.causal_lm)
                return self._hidden(batch)[where_N], lambda hidden: self.known.cut(whole(hidden))
            if len(batch.passes) == 1:
                return self._logits(batch.passes[0], where_N), self.known.cut
            order, pieces, first = [], [], 0
            for p in batch.passes:
                here = ((where_N >= first) & (where_N < first + p.ids_BT.numel())).nonzero()[:, 0]
                pieces.append(self._logits(p, where_N[here] - first))
                order.append(here)
                first += p.ids_BT.numel()
            return torch.cat(pieces)[torch.cat(order).argsort()], self.known.cut

    def _logits(self, p: Pass, where_N: Tensor) -> Tensor:
        """[N, V] by the model's own forward."""
        if p.layout is not None:
            logits: Tensor = self.causal_lm(**_inputs(p), logits_to_keep=where_N).logits[0]
        else:
            logits = self.causal_lm(**_inputs(p)).logits.flatten(0, 1)[where_N]
        return logits


def _inputs(p: Pass) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": p.ids_BT, "use_cache": False}
    if p.layout is not None:
        return inputs | {"position_ids": p.position_BT, "layout": p.layout}
    return inputs if p.mask_BT is None else inputs | {"attention_mask": p.mask_BT}


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's end token first, then what the generation config adds."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    found = [i for i in (tokenizer.eos_token_id, *more) if i is not None]
    return tuple(dict.fromkeys(int(i) for i in found))
