"""Decoders: one token a row at a time, with shared prompts, on padded rows, or without a cache.

The check at load finds which of them is exact for a model (check.py).

Axes: P prompts, B rows (live completions), W prompt columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from rlpost.policy.attention import plain_attention
from rlpost.policy.cache import PromptedLayer, PromptedLayout
from rlpost.policy.fused import FusedModel
from rlpost.policy.heads import reproduced_head
from rlpost.policy.kept import Keeping, KeptRows, Places, kept_layout
from rlpost.policy.layout import FlatLayout
from rlpost.policy.padded import PaddedDecoder, Run
from rlpost.policy.policy import Decoding, Policy
from rlpost.policy.score import passes
from rlpost.policy.tiles import Segment
from rlpost.policy.trunk import Trunk
from rlpost.types import Completion, Group, Tokens

RECOMPUTED_TOKENS = 16384
"""Tokens of one pass of a decoder without a cache."""
PREFILL_TOKENS = 8192
"""Prompt tokens of one flat prefill pass; a longer prompt has a pass of its own."""
NOWHERE: Places = np.zeros(0, np.int64)
"""Cache slots of a prompt of which nothing is kept."""


class Decoder(Protocol):
    """Rows that continue prompts."""

    def start(self) -> Tensor:
        """[B, V] logits of each row's first token."""
        ...

    def step(self, ids_B: Tensor) -> Tensor:
        """[B, V] logits after one more token a row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        ...


class FlatDecoder:
    """Prompts run as one flat row and are cached once, however many rows continue them.

    The beginning of a prompt is not read again if an earlier row left it in the cache.
    """

    LAYOUT, LAYER = PromptedLayout, PromptedLayer

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Tokens],
        prompt_of_row: Sequence[int],
        limit: int,
        kept: KeptRows | None = None,
        *,
        keeps: bool = False,
        fused: FusedModel | None = None,
        trunk: Trunk | None = None,
        blocks: bool = True,
        run: Run | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Prepare to decode at most `limit` tokens a row.

        Args:
            model: a transformers causal language model whose attention follows a layout.
            prompts: token ids.
            prompt_of_row: [B] the prompt each row continues, ascending, none left out.
            limit: tokens.
            kept: cache of earlier rows; None for no such cache.
            keeps: add this decoder's rows to it.
            fused: the model's weights packed for single tokens; None for its own forward.
            trunk: the model's layers to read prompts with; None for its own forward.
            blocks: prompts may be attended in blocks of queries.
            run: gives the model's output; by default the model itself.
            device: where that runs; by default where the model's weights are.
        """
        self.model = model
        self._run = run or model
        self._blocks = blocks
        self._fused = fused
        self._trunk = trunk
        self.device = device or model.get_input_embeddings().weight.device
        self.prompts = prompts
        self.keeping = None if kept is None else Keeping(kept, prompts)
        self._keeps = keeps and kept is not None
        widths = [len(p) for p in prompts]
        self.layout = self.LAYOUT(widths, prompt_of_row, limit, self.device)
        self.cache = Cache(layer_class_to_replicate=partial(self.LAYER, self.layout))
        self._prompt_of_row = np.array(prompt_of_row)
        self.position_B = torch.tensor([widths[p] for p in prompt_of_row], device=self.device)

    @property
    def is_fused(self) -> bool:
        """Whether single tokens are decoded on packed weights."""
        return self._fused is not None

    def start(self) -> Tensor:
        """[B, V] logits of each row's first token."""
        before = self.keeping.before if self.keeping else [NOWHERE] * len(self.prompts)
        rests = [(p[len(b) :], b) for p, b in zip(self.prompts, before, strict=True)]
        last = torch.cat([self._prefill(some) for some in _passes(rests)])
        if self._keeps and self.keeping:
            self.keeping.keep_prompts(self.cache.layers)
        index = torch.from_numpy(self._columns(before)).to(self.device)
        for layer in self.cache.layers:
            read = layer.read()
            keys, values = self.keeping.with_kept(layer, *read) if self.keeping else read
            layer.arrange(keys, values, index)
        self.layout.prefilling = False
        return last[torch.from_numpy(self._prompt_of_row).to(self.device)]

    def step(self, ids_B: Tensor) -> Tensor:
        """[B, V] logits after one more token a row."""
        self.layout.length += 1
        if self._fused is not None:
            logits = self._fused.step(ids_B, self.position_B, self.cache.layers, self.layout)
        else:
            logits = self._forward(ids_B[:, None], self.position_B[:, None], self.layout, 1)[:, -1]
        self.position_B = self.position_B + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        stay = rows.cpu().numpy()
        prompts = self.layout.keep(stay)
        for layer in self.cache.layers:
            layer.keep(rows, prompts)
        self.position_B = self.position_B[rows]
        self._prompt_of_row = self._prompt_of_row[stay]

    def store_rows(self, rows: Sequence[int], ids: Sequence[Tokens]) -> None:
        """Keep the cache of rows that are about to leave, with these ids: a later prompt may begin with them."""
        if self._keeps and self.keeping:
            self.keeping.keep_rows(self.cache.layers, rows, self._prompt_of_row[list(rows)].tolist(), ids)

    def close(self) -> None:
        """Release what is held of the kept rows."""
        if self.keeping:
            self.keeping.close()

    def _columns(self, before: Sequence[Places]) -> NDArray[np.int64]:
        """[P, W] index of each prompt's tokens among those that were read, followed by the kept beginnings in order."""
        kept = np.array([len(b) for b in before])[:, None]
        own = np.array([len(p) for p in self.prompts])[:, None] - kept
        column = np.arange(self.layout.width) - self.layout.width + kept + own
        kept_at = own.sum() + np.cumsum(kept)[:, None] - kept + column
        read_at = np.cumsum(own)[:, None] - own + column - kept
        # Padding may point anywhere.
        found: NDArray[np.int64] = np.maximum(np.where(column < kept, kept_at, read_at), 0)
        return found

    def _prefill(self, rests: Sequence[tuple[Tokens, Places]]) -> Tensor:
        """[P, V] logits after the prompts; keys and values of what was not kept go into the cache."""
        lengths = [len(rest) for rest, _ in rests]
        ids = np.concatenate([np.asarray(rest, np.int64) for rest, _ in rests])
        position = np.concatenate([np.arange(len(b), len(b) + len(rest)) for rest, b in rests])
        ends = np.cumsum(lengths)
        if self.keeping is not None and any(len(b) for _, b in rests):
            layout = kept_layout(lengths, [b for _, b in rests], self.keeping.kept, self.layout, self.device)
        else:
            segments = [Segment(int(end) - n, n) for n, end in zip(lengths, ends, strict=True)]
            layout = FlatLayout(segments, len(ids)).to(self.device)
        layout.in_blocks = self._blocks
        if self._trunk is not None and type(layout) is FlatLayout and self._trunk.serves(layout):
            return self._read(self._trunk, ids, position, layout, ends - 1)
        return self._forward(self._row(ids), self._row(position), layout, self._row(ends - 1)[0])[0]

    def _read(
        self,
        trunk: Trunk,
        ids: NDArray[np.int64],
        position: NDArray[np.int64],
        layout: FlatLayout,
        at: NDArray[np.int64],
    ) -> Tensor:
        """[P, V] logits at some of the tokens, whose keys and values go into the cache."""
        states, cached = trunk.read(torch.from_numpy(ids), torch.from_numpy(position), layout)
        for number, (key, value) in enumerate(cached):
            self.cache.update(key, value, number)
        logits: Tensor = reproduced_head(self.model)(states[torch.from_numpy(at)])
        return logits

    def _forward(self, ids: Tensor, position: Tensor, layout: Any, keep: int | Tensor) -> Tensor:
        logits: Tensor = self._run(
            input_ids=ids,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            layout=layout,
        ).logits
        return logits

    def _row(self, x: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(x)[None].to(self.device)


class RecomputingDecoder:
    """No cache: every step reads the whole rows again, as training does."""

    def __init__(self, policy: Policy, prompts: Sequence[Tokens], prompt_of_row: Sequence[int]) -> None:
        """Prepare to decode; arguments as of `FlatDecoder`."""
        self.policy = policy
        self.prompts = [np.array(p, np.int32) for p in prompts]
        self.rows: list[tuple[int, tuple[int, ...]]] = [(prompt, ()) for prompt in prompt_of_row]
        """The prompt and the tokens so far of each row."""

    def start(self) -> Tensor:
        """[B, V] logits of each row's first token."""
        groups: dict[int, list[Completion]] = {}
        for prompt, ids in self.rows:
            groups.setdefault(prompt, []).append(Completion(ids, (False,) * len(ids)))
        whole = [Group(self.prompts[prompt], tuple(some)) for prompt, some in groups.items()]
        logits = [self.policy.next_logits(self.policy.batch(some)) for some in passes(whole, RECOMPUTED_TOKENS)]
        return torch.cat(logits)

    def step(self, ids_B: Tensor) -> Tensor:
        """[B, V] logits after one more token a row."""
        self.rows = [(p, (*ids, new)) for (p, ids), new in zip(self.rows, ids_B.tolist(), strict=True)]
        return self.start()

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        self.rows = [self.rows[i] for i in rows.tolist()]


Start = Callable[[Sequence[Tokens], Sequence[int], int], Decoder]
"""(prompts, [B] the prompt of each row, limit) -> a decoder of them; arguments as of `FlatDecoder`."""


class SwitchingDecoder:
    """For models that read rows of more than `switch` tokens in another way: a row that passes it is read anew."""

    def __init__(
        self, begin: Start, switch: int, prompts: Sequence[Tokens], prompt_of_row: Sequence[int], limit: int
    ) -> None:
        """Prepare to decode; `begin` makes a decoder of rows on one side of the switch."""
        self._begin = begin
        self._switch = switch
        self._rows = [[int(i) for i in prompts[p]] for p in prompt_of_row]
        """All tokens of each row."""
        self._end = max(map(len, prompts)) + limit
        self._parts: list[tuple[bool, list[int], Decoder]] = []
        """(rows are beyond the switch, their numbers (ascending), their decoder) each."""

    def start(self) -> Tensor:
        """[B, V] logits of each row's first token."""
        sides: dict[bool, list[int]] = {}
        for at, ids in enumerate(self._rows):
            sides.setdefault(len(ids) > self._switch, []).append(at)
        return self._in_order([(rows, self._add(beyond, rows)) for beyond, rows in sides.items()])

    def step(self, ids_B: Tensor) -> Tensor:
        """[B, V] logits after one more token a row."""
        for ids, new in zip(self._rows, ids_B.tolist(), strict=True):
            ids.append(new)
        pieces, crossing = [], []
        for beyond, rows, decoder in self._parts:
            stay = rows if beyond else [r for r in rows if len(self._rows[r]) <= self._switch]
            crossing += [r for r in rows if r not in set(stay)]
            if stay and len(stay) < len(rows):
                decoder.keep(torch.tensor([i for i, r in enumerate(rows) if r in set(stay)], device=ids_B.device))
            rows[:] = stay
            if stay:
                pieces.append((stay, decoder.step(ids_B[torch.tensor(stay, device=ids_B.device)])))
        if crossing:
            pieces.append((crossing, self._add(True, crossing)))
        self._parts = [part for part in self._parts if part[1]]
        return self._in_order(pieces)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        number = {old: new for new, old in enumerate(rows.tolist())}
        for _, own, decoder in self._parts:
            stay = [i for i, r in enumerate(own) if r in number]
            if stay and len(stay) < len(own):
                decoder.keep(torch.tensor(stay, device=rows.device))
            own[:] = [number[own[i]] for i in stay]
        self._parts = [part for part in self._parts if part[1]]
        self._rows = [self._rows[i] for i in rows.tolist()]

    def _add(self, beyond: bool, rows: list[int]) -> Tensor:
        """Add a decoder that continues these rows; [rows, V] its first logits."""
        whole = [tuple(self._rows[r]) for r in rows]
        # A decoder wants the rows of one prompt side by side.
        distinct = list(dict.fromkeys(whole))
        order = sorted(range(len(rows)), key=lambda i: distinct.index(whole[i]))
        ordered = [rows[i] for i in order]
        room = max(1, self._end - min(map(len, distinct)))
        decoder = self._begin(distinct, [distinct.index(whole[i]) for i in order], room)
        self._parts.append((beyond, ordered, decoder))
        return decoder.start()[torch.tensor(np.argsort(order))]

    def _in_order(self, pieces: list[tuple[list[int], Tensor]]) -> Tensor:
        rows = np.argsort([r for some, _ in pieces for r in some])
        logits = torch.cat([x for _, x in pieces])
        return logits[torch.from_numpy(rows).to(logits.device)]


def make_decoder(
    policy: Policy,
    prompts: Sequence[Tokens],
    prompt_of_row: Sequence[int],
    limit: int,
    kept: KeptRows | None = None,
    *,
    keeps: bool = False,
    fused: FusedModel | None = None,
) -> Decoder:
    """A decoder that is exact for this policy; arguments as of `FlatDecoder`.

    Only flat decoding uses `kept`, and only if that is exact for the model; other decoders read whole prompts.
    """
    if policy.decoding is Decoding.recomputed:
        return RecomputingDecoder(policy, prompts, prompt_of_row)
    begin: Start = partial(PaddedDecoder, policy.causal_lm, run=policy.run, device=policy.device)
    if policy.decoding is Decoding.flat:
        trunk = policy.written_out() if fused is not None and policy.tiled and policy.switch is None else None
        flat = partial(
            FlatDecoder,
            policy.causal_lm,
            fused=fused,
            trunk=trunk,
            blocks=policy.blocks,
            run=policy.run,
            device=policy.device,
        )
        begin = flat
    longest = max(map(len, prompts)) + limit
    if policy.switch is not None and longest > policy.switch:
        if min(map(len, prompts)) > policy.switch:
            return begin(prompts, prompt_of_row, limit)
        return SwitchingDecoder(begin, policy.switch, prompts, prompt_of_row, limit)
    if policy.decoding is Decoding.flat and policy.extends:
        begin = partial(flat, kept=kept, keeps=keeps)
    return begin(prompts, prompt_of_row, limit)


def decoding_attention(policy: Policy) -> AbstractContextManager[None]:
    """Switch to the decoder's attention inside, where it is not the one used for scoring."""
    if policy.flat and policy.decoding is Decoding.padded:
        return plain_attention(policy.causal_lm)
    return nullcontext()


def _passes(rests: Sequence[tuple[Tokens, Places]]) -> Iterator[list[tuple[Tokens, Places]]]:
    """(rest to read, kept slots) of prompts, in order, in lists within the token budget of a pass."""
    bunch: list[tuple[Tokens, Places]] = []
    tokens = 0
    for rest in rests:
        if bunch and tokens + len(rest[0]) > PREFILL_TOKENS:
            yield bunch
            bunch, tokens = [], 0
        bunch.append(rest)
        tokens += len(rest[0])
    yield bunch
