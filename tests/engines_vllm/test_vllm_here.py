"""vLLM in the process: it samples what the local engine would, with the policy's weights as they are."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import numpy as np
import pytest
import torch
from engines import local
from tiny_vllm import END, NEAR, NEEDS_VLLM, WORDS, engine, gaps, ids, load, next_logits, requests, write_model

from rlpost.engine.api import FreeEngine
from rlpost.engine.params import EngineChoice
from rlpost.engine.vllm_here import VllmEngine
from rlpost.errors import EngineError, ModelError
from rlpost.types import Completion, Group

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def policy(folder):
    return load(folder)


@pytest.fixture(scope="module")
def here(policy):
    made = engine(policy)
    made.update_weights(policy, 0)
    yield made
    made.close()


def test_greedy_tokens_are_those_of_the_local_engine(policy, here):
    asked = requests(64, temperature=0.0)
    found, wanted = here.generate(asked), local(policy).generate(asked)
    assert ids(found) == ids(wanted)
    assert [c.finish for (c,) in found] == [c.finish for (c,) in wanted]
    assert [c.text for (c,) in found] == [c.text for (c,) in wanted]
    assert len({tuple(row) for row in ids(found)}) == 64
    assert {c.finish for (c,) in found} == {"stop", "length"}


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 1.0, "stop": ["ab", "a", "Zz"]},
        {"temperature": 1.0, "stop": ["</s>"]},
    ],
    ids=str,
)
def test_log_probabilities_are_those_that_tokens_were_drawn_with(policy, here, sampling):
    asked = requests(40, n=2, **sampling)
    found = here.generate(asked)
    far = gaps(policy, asked, found)
    assert far.mean() < NEAR
    assert far.max() < 20 * NEAR
    for request, completions in zip(asked, found, strict=True):
        for c in completions:
            assert c.ids.max() <= END  # none of the rows without a token
            must_end_rightly(c, request.limit, request.sampling.stop)


def must_end_rightly(c: Completion, limit: int, stop: list[str]) -> None:
    whole = "".join(WORDS[i] for i in c.ids)
    inside = "".join(WORDS[i] for i in c.ids[:-1])
    hit = [s for s in stop if s in whole]
    assert END not in c.ids[:-1]
    assert not [s for s in stop if s in inside]
    assert c.finish == ("stop" if hit or c.ids[-1] == END else "length")
    assert len(c.ids) <= limit
    assert c.finish == "stop" or len(c.ids) == limit
    wanted = whole.removesuffix("</s>")
    assert c.text == min((wanted[: wanted.find(s)] for s in hit if s in wanted), key=len, default=wanted)


def test_tokens_are_drawn_as_their_probabilities_say(policy, here):
    (request,) = requests(1, n=4000, limit=1)
    (found,) = here.generate([request])
    drawn = np.bincount([c.ids[0] for c in found], minlength=END + 1) / 4000
    logits = next_logits(policy, Group(request.prompt, (found[0],)))
    p = logits.softmax(-1)[0].numpy()
    # Each is a mean of 4000: five standard errors.
    assert (np.abs(drawn - p) < 5 * np.sqrt(p / 4000) + 1e-3).all()
    assert (p > 0.01).sum() > 4


def test_a_completions_tokens_hang_on_its_seed_and_number(here):
    asked = requests(20, n=4)
    whole = here.generate(asked)
    assert ids(here.generate(asked)) == ids(whole)
    assert [c.logprobs.tolist() for some in here.generate(asked) for c in some] == [
        c.logprobs.tolist() for some in whole for c in some
    ]
    assert all(len({tuple(c.ids) for c in some}) > 1 for some in whole[5:])
    later = [type(r)(r.prompt, 2, r.sampling, r.seed, r.limit, first=2) for r in asked]
    assert ids(here.generate(later)) == ids([some[2:] for some in whole])
    others = [type(r)(r.prompt, 4, r.sampling, r.seed + 1, r.limit) for r in asked]
    assert ids(here.generate(others)) != ids(whole)


def test_coroutines_share_its_steps_and_others_run_between(policy, here):
    assert isinstance(here, FreeEngine)
    asked = requests(12, n=2)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def episode(request) -> tuple[Completion, ...]:
        first = await here.complete(request)
        longer = np.concatenate([request.prompt, first[0].ids])
        second = await here.complete(type(request)(longer, 1, request.sampling, request.seed, 5))
        return (*first, *second)

    async def all_of_them() -> list[tuple[Completion, ...]]:
        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*map(episode, asked))
        ticking.cancel()
        return found

    found = asyncio.run(all_of_them())
    assert ticks > 20
    assert gaps(policy, asked, [some[:2] for some in found]).mean() < NEAR
    assert ids([some[:2] for some in found]) == ids(here.generate(asked))
    assert all(len(some) == 3 for some in found)


def test_a_coroutine_that_is_cancelled_leaves_nothing_under_way(here):
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(here.complete(requests(1, n=64, limit=80)[0]), 0.05)

    asyncio.run(give_up())
    assert not here._waiting
    assert not here._engine.has_unfinished_requests()
    assert here.generate(requests(1))[0][0].finish


def test_the_process_is_as_it_was(folder, capfd):
    policy = load(folder)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def state() -> tuple[object, ...]:
        own = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
        drawn = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        settings = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
        return drawn, settings, torch.get_float32_matmul_precision(), own, torch.is_grad_enabled()

    before = state()
    made = engine(policy)
    made.update_weights(policy, 0)
    made.generate(requests(4, n=2))
    assert state() == before
    made.close()
    assert state() == before
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert torch.distributed.is_initialized()
    assert capfd.readouterr() == ("", "")


def test_other_weights_than_those_asked_for_are_not_sampled_from(policy, here):
    here._llm.update_weight_version("41")
    with pytest.raises(EngineError, match="it has weights version 41, and not 0"):
        here.generate(requests(1))
    here._llm.update_weight_version("0")


def test_a_row_that_does_not_fit_is_one_line(policy, here):
    with pytest.raises(EngineError, match=r"sampling.max_new_tokens=200: with a prompt of 1 tokens.*128 positions"):
        here.generate(requests(1, limit=200))


def test_an_argument_that_vllm_does_not_have_is_one_line(policy):
    with pytest.raises(ModelError, match=r"rollouts.args.max_num_seq: vLLM has no such argument - did you mean"):
        engine(policy, args={"max_num_seq": 4})


def test_a_cache_that_is_too_small_is_one_line(folder):
    with pytest.raises(EngineError, match=r"rollouts.engine=vllm: does not start: .*rollouts.cache_gib") as error:
        engine(load(folder), cache_gib=1e-9)
    assert "\n" not in str(error.value)


def test_vllm_that_is_not_installed_is_one_line(policy, monkeypatch):
    from rlpost.engine import vllm_process

    monkeypatch.setattr(vllm_process, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"rollouts.engine=vllm: needs the package vllm .*pip install vllm"):
        VllmEngine(policy, EngineChoice(engine="vllm"))
