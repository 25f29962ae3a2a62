"""The local engine in a process of its own gives what it gives in the trainer's, and fails in one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from engines import local
from tiny_recipes import SFT, run

from rlpost.engine.api import SideEngine
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.engine.shared import changing
from rlpost.engine.side import LocalSideEngine, Origin
from rlpost.errors import EngineError, ModelError
from rlpost.policy.load import load_policy
from rlpost.policy.params import Lora, Model
from rlpost.policy.policy import Policy
from rlpost.types import Request

pytestmark = pytest.mark.slow  # a process starts in seconds; tests/stages/test_ahead.py has a quick test of one

WAYS = {
    "full": Model(),
    "lora": Model(lora=Lora(r=4, alpha=8.0)),
    "pissa": Model(lora=Lora(r=4, alpha=8.0, init_lora_weights="pissa")),
    "whole modules": Model(lora=Lora(r=4, alpha=8.0, modules_to_save=["lm_head"])),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("start"), {"sft": SFT})


def beside(policy: Policy, start: Path, model: Model, staleness: int = 1) -> LocalSideEngine:
    origin = Origin(start, model, False, torch.device("cpu"))
    return LocalSideEngine(policy, origin, EngineChoice(staleness=staleness), threads=torch.get_num_threads())


def moved(policy: Policy, number: int) -> None:
    """Other weights of every kind that change."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for x in policy.trained().values():
            x += 0.3 * torch.randn(x.shape, generator=generator)


def requests(policy: Policy, first: int = 0) -> list[Request]:
    """Of all kinds: several completions of one prompt, greedy ones, stop strings, limits, and some to go on from."""
    ids = [policy.tokenizer.encode(text) for text in ("12+3=", "7+8=", "40+41=")]
    free = Sampling(max_new_tokens=6)
    greedy = Sampling.model_construct(**{**free.model_dump(), "temperature": 0.0})
    return [
        Request(ids[0], 5, free, seed=(1 << 64) - 1, first=first),
        Request(ids[1], 2, Sampling(max_new_tokens=8, temperature=0.7, stop=["1"]), seed=7, keep=True),
        Request(ids[2], 1, greedy, seed=0, limit=3, keep=True),
    ]


@pytest.mark.parametrize("way", WAYS)
def test_completions_are_those_of_the_trainers_process_bit_for_bit(start, way, capfd):
    policy = load_policy(start, WAYS[way])
    capfd.readouterr()
    engine = beside(policy, start, WAYS[way])
    assert isinstance(engine, SideEngine)
    try:
        for version in range(3):
            moved(policy, version)
            engine.update_weights(policy, version)
            here = local(policy)
            here.update_weights(policy, version)
            for first in (0, 3):
                asked = requests(policy, first)
                for one, other in zip(engine.generate(asked), here.generate(asked), strict=True):
                    assert [c.weights_version for c in one] == [version] * len(one)
                    assert all(a.same(b) for a, b in zip(one, other, strict=True))
        assert engine.generate([]) == []
    finally:
        engine.close()
    assert capfd.readouterr() == ("", "")


def test_weights_are_those_of_when_they_were_staged(start):
    """Two versions wait while the engine still has an older one."""
    policy = load_policy(start, Model())
    engine = beside(policy, start, Model(), staleness=2)
    expected, switches = [], []
    try:
        for version in range(3):
            moved(policy, version)
            switches.append(engine.stage(policy, version))
            expected.append(local(policy).generate(requests(policy)))
        moved(policy, 3)
        for version in range(3):
            switches[version]()
            for one, other in zip(engine.generate(requests(policy)), expected[version], strict=True):
                assert [(c.ids.tolist(), c.logprobs.tolist(), c.weights_version) for c in one] == [
                    (c.ids.tolist(), c.logprobs.tolist(), version) for c in other
                ]
    finally:
        engine.close()


def test_what_goes_wrong_is_one_line_and_of_its_kind(start, tmp_path):
    policy = load_policy(start, Model())
    long = Request([1] * 20, 1, Sampling(max_new_tokens=64), seed=0)
    missing = beside(policy, tmp_path / "missing", Model())
    other = beside(policy, start, WAYS["lora"])
    dies = beside(policy, start, Model())
    try:
        with pytest.raises(ModelError, match="missing"):
            missing.update_weights(policy, 0)
        with pytest.raises(EngineError, match=r"ended \(exit code 0\)"):
            missing.update_weights(policy, 0)
        with pytest.raises(EngineError, match="loaded once more, the model has other weights"):
            other.update_weights(policy, 0)
        dies.update_weights(policy, 0)
        with pytest.raises(EngineError, match=r"sampling\.max_new_tokens=64: with a prompt of 20 tokens"):
            dies.generate([long])
        assert dies.generate(requests(policy))  # such an error ends nothing
        with torch.no_grad():
            next(iter(changing(policy).values())).fill_(torch.nan)
        dies.update_weights(policy, 1)
        with pytest.raises(EngineError, match="not numbers"):
            dies.generate(requests(policy))
        os.kill(dies._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"beside training ended \(exit code -9, as out of memory does\)"):
            dies.generate(requests(policy))
    finally:
        for engine in (missing, other, dies):
            engine.close()
            engine.close()
