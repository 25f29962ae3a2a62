"""Conversations: what is streamed is the answer, turns go on, what cannot be said is said so."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from tiny_recipes import SFT, policy, run

from rlpost.cli.app import main
from rlpost.engine.params import Sampling
from rlpost.errors import DataError, EngineError, ModelError
from rlpost.inference.chat import Conversation, _Stream
from rlpost.inference.sample import sample
from rlpost.policy.policy import Policy
from rlpost.types import Completion

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}={% else %}"
    "{{ '1' if m.role == 'user' else '2' }}{{ m.content }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}2{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("chat")
    run(made, {"sft": {**SFT, "steps": 2}})
    return made


@pytest.fixture
def talker(folder) -> Policy:
    found = policy(folder / "runs/run/sft/final")
    found.tokenizer.chat_template = TEMPLATE
    return found


FEW = Sampling(max_new_tokens=4)


def test_pieces_are_the_answer_and_the_answer_is_that_of_sample(folder):
    final = folder / "runs/run/sft/final"
    for seed in range(4):
        pieces: list[str] = []
        answer = Conversation(policy(final), FEW, seed=seed).say("12+34=", pieces.append)
        assert "".join(pieces) == answer
        assert [answer] == sample(str(final), "12+34=", sampling=FEW, seed=seed)


def test_a_turn_is_told_all_that_was_said(talker):
    conversation = Conversation(talker, FEW, system="7")
    asked: list[list[int]] = []
    generate = conversation._engine.generate
    conversation._engine.generate = lambda rs: asked.extend(r.prompt.tolist() for r in rs) or generate(rs)
    first = conversation.say("3+4", lambda _: None)
    while not first:
        with pytest.raises(DataError, match="the last answer is empty"):
            conversation.say("5", lambda _: None)
        asked.clear()
        first = conversation.again(lambda _: None)
    conversation.say("5", lambda _: None)
    assert talker.tokenizer.decode(asked[0]) == "7=13+4<eos>2"
    assert talker.tokenizer.decode(asked[1]) == f"7=13+4<eos>2{first}<eos>15<eos>2"


def test_again_replaces_and_undo_takes_back(talker):
    conversation = Conversation(talker, FEW)
    answers = {conversation.say("3+4", lambda _: None)}
    for _ in range(6):
        answers.add(conversation.again(lambda _: None))
        assert [message for message, _ in conversation.turns] == ["3+4"]
    assert len(answers) > 1
    assert conversation.undo() == "3+4"
    assert conversation.turns == []


def test_a_conversation_that_fills_the_model_is_refused_and_goes_on(talker):
    conversation = Conversation(talker, FEW)
    with pytest.raises(EngineError, match=r"no room for an answer; /undo"):
        conversation.say("1" * 40, lambda _: None)
    assert conversation.turns == []
    conversation.say("1", lambda _: None)


def test_a_system_message_needs_a_template(folder):
    with pytest.raises(ModelError, match="--system"):
        Conversation(policy(folder / "runs/run/sft/final"), FEW, system="x")


class Bytes:
    """A tokenizer whose tokens are bytes."""

    @staticmethod
    def decode(ids, **_):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("stop", [[], ["END"]])
def test_no_half_character_and_no_stop_string_is_passed_on(stop):
    pieces: list[str] = []
    stream = _Stream(Bytes(), [0], stop)
    stream.write = pieces.append
    stream.begin([], [], [])
    text = "é€😀 E EN" + ("END" if stop else "")
    for byte in text.encode():
        stream.append(torch.tensor([byte]))
        assert "\ufffd" not in "".join(pieces)
        assert "END" not in "".join(pieces)
    whole = text.removesuffix("END") if stop else text
    ids = tuple(text.encode())
    assert stream.finish(Completion(ids, (True,) * len(ids), whole, "stop")) == whole
    assert "".join(pieces) == whole
    assert len(pieces) >= 5
    stream.begin([], [], [])
    cut = "a€".encode()[:-1]
    assert stream.finish(Completion(tuple(cut), (True,) * len(cut), Bytes.decode(cut), "length")) == "a"


def test_lines_of_a_pipe_are_a_conversation(folder, monkeypatch, capsys):
    lines = "12+34=\n\n/again\n/undo\n/undo\n/nothing\nabc\n/quit\n1+1=\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sys, "argv", ["rlpost", "chat", str(folder / "runs/run"), "--max-new-tokens", "4"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2
    for line in ("taken back: 12+34=", "/undo: there is no turn yet", "/nothing: not a command", "no token for 'a'"):
        assert line in told.err
