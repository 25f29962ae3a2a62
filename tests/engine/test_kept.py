"""Requests of all kinds in one call, and what is kept of rows for prompts that begin as they do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from engines import asked, local
from families import FAMILIES, EndTokenOnly, tiny
from stubs import policy_of, tiny_policy

from rlpost.engine import batch
from rlpost.engine import local as engine_module
from rlpost.engine.params import Sampling
from rlpost.engine.sampling import greedy
from rlpost.policy import kept
from rlpost.policy.check import check_exactness
from rlpost.policy.kept import KeptRows
from rlpost.policy.layout import FlatLayout
from rlpost.policy.load import choose_rows
from rlpost.policy.params import Attention
from rlpost.types import Request

PROMPTS = [[5, 9, 3, 8, 30, 31, 2, 7, 7, 12, 1], [4], [11, 12, 13, 60], [11, 12, 13, 61, 5]]
LONG = Sampling(max_new_tokens=16)
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4
"""Of a tiny Llama: keys and values of 2 layers of 2 heads of 8 numbers in float32."""


def same(a, b) -> bool:
    return [x.ids.tolist() for x in a] == [x.ids.tolist() for x in b] and all(
        np.allclose(x.logprobs, y.logprobs, atol=1e-5) and x.finish == y.finish for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("make", [tiny_policy, lambda **more: policy_of(tiny("gpt2"), flat=False, **more)])
def test_requests_that_differ_in_everything_are_what_each_is_alone(make):
    policy = make(eos=3)
    ways = [LONG, greedy(Sampling()), Sampling(temperature=0.5, top_k=5), Sampling(stop=["h", "cc"])]
    requests = [
        Request(p, n, way, seed, limit)
        for p, n, way, seed, limit in zip(PROMPTS, (3, 1, 2, 4), ways, (1, 2, 3, 4), (16, 3, 9, 12), strict=True)
    ]
    together = local(policy).generate(requests)
    assert all(same(a, b) for a, b in zip(together, [local(policy).generate([r])[0] for r in requests], strict=True))
    assert [max(len(c.ids) for c in some) for some in together] == [16, 3, 9, 12]
    few_rows = local(policy, rows_at_once=3).generate(requests)
    assert all(same(a, b) for a, b in zip(together, few_rows, strict=True))
    later = local(policy).generate([Request(PROMPTS[0], 2, LONG, 1, first=1)])
    assert same(later[0], together[0][1:])


def test_rows_of_one_sampling_may_stand_apart():
    policy = tiny_policy()
    warm, cold = Sampling(max_new_tokens=3), Sampling(max_new_tokens=3, temperature=0.3)
    # In the batch they stand in this order, by length: the first and the last are drawn together.
    requests = [
        Request([5] * length, 1, way, length) for length, way in zip(range(1, 5), (warm, cold, cold, warm), strict=True)
    ]
    together = local(policy).generate(requests)
    assert all(same(a, local(policy).generate([r])[0]) for a, r in zip(together, requests, strict=True))


def test_equal_prompts_are_computed_once_wherever_they_stand(monkeypatch):
    policy, seen = tiny_policy(), []
    prompts = [[5, 6], [7, 8], [5, 6], [7, 8], [1]]
    make = engine_module.make_decoder

    def counting(policy, own, *rest, **more):
        seen.append([p.tolist() for p in own])
        return make(policy, own, *rest, **more)

    monkeypatch.setattr(engine_module, "make_decoder", counting)
    together = local(policy).generate(asked(prompts, 2, LONG, range(5)))
    assert seen == [[[1], [5, 6], [7, 8]]]
    alone = [local(policy).generate(asked([p], 2, LONG, [seed]))[0] for seed, p in enumerate(prompts)]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


def test_a_row_that_has_filled_the_models_positions_leaves_before_the_others():
    policy = tiny_policy("gpt2")
    room = policy.max_positions - len(PROMPTS[0])
    # 4 of 5 rows go on: without a row that must leave, none would yet.
    assert batch.LEAVE_AT < 4 / 5
    requests = [
        Request([5] * (policy.max_positions - 2), 1, LONG, 1, limit=2),
        Request(PROMPTS[0], 4, LONG, 2, limit=room),
    ]
    short, long = local(policy).generate(requests)
    assert len(short[0].ids) == 2
    assert {len(c.ids) for c in long} == {room}


def going_on(engine, requests):
    """Prompts that go on from what the engine gives: with a reply, from its middle, and from nothing of it."""
    kept_ones = [Request(r.prompt, r.n, r.sampling, r.seed, keep=True) for r in requests]
    return [
        [*r.prompt.tolist(), *c.ids.tolist()[:cut], *reply]
        for r, some in zip(requests, engine.generate(kept_ones), strict=True)
        for c, cut, reply in zip(some, (99, 4, 0), ([8, 9, 10], [], [17]), strict=True)
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prompts_that_go_on_from_kept_rows_get_what_they_would_get_without(family):
    policy = tiny_policy(family, eos=3)
    engine, bare = local(policy), local(policy, cache_gib=0)
    prompts = going_on(engine, asked(PROMPTS, 3, LONG, [1, 2, 3, 4]))
    read = engine.kept.missed
    requests = asked(prompts, 2, LONG.model_copy(update={"max_new_tokens": 9}), range(len(prompts)))
    found, expected = engine.generate(requests), bare.generate(requests)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    distinct = {tuple(p) for p in prompts}
    assert engine.kept.reused > 0.6 * sum(map(len, distinct))
    assert engine.kept.missed - read + engine.kept.reused == sum(map(len, distinct)) + sum(map(len, PROMPTS)) - read
    assert bare.kept.bytes == bare.kept.reused == 0


def test_what_a_row_draws_beyond_its_end_is_not_kept():
    engine = local(tiny_policy())
    # The first row ends early, and leaves only with the others.
    requests = [
        Request(PROMPTS[0], 1, LONG, 1, limit=4, keep=True),
        Request(PROMPTS[1], 7, LONG, 2, limit=12, keep=True),
    ]
    engine.generate(requests)
    # Each prompt, and of its rows all that was read: nothing follows the last token of the long ones.
    tokens = (len(PROMPTS[0]) + 4) + (len(PROMPTS[1]) + 7 * 11)
    assert engine.kept.bytes == TOKEN_BYTES * tokens


def test_a_third_turn_reuses_what_the_second_has_added(monkeypatch):
    policy = tiny_policy()
    engine, bare = local(policy), local(policy, cache_gib=0)
    monkeypatch.setattr(kept, "FIRST_PLACES", 4)  # the pools grow on the way
    prompts = [list(p) for p in PROMPTS]
    for turn in range(4):
        requests = [Request(p, 1, LONG, seed + 10 * turn, limit=5, keep=True) for seed, p in enumerate(prompts)]
        before, reused = [len(p) for p in prompts], engine.kept.reused
        found, expected = engine.generate(requests), bare.generate(requests)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        if turn:
            # All but the last token of the turn before, which nothing was read after, and the reply.
            assert engine.kept.reused - reused >= sum(n - 3 for n in before)
        prompts = [[*p, *c.ids.tolist(), 20 + turn, 21] for p, (c,) in zip(prompts, found, strict=True)]


def test_what_is_kept_ends_when_weights_are_updated():
    policy = tiny_policy()
    engine = local(policy)
    prompts = going_on(engine, asked(PROMPTS, 3, LONG, [1, 2, 3, 4]))
    assert engine.kept.bytes > 0
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)
    engine.update_weights(policy, 1)
    assert engine.kept.bytes == 0
    requests = asked(prompts, 1, LONG, range(len(prompts)))
    found, fresh = engine.generate(requests), local(policy).generate(requests)
    assert engine.kept.reused == 0
    assert [[c.logprobs.tolist() for c in some] for some in found] == [
        [c.logprobs.tolist() for c in some] for some in fresh
    ]
    going_on(engine, asked(PROMPTS, 3, LONG, [1, 2, 3, 4]))
    assert engine.kept.bytes > 0
    # Nobody says that these will be gone on from: training may have the memory.
    engine.generate(requests)
    assert engine.kept.bytes == 0
    going_on(engine, asked(PROMPTS, 3, LONG, [1, 2, 3, 4]))
    engine.close()
    assert engine.kept.bytes == 0


@pytest.mark.parametrize("tokens", [0, 7, 60, 150])
def test_memory_is_never_more_than_its_limit_and_changes_no_completion(tokens):
    policy = tiny_policy()
    engine, bare = local(policy, cache_gib=tokens * TOKEN_BYTES / 2**30), local(policy, cache_gib=0)
    prompts = [list(p) for p in PROMPTS]
    most = 0
    for turn in range(3):
        requests = [Request(p, 2, LONG, seed + turn, limit=7, keep=True) for seed, p in enumerate(prompts)]
        found, expected = engine.generate(requests), bare.generate(requests)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        most = max(most, engine.kept.bytes)
        prompts = [[*p, *c.ids.tolist(), 20 + turn] for p, (c, _) in zip(prompts, found, strict=True)]
    assert most <= tokens * TOKEN_BYTES
    assert (most > tokens * TOKEN_BYTES // 2) == (tokens > 7)
    assert (engine.kept.reused > 0) == (tokens > 7)


def test_the_oldest_rows_go_first_and_shared_beginnings_stay():
    rows = KeptRows(10)
    nowhere = np.zeros(0, np.int64)

    def add(*ids: int, before=nowhere):
        rows.begin(1)
        places = rows.add(ids, before)
        if places is not None:
            rows.release([places])
        return places

    add(1, 2, 3, 4)
    add(5, 6, 7)
    found = rows.find((1, 2, 3, 4, 9))
    assert len(found) == 4
    add(1, 2, 3, 4, 8, before=found)
    rows.release([found])
    assert rows.bytes == 8
    add(10, 11, 12, 13)
    assert rows.bytes <= 10
    # The two oldest are gone, but the third contains the first.
    assert len(rows.find((5, 6, 7, 1))) == 0
    assert len(rows.find((1, 2, 3, 4, 8, 9))) == 5
    assert len(rows.find((1, 2, 9, 9))) == 2
    assert len(rows.find((10, 11, 12, 13))) == 3
    assert add(*range(20, 40)) is None
    rows.clear()
    assert len(rows.find((1, 2, 3))) == rows.bytes == 0


def test_going_on_that_is_not_exact_is_found_and_left(monkeypatch, capsys):
    model = tiny("mistral")
    assert check_exactness(model, EndTokenOnly()).extends
    attend = FlatLayout.attend

    def blind(self, query, key, value, options):
        """Kept rows are read without their window."""
        if type(self) is not FlatLayout:
            options = dataclasses.replace(options, window=None)
        return attend(self, query, key, value, options)

    monkeypatch.setattr(FlatLayout, "attend", blind)
    exact = check_exactness(model, EndTokenOnly())
    assert (exact.flat, str(exact.decoding), exact.extends) == (True, "flat", False)
    assert "decoding from kept rows differs from scoring by" in exact.extends_reason
    choose_rows(exact, Attention.auto, "Mistral")
    warning = f"Mistral reads every turn of an episode from its beginning: {exact.extends_reason}"
    assert warning in capsys.readouterr().err
    policy = policy_of(model)
    policy.extends = False
    engine = local(policy)
    going_on(engine, asked(PROMPTS, 3, LONG, [1, 2, 3, 4]))
    assert engine.kept.bytes == 0
