"""The check at load: the fastest way to score and sample a model that is exact for it.

Families differ in their attention, cache and head (windows, soft caps, sinks, position biases, states). Instead of a
list of families, one small batch of random tokens is scored and decoded in each way and compared with the model's own
forward pass on each row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpost.policy import causality
from rlpost.policy.attention import FLAT, PLAIN, use_attention
from rlpost.policy.decoders import FlatDecoder, decoding_attention, make_decoder
from rlpost.policy.fused_check import why_not_fused
from rlpost.policy.kept import KeptRows
from rlpost.policy.params import Attention
from rlpost.policy.policy import Decoding, Policy
from rlpost.types import Completion, Group, Ids

WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
"""Names of the window size of local layers, in configurations and in layers."""
WINDOW = 5
"""The window during the check: shorter than the rows, or code that ignores a window of 4096 would pass."""
SWITCH = 15
"""Row length at which LongRoPE's factors switch during the check: longer than the prompts, shorter than the rows."""
STEPS = 5
"""Tokens that are decoded."""
EXACT = 1e-4
"""Largest difference of a log-probability that counts as rounding."""
FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    AttributeError,
    LookupError,
    ImportError,
)
"""Exceptions of families that do not run in some way."""


@dataclass(frozen=True)
class Exactness:
    """Result of the check."""

    flat: bool
    """Flat rows with shared prompts give what each completion gives alone."""
    tiled: bool
    """The reproduced head gives the model's own logits."""
    gap: float
    """Largest difference of a log-probability between flat rows and rows alone; inf where flat rows cannot run."""
    reason: str
    """Why flat rows are not used, or empty."""
    single: bool = False
    """Padded rows are not exact either: each row is read in a pass of its own."""
    decoding: Decoding = Decoding.flat
    decoding_reason: str = ""
    """Why decoding is not as fast as scoring would allow, or empty."""
    extends: bool = False
    """Decoding may continue from the cache of earlier rows."""
    extends_reason: str = ""
    """Why it may not, where it decodes flat rows, or empty."""
    fused: bool = False
    """Decoding steps may run on packed weights."""
    fused_reason: str = ""
    """Why they may not, where it decodes flat rows, or empty."""
    switch: int | None = None
    """Longer rows are read with other rotary factors."""
    reach: int | None = None
    """Longer rows cannot be scored exactly."""
    refused: str = ""
    """Why the model cannot be trained at all, or empty."""

    def ways(self) -> dict[str, Any]:
        """Keyword arguments of `Policy`, without `flat`."""
        names = ("tiled", "single", "decoding", "extends", "fused", "switch", "reach")
        return {name: getattr(self, name) for name in names}


def probe_groups(vocabulary: int, max_positions: int, seed: int = 0) -> list[Group]:
    """Two groups of random tokens: several completions of different lengths, and a single one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (n,), generator=generator).tolist())

    def group(prompt: int, lengths: tuple[int, ...]) -> Group:
        return Group(draw(prompt), tuple(Completion(draw(n), (True,) * n) for n in lengths))

    scale = min(1.0, max_positions / 24)
    size = [max(1, int(n * scale)) for n in (13, 9, 5, 11, 7, 8)]
    return [group(size[0], (size[1], size[2], size[3])), group(size[4], (size[5],))]


@torch.no_grad()
def check_exactness(model: Any, tokenizer: Any, wish: Attention = Attention.auto) -> Exactness:
    """Score and decode one small batch in one way after another until one is exact; the model is left set up for it.

    Args:
        model: a transformers causal language model without adapters.
        tokenizer: its tokenizer.
        wish: `padded` passes over flat rows.
    """
    was_training = model.training
    model.eval()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    bare = Policy(model, tokenizer, flat=False)
    groups = probe_groups(bare.vocabulary, limit)
    use_attention(model, PLAIN)
    with short_windows(model):
        try:
            prompt, first = groups[0].prompt.tolist(), groups[0].completions[0].ids.tolist()
            reads = causality.examine(model, prompt, first, bare.vocabulary, limit)
        except FAILURES as error:
            return _refused(f"its forward pass does not run on token ids alone ({_brief(error)})")
        if not reads.logits_TV.isfinite().all():
            return _refused("its logits are not numbers (nan or inf)")
        if not reads.causal:
            return _refused("its attention sees later tokens, so a token's score would depend on the token itself")
        found = _with_lengths(model, bare, groups, reads, wish)
    model.train(was_training)
    return found


def _refused(reason: str) -> Exactness:
    return Exactness(False, False, float("inf"), reason, refused=reason)


def _with_lengths(
    model: Any, bare: Policy, groups: list[Group], found: causality.Causality, wish: Attention
) -> Exactness:
    """Check a causal model on both sides of the length at which it reads rows in another way, if it has one."""
    probe = _Probe(model, bare, groups, found.logits_TV, None)
    if found.length is None:
        return _ways(probe, wish)
    if found.step:
        row = np.concatenate([groups[0].prompt, groups[0].completions[0].ids]).tolist()
        with causality.early_switch(model, SWITCH) as has_switch:
            if has_switch and causality.switches_at(model, row, SWITCH):
                return replace(_ways(_Probe(model, bare, groups, None, SWITCH), wish), switch=found.length)
    return replace(_ways(probe, wish), reach=found.length)


class _Probe:
    """The small batch, and its log-probabilities by plain forward passes."""

    def __init__(
        self, model: Any, bare: Policy, groups: list[Group], first_TV: Tensor | None, switch: int | None
    ) -> None:
        self.model = model
        self.tokenizer, self.known = bare.tokenizer, bare.known
        self.groups = groups
        self.switch = switch
        self.alone = [Group(g.prompt, (c,)) for g in groups for c in g.completions]
        read = [first_TV] if first_TV is not None else []
        rows = [np.concatenate([g.prompt, g.completions[0].ids]).tolist() for g in self.alone]
        read += [self._prefixes(row) for row in rows[len(read) :]]
        self.plain = [
            _chosen(self.known.cut(logits_TV), g.prompt, g.completions[0].ids)
            for logits_TV, g in zip(read, self.alone, strict=True)
        ]
        """[actions] log-probabilities, for each row."""

    def _prefixes(self, row: Sequence[int]) -> Tensor:
        """[T, V] logits after each token of a row, as a row that ends there is read."""
        whole = causality.logits(self.model, row)
        if self.switch is not None and len(row) > self.switch:
            whole[: self.switch] = causality.logits(self.model, row[: self.switch])
        return whole

    def policy(self, **options: Any) -> Policy:
        """The model as a policy with these options of scoring and sampling."""
        return Policy(self.model, self.tokenizer, switch=self.switch, known=self.known, **options)

    def gap(self, found: Tensor, rows: slice = slice(None)) -> float:
        """Largest difference; 0 in half precision where the mean difference is no more than rounding."""
        difference = (found.double() - torch.cat(self.plain[rows]).double()).abs()
        if self.model.dtype in (torch.bfloat16, torch.float16):
            # Single tokens may differ by more.
            return float(difference.max()) if float(difference.mean()) >= 0.05 else 0.0
        return float(difference.max())


def _chosen(logits_TV: Tensor, prompt: Ids, ids: Ids) -> Tensor:
    """[actions] log-probabilities of a completion's tokens."""
    at = torch.tensor(ids, dtype=torch.long, device=logits_TV.device)[:, None]
    return logits_TV[len(prompt) - 1 : -1].log_softmax(-1).gather(1, at)[:, 0]


def _ways(probe: _Probe, wish: Attention) -> Exactness:
    """The fastest exact ways of scoring and of decoding."""
    flat = tiled = single = False
    gap, reason = float("inf"), ""
    if wish is not Attention.padded:
        # Both at once, since both are exact in almost every family; they are told apart only if that fails.
        gap, reason = _flat_gap(probe, tiled=True)
        flat = tiled = not reason
        if not flat:
            gap, reason = _flat_gap(probe, tiled=False)
            flat = not reason
    if not flat:
        single = not _padded_is_exact(probe)
    if not tiled:
        tiled = _tiled(probe, flat)
    kept = KeptRows(1 << 40)
    decoding, why = _decoding(probe, flat, single, tiled, kept)
    extends, no_extending = False, ""
    not_fused = "it does not decode flat rows"
    if decoding is Decoding.flat:
        extends, no_extending = _extending(probe, tiled, kept)
        not_fused = _not_fused(probe)
    return Exactness(flat, tiled, gap, reason, single, decoding, why, extends, no_extending, not not_fused, not_fused)


def _tiled(probe: _Probe, flat: bool) -> bool:
    """Whether the reproduced head gives the model's own logits, on one row."""
    try:
        policy = probe.policy(flat=flat, single=not flat, tiled=True)
        return probe.gap(policy(policy.batch(probe.alone[:1])).logp_N, slice(1)) < EXACT
    except FAILURES:
        # Its trunk or head has another name: the model's own forward computes the logits.
        return False


def _flat_gap(probe: _Probe, tiled: bool) -> tuple[float, str]:
    try:
        use_attention(probe.model, FLAT)
        policy = probe.policy(flat=True, tiled=tiled)
        gap = probe.gap(policy(policy.batch(probe.groups)).logp_N)
    except FAILURES as error:
        # Families that take no layout fail in many ways; all of them mean padded rows.
        return float("inf"), f"it does not run on flat rows ({type(error).__name__})"
    return (gap, "") if gap < EXACT else (gap, f"flat rows differ from plain rows by {gap:.1e}")


def _padded_is_exact(probe: _Probe) -> bool:
    """Whether padded rows are exact under some attention, which is left selected; else the plain one is."""
    quick = ["sdpa"] if getattr(probe.model, "_supports_sdpa", False) else []
    for name in (*quick, PLAIN):
        use_attention(probe.model, name)
        try:
            policy = probe.policy(flat=False, tiled=False)
            if probe.gap(policy(policy.batch(probe.groups)).logp_N) < EXACT:
                return True
        except FAILURES:
            continue
    return False


def _decoding(probe: _Probe, flat: bool, single: bool, tiled: bool, kept: KeptRows) -> tuple[Decoding, str]:
    """The first way of decoding that is exact, and why the faster ones are not; flat rows are kept for `_extending`."""
    why = ""
    for decoding in (Decoding.flat, Decoding.padded) if flat else (Decoding.padded,):
        policy = probe.policy(flat=flat, single=single, tiled=tiled, decoding=decoding)
        try:
            with decoding_attention(policy):
                gap = _decoded_gap(probe, policy, kept)
        except FAILURES as error:
            why = why or f"its cache does not serve {decoding} rows ({type(error).__name__})"
            continue
        if gap < EXACT:
            return decoding, why
        why = why or f"decoding {decoding} rows differs from scoring by {gap:.1e}"
    return Decoding.recomputed, why


def _decoded_gap(probe: _Probe, policy: Policy, kept: KeptRows) -> float:
    """Decode the first tokens of every row; some rows leave early, one of them with its prompt."""
    groups = probe.groups
    rows = [(number, c) for number, g in enumerate(groups) for c in g.completions]
    steps = min(STEPS, *(len(c.ids) for _, c in rows))
    ids_RT = torch.tensor(np.stack([c.ids[:steps] for _, c in rows]), dtype=torch.long, device=policy.device)
    prompts, prompt_of_row = [g.prompt for g in groups], [number for number, _ in rows]
    decoder = make_decoder(policy, prompts, prompt_of_row, steps, kept, keeps=True)
    leaving = {2: 1, 3: len(rows) - 1}  # after so many steps, this row
    live = list(range(len(rows)))
    found: dict[tuple[int, int], Tensor] = {}
    logits = decoder.start()
    for t in range(steps):
        logp = policy.known.cut(logits).double().log_softmax(-1)
        found |= {(row, t): logp[at, ids_RT[row, t]] for at, row in enumerate(live)}
        last, gone = t + 1 == steps, leaving.get(t)
        if isinstance(decoder, FlatDecoder):
            over = [at for at, row in enumerate(live) if row == gone or last]
            decoder.store_rows(over, [rows[live[at]][1].ids[: t + 1] for at in over])
        if last:
            break
        if gone is not None:
            stay = [at for at, row in enumerate(live) if row != gone]
            decoder.keep(torch.tensor(stay, device=policy.device))
            live = [live[at] for at in stay]
        logits = decoder.step(ids_RT[torch.tensor(live, device=policy.device), t])
    if isinstance(decoder, FlatDecoder):
        decoder.close()
    return _largest_gap(probe, found)


def _not_fused(probe: _Probe) -> str:
    """Why decoding steps may not run on packed weights, or empty."""
    if probe.switch is not None:
        return "it reads long rows in another way"
    try:
        return why_not_fused(probe.model, probe.groups)
    except FAILURES as error:
        return f"the fused step does not run on it ({type(error).__name__})"


def _extending(probe: _Probe, tiled: bool, kept: KeptRows) -> tuple[bool, str]:
    """Whether decoding may continue from the rows that were kept, or why not."""
    if probe.switch is not None:
        return False, "it reads long rows in another way"
    try:
        gap = _extended_gap(probe, probe.policy(flat=True, tiled=tiled, decoding=Decoding.flat), kept)
    except FAILURES as error:
        return False, f"its attention does not run on kept rows ({type(error).__name__})"
    return (True, "") if gap < EXACT else (False, f"decoding from kept rows differs from scoring by {gap:.1e}")


def _extended_gap(probe: _Probe, policy: Policy, kept: KeptRows) -> float:
    """Continue every row after its cached tokens: some tokens later, some earlier, and right at their end."""
    rows = [(g.prompt, c.ids) for g in probe.groups for c in g.completions]
    shortest = min(len(ids) for _, ids in rows)
    if shortest < 3:
        return 0.0
    read = min(STEPS, shortest) - 1
    cuts = [min(read + more, len(ids) - 2) for (_, ids), more in zip(rows, (3, -3, 0, 2), strict=True)]
    longer = [[*prompt, *ids[:cut]] for (prompt, ids), cut in zip(rows, cuts, strict=True)]
    decoder = FlatDecoder(policy.causal_lm, longer, range(len(rows)), 1, kept)
    assert kept.reused, "nothing of the prompts was kept"
    logits = decoder.start()
    found: dict[tuple[int, int], Tensor] = {}
    for more in range(2):
        new = [ids[cut + more] for (_, ids), cut in zip(rows, cuts, strict=True)]
        ids_B = torch.tensor(new, device=policy.device)
        logp = policy.known.cut(logits).double().log_softmax(-1)
        found |= {(row, cut + more): logp[row, ids_B[row]] for row, cut in enumerate(cuts)}
        logits = decoder.step(ids_B) if not more else logits
    decoder.close()
    return _largest_gap(probe, found)


def _largest_gap(probe: _Probe, found: Mapping[tuple[int, int], Tensor]) -> float:
    """Largest difference of log-probabilities by (row, token); in half precision by their mean."""
    expected = torch.stack([probe.plain[row][t] for row, t in found]).double()
    difference = (torch.stack(list(found.values())) - expected).abs()
    half = probe.model.dtype in (torch.bfloat16, torch.float16)
    return float(difference.mean()) * EXACT / 0.05 if half else float(difference.max())


@contextmanager
def short_windows(model: Any) -> Iterator[None]:
    """Set every window of the model to WINDOW tokens inside, and restore it afterwards."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    owners = [model.config.get_text_config(), *configs.values(), *model.modules()]
    found = [(o, name, getattr(o, name, None)) for o in owners for name in WINDOWS]
    windows = [(o, name, value) for o, name, value in found if isinstance(value, int)]
    for owner, name, _ in windows:
        setattr(owner, name, WINDOW)
    try:
        yield
    finally:
        for owner, name, value in windows:
            setattr(owner, name, value)


def _brief(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:120]}" if line else type(error).__name__
