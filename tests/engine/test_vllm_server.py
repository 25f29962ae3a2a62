"""vLLM's server as an engine, with one that speaks the same routes: what is asked, taken, sent again and refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from engines import local
from fake_vllm import FakeVllm
from tiny_recipes import SFT, base, lora_policy, run

from rlpost.engine import vllm_client, vllm_server
from rlpost.engine.api import FreeEngine, SideEngine
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.engine.vllm_server import VllmServer
from rlpost.errors import EngineError
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.types import Completion, Group, Request


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    run(folder, {"sft": SFT | {"steps": 1}})
    return base(folder)


@pytest.fixture(scope="module")
def loaded(model) -> list[Policy]:
    return [load_policy(model, Model(), trainable=True) for _ in range(3)]


@pytest.fixture
def policy(loaded) -> Iterator[Policy]:
    """The policy; servers have two others of the same weights."""
    before = {name: x.clone() for name, x in loaded[0].state_dict().items()}
    yield loaded[0]
    for each in loaded:
        each.load_state_dict(before)


@pytest.fixture
def server(loaded, policy) -> Iterator[FakeVllm]:
    with FakeVllm(loaded[1]) as fake:
        yield fake


@pytest.fixture
def other(loaded, policy) -> Iterator[FakeVllm]:
    with FakeVllm(loaded[2]) as fake:
        yield fake


@pytest.fixture(autouse=True)
def _at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_client, "BACKOFF", 0.001)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def engine_of(policy: Policy, *servers: FakeVllm, **chosen: object) -> VllmServer:
    return VllmServer(policy, EngineChoice(engine="vllm_server", urls=[s.url for s in servers], **chosen))


def requests(count: int, n: int = 1, **sampling: object) -> list[Request]:
    draw = np.random.default_rng(0)
    made = Sampling(max_new_tokens=6).model_copy(update=sampling)
    return [Request(draw.integers(3, 15, 2 + i % 5), n, made, i, first=i % 2) for i in range(count)]


def change(policy: Policy) -> None:
    with torch.no_grad():
        for x in policy.trained().values():
            x.add_(0.3 * torch.randn_like(x))


def gap(policy: Policy, asked: list[Request], found: list[tuple[Completion, ...]]) -> float:
    """Mean difference from the policy's log-probabilities."""
    said = np.concatenate([c.logprobs for some in found for c in some])
    groups = [Group(r.prompt, some) for r, some in zip(asked, found, strict=True)]
    own = logprobs(policy, groups, temperature=asked[0].sampling.temperature)
    return float(np.abs(own.numpy() - said).mean())


def ids(found: list[tuple[Completion, ...]]) -> list[list[int]]:
    return [c.ids.tolist() for some in found for c in some]


@pytest.mark.parametrize("make", [lambda m: load_policy(m, Model(), trainable=True), lora_policy], ids=["full", "lora"])
def test_every_version_of_the_weights_is_the_one_that_is_sampled_from(make, model, server, tmp_path):
    policy = make(model)
    engine = engine_of(policy, server)
    greedy, drawn = requests(5, temperature=0.0), requests(5, n=2, temperature=0.7)
    for version in range(3):
        engine.update_weights(policy, version)
        assert ids(engine.generate(greedy)) == ids(local(policy).generate(greedy))
        found = engine.generate(drawn)
        assert gap(policy, drawn, found) < 1e-5
        assert {c.weights_version for some in found for c in some} == {version}
        assert [c.finish for some in found for c in some] == [
            "stop" if i[-1] in policy.end_ids else "length" for i in ids(found)
        ]
        change(policy)
        assert gap(policy, drawn, engine.generate(drawn)) > 0.1  # its own are still the earlier ones
        assert len(list(tmp_path.glob("rlpost-weights-*"))) == 1
        assert len(server.models) == 1 + policy.has_adapter
    engine.close()
    assert list(server.models) == ["policy"]
    assert list(tmp_path.iterdir()) == []


def test_completions_come_in_order_and_each_by_its_own_seed(policy, server):
    asked = requests(4, n=3)
    engine = engine_of(policy, server)
    engine.update_weights(policy, 0)
    alone = [engine.generate([request])[0] for request in asked]
    server.together = 12  # all at once, and answered from the last to the first
    assert ids(engine.generate(asked)) == ids(alone)
    seeds = {r["sampling_params"]["seed"] for r in server.requests}
    assert len(seeds) == 12
    server.together = 1
    shifted = Request(asked[0].prompt, 2, asked[0].sampling, asked[0].seed, first=asked[0].first + 1)
    assert ids(engine.generate([shifted])) == ids(alone[:1])[1:]


def test_requests_of_coroutines_are_worked_on_together(policy, server):
    engine = engine_of(policy, server)
    engine.update_weights(policy, 0)
    assert isinstance(engine, FreeEngine)
    assert isinstance(engine, SideEngine)
    asked = requests(3)
    expected = engine.generate(asked)
    server.together = 3

    async def all_of_them() -> list[tuple[Completion, ...]]:
        return list(await asyncio.gather(*(engine.complete(r) for r in asked)))

    assert ids(asyncio.run(all_of_them())) == ids(expected)


def test_requests_of_a_prompt_go_to_one_server_and_prompts_to_all(policy, server, other):
    engine = engine_of(policy, server, other)
    engine.update_weights(policy, 0)
    engine.generate(requests(6, n=3))
    prompts = [{tuple(r["token_ids"]) for r in s.requests} for s in (server, other)]
    assert [len(p) for p in prompts] == [3, 3]
    assert not prompts[0] & prompts[1]


LATE = threading.Event()
FAILURES = {
    "fails": (
        lambda answer: (500, {"error": {"message": "EngineCore\nencountered an issue"}}),
        "EngineCore encountered",
    ),
    "breaks off": (lambda answer: (200, None), "no answer ("),
    "late": (lambda answer: (LATE.wait(1.0), answer)[1], "no answer within 0.3 s"),
    "nothing": (lambda answer: (200, {}), "another form"),
    "other tokens": (lambda answer: _changed(answer, token_ids=[1] * 9), "of other tokens than it drew"),
    "aborted": (lambda answer: _changed(answer, finish_reason="abort"), "broke off (abort)"),
    "another version": (
        lambda answer: _changed(answer, weight_versions=[{"version": "default", "start": 0, "end": 1}]),
        "weights default instead of rlpost-",
    ),
    "two versions": (
        lambda answer: _changed(
            answer,
            weight_versions=[*answer[1]["choices"][0]["weight_versions"], {"version": "x", "start": 1, "end": 2}],
        ),
        "and x instead of rlpost-",
    ),
}


def _changed(answer, **fields):
    answer[1]["choices"][0] |= fields
    return answer


@pytest.mark.parametrize(("failure", "message"), FAILURES.values(), ids=FAILURES)
def test_what_is_no_answer_is_asked_for_again_and_at_last_told(policy, server, failure, message):
    engine = engine_of(policy, server, retries=2, deadline=0.3 if "within" in message else 30)
    engine.update_weights(policy, 4)
    asked = requests(1)
    expected = engine.generate(asked)
    server.failures.extend([failure] * 2)
    assert ids(engine.generate(asked)) == ids(expected)
    assert len(server.requests) == 4
    server.failures.extend([failure] * 3)
    with pytest.raises(EngineError) as told:
        engine.generate(asked)
    text = str(told.value)
    assert message in text
    assert server.url in text
    assert "tried 3 times" in text
    assert "\n" not in text


def test_a_request_goes_to_another_server_where_one_is_gone(policy, server, other):
    engine = engine_of(policy, server, other, retries=1)
    engine.update_weights(policy, 0)
    asked = requests(4)
    expected = engine.generate(asked)
    other.ended = True
    assert ids(engine.generate(asked)) == ids(expected)
    with pytest.raises(EngineError, match=rf"{other.url}: no answer \(.*\) \(tried 2 times\)"):
        engine.update_weights(policy, 1)


def test_what_a_server_refuses_is_not_asked_again(policy, server):
    engine = engine_of(policy, server)
    engine.update_weights(policy, 0)
    server.failures.append(lambda answer: (400, {"error": {"message": "Token id 60 is out of vocabulary"}}))
    with pytest.raises(EngineError, match="Token id 60 is out of vocabulary"):
        engine.generate(requests(1))
    assert len(server.requests) == 1


def test_a_number_that_is_none_is_an_error(policy, server):
    engine = engine_of(policy, server)
    engine.update_weights(policy, 0)
    content = {"content": [{"token_id": 5, "logprob": -9999.0}]}
    server.failures.append(lambda answer: _changed(answer, token_ids=[5], logprobs=content))
    with pytest.raises(EngineError, match="nan"):
        engine.generate(requests(1))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dev_mode": False}, "takes no weights: it was started without VLLM_SERVER_DEV_MODE=1"),
        ({"scale_out": False}, "does not take tokens (/inference/v1/generate: Scale-out endpoints are disabled.)"),
        ({"processed": False}, "log-probabilities that do not depend on the temperature (--logprobs-mode)"),
        ({"reloads": False}, "nats a token from the policy's, though it has read the policy's weights"),
    ],
    ids=str,
)
def test_a_server_that_cannot_serve_is_refused_with_the_command_that_would(policy, server, setting, message):
    vars(server).update(setting)
    change(policy)
    with pytest.raises(EngineError) as told:
        engine_of(policy, server).update_weights(policy, 0)
    assert message in str(told.value)
    assert str(told.value).endswith(
        f"; start it with: VLLM_SERVER_DEV_MODE=1 vllm serve {policy.base} --enable-scale-out "
        "--logprobs-mode processed_logprobs --dtype float32"
    )


def test_a_server_without_adapters_is_refused(model, server):
    server.runtime_lora = False
    policy = lora_policy(model)
    with pytest.raises(
        EngineError, match=r"takes no adapters: .* VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; .* --enable-lora"
    ):
        engine_of(policy, server).update_weights(policy, 0)


def test_no_server_at_all_is_refused(policy):
    engine = VllmServer(policy, EngineChoice(engine="vllm_server", urls=["http://127.0.0.1:9/"], retries=0))
    with pytest.raises(EngineError, match=r"^rollouts: http://127.0.0.1:9: no answer \(.*\); start it with: VLLM"):
        engine.update_weights(policy, 0)


def test_another_tokenizer_is_refused(policy, server, monkeypatch):
    monkeypatch.setattr(server, "_post_detokenize", lambda body: (200, {"prompt": "what"}))
    with pytest.raises(EngineError, match=r'another tokenizer: .* is "what" to it'):
        engine_of(policy, server).update_weights(policy, 0)


def test_a_folder_that_the_server_does_not_see_is_told(policy, server):
    server.sees_folders = False
    with pytest.raises(EngineError, match=r"cannot take the weights in .*: it failed: Repo id .* set TMPDIR"):
        engine_of(policy, server).update_weights(policy, 0)


def test_a_completion_that_does_not_fit_the_server_is_refused(policy, server):
    server.positions = 8
    engine = engine_of(policy, server)
    engine.update_weights(policy, 0)
    with pytest.raises(EngineError, match=r"beyond the server's \(--max-model-len\) 8 positions"):
        engine.generate(requests(5))


def test_weights_are_staged_while_requests_run(policy, server):
    engine = engine_of(policy, server)
    engine.update_weights(policy, 0)
    asked = requests(1)
    server.together = 2
    found: list[list[tuple[Completion, ...]]] = []
    sampling = threading.Thread(target=lambda: found.append(engine.generate(asked)))
    sampling.start()
    change(policy)
    take = engine.stage(policy, 1)
    change(policy)  # what comes after is not in it
    (more,) = engine.generate(asked)
    sampling.join()
    assert more[0].weights_version == found[0][0][0].weights_version == 0
    server.together = 1
    take()
    ((after,),) = engine.generate(asked)
    assert after.weights_version == 1
    assert gap(policy, asked, [(after,)]) > 0.05
    assert after.ids.tolist() != more[0].ids.tolist() or abs(after.logprobs - more[0].logprobs).max() > 0.05


def test_closing_it_ends_what_another_thread_waits_for_and_may_be_done_twice(policy, server):
    engine = engine_of(policy, server)
    engine.update_weights(policy, 0)
    server.together = 2  # so that one request alone has no answer
    ended: list[BaseException] = []

    def sample() -> None:
        try:
            engine.generate(requests(1))
        except BaseException as error:
            ended.append(error)

    sampling = threading.Thread(target=sample)
    sampling.start()
    while not server._waiting:
        time.sleep(0.01)
    engine.close()
    engine.close()
    sampling.join()
    assert isinstance(ended[0], CancelledError)
    server._waiting.pop().set()  # its own thread goes on


def test_requests_before_weights_are_refused(policy, server):
    with pytest.raises(EngineError, match="call update_weights first"):
        engine_of(policy, server).generate(requests(1))


class Started:
    """In place of a server that the run starts: one of this process, which may end."""

    every: ClassVar[list[Started]] = []
    """All that were made, the last one last."""

    def __init__(self, _program: str, flags: tuple[str, ...], *_: object) -> None:
        self.flags = flags
        self.read: list[tuple[str, list[str]]] = []
        self.fake: FakeVllm | None = None
        self.every.append(self)

    def start(self, model: str, tokenizer: Path) -> None:
        self.read.append((model, sorted(file.name for file in tokenizer.iterdir())))
        named = self.flags.index("--served-model-name") + 1 if "--served-model-name" in self.flags else None
        name = model if named is None else self.flags[named]
        self.fake = FakeVllm(load_policy(Path(model), Model(), trainable=False), name).__enter__()

    @property
    def url(self) -> str:
        return self.fake.url

    @property
    def lives(self) -> bool:
        return not self.fake.ended

    def cause(self) -> str:
        return "Killed"

    def end(self) -> None:
        self.fake.__exit__()


@pytest.fixture
def started(monkeypatch) -> Iterator[list[Started]]:
    monkeypatch.setattr(vllm_server, "Started", Started)
    monkeypatch.setattr(vllm_server, "LOOK", 0.0)
    monkeypatch.setattr(Started, "every", [])
    yield Started.every
    for each in Started.every:
        each.end()


@pytest.mark.parametrize("lora", [False, True])
def test_a_server_of_the_runs_that_ends_is_started_again_with_the_current_weights(model, policy, started, lora, capsys):
    policy = lora_policy(model) if lora else policy
    engine = VllmServer(policy, EngineChoice(engine="vllm_server", retries=1, cache_gib=1))
    change(policy)
    engine.update_weights(policy, 0)
    (server,) = started
    (read, names), *again = server.read
    assert not again
    assert read == policy.base if lora else "rlpost-weights-" in read
    assert "tokenizer.json" in names
    assert "--enable-scale-out" in server.flags
    assert server.flags[server.flags.index("--kv-cache-memory-bytes") + 1] == str(2**30)
    change(policy)
    engine.update_weights(policy, 1)
    asked = requests(3, n=2)
    expected = engine.generate(asked)
    server.fake.ended = True
    assert ids(engine.generate(asked)) == ids(expected)
    assert len(server.read) == 2
    assert capsys.readouterr().err.count("the server has ended, and is started again: Killed") == 1
    server.fake.ended = True
    change(policy)
    engine.update_weights(policy, 2)
    assert gap(policy, asked, engine.generate(asked)) < 1e-5
    engine.close()


def test_a_server_that_ends_again_and_again_is_told_with_its_last_words(policy, started, monkeypatch):
    engine = VllmServer(policy, EngineChoice(engine="vllm_server", retries=1))
    engine.update_weights(policy, 0)
    started[0].fake.ended = True
    monkeypatch.setattr(Started, "start", lambda *_: None)
    with pytest.raises(
        EngineError, match=r"rollouts: http.*: no answer .*: the server has ended: Killed \(tried 2 times\)"
    ):
        engine.generate(requests(1))
