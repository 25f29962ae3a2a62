"""Which tokens of an episode are what was replied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conversations import CHATML, make

from rlpost.environments.reply_tokens import reply_tokens
from rlpost.types import Completion

BETWEEN = "<|im_end|>\n<|im_start|>{role}\n{said}<|im_end|>\n<|im_start|>assistant\n"


def episode(tokenizer: Any, *parts: tuple[str, str], messages: list[dict[str, str]]) -> Completion:
    """Turns of the model, and what stands between them as it is given."""
    ids: list[int] = []
    action: list[bool] = []
    for who, text in parts:
        own = tokenizer.encode(text, add_special_tokens=False)
        ids += own
        action += [who == "model"] * len(own)
    return Completion(ids, action, messages=messages)


def read(completion: Completion, tokenizer: Any) -> str:
    """The text of the tokens that are replies."""
    return tokenizer.decode(completion.ids[reply_tokens(completion, tokenizer)].tolist())


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_of_plain_text_all_is_a_reply():
    tokenizer = make(CHATML)
    messages = [said("assistant", "hm"), said("environment", " no. "), said("assistant", "ah")]
    found = episode(tokenizer, ("model", "hm"), ("other", " no. "), ("model", "ah"), messages=messages)
    assert reply_tokens(found, tokenizer).tolist() == (~found.action).tolist()


@pytest.mark.parametrize("content", ["fine weather", "user", "a", "assistant", "日 é 🙂"])
def test_of_a_chat_template_only_the_message_is_one(content):
    tokenizer = make(CHATML)
    messages = [said("assistant", "hm"), said("user", f" {content}\n"), said("assistant", "ah")]
    between = BETWEEN.format(role="user", said=content)
    found = episode(tokenizer, ("model", "hm"), ("other", between), ("model", "ah"), messages=messages)
    mask = reply_tokens(found, tokenizer)
    before = len(tokenizer.encode(between.partition("\n" + content)[0] + "\n", add_special_tokens=False))
    start = len(tokenizer.encode("hm", add_special_tokens=False)) + before
    assert read(found, tokenizer) == content
    assert np.flatnonzero(mask)[0] == start


def test_several_messages_and_several_gaps_each_have_their_own():
    tokenizer = make(CHATML)
    first = "<|im_end|>\n<|im_start|>tool\none<|im_end|>\n<|im_start|>tool\none<|im_end|>\n<|im_start|>assistant\n"
    messages = [
        *(said("assistant", "hm"), said("tool", "one"), said("tool", "one"), said("assistant", "so")),
        *(said("environment", ""), said("assistant", "on"), said("opponent", "x"), said("environment", "two")),
        *(said("assistant", "ah"), said("environment", "over")),
    ]
    last = BETWEEN.format(role="user", said="two")
    parts = [("model", "hm"), ("other", first), ("model", "so"), ("model", "on"), ("other", last), ("model", "ah")]
    assert read(episode(tokenizer, *parts, messages=messages), tokenizer) == "oneonetwo"


def test_an_empty_reply_in_a_template_has_no_tokens_and_shifts_no_other():
    tokenizer = make(CHATML)
    messages = [
        *(said("assistant", "hm"), said("tool", ""), said("assistant", "so")),
        *(said("tool", "two"), said("assistant", "ah")),
    ]
    gaps = (BETWEEN.format(role="tool", said=text) for text in ("", "two"))
    parts = [("model", "hm"), ("other", next(gaps)), ("model", "so"), ("other", next(gaps)), ("model", "ah")]
    assert read(episode(tokenizer, *parts, messages=messages), tokenizer) == "two"


def test_what_a_template_writes_otherwise_counts_whole():
    tokenizer = make(CHATML)
    messages = [said("assistant", "hm"), said("tool", 'a "word"'), said("assistant", "ah")]
    between = BETWEEN.format(role="tool", said='{"content": "a \\"word\\""}')
    found = episode(tokenizer, ("model", "hm"), ("other", between), ("model", "ah"), messages=messages)
    assert reply_tokens(found, tokenizer).tolist() == (~found.action).tolist()


def test_what_is_left_out_of_learning_has_none():
    tokenizer = make(CHATML)
    messages = [said("assistant", "hm"), said("environment", "no")]
    assert not reply_tokens(episode(tokenizer, ("other", "hm"), ("other", "no"), messages=messages), tokenizer).any()
