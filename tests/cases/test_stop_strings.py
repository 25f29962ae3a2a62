"""Stop strings that lie across the borders of tokens: where plain search over the decoded text finds them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from engines import asked, local
from tiny_world import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlpost.engine.params import Sampling
from rlpost.engine.stopping import StopStrings, finished
from rlpost.policy.policy import Policy

Tally = Callable[..., None]
TEXTS = (
    "The sum is 4.\n\nUser: and 5+7? ### Answer: 12\n```\nprint('x')\n```\n",
    "Grüße aus Köln, naïve façade — ça va… «fin» £5 €20.\n\n",
    "こんにちは。終わり。次の質問：三たす四は？答え：七。",
    "🙂🙃 family 👩‍👩‍👧 flag 🇩🇪 e\u0301 é 𝔘𝔫𝔦 ½ \u200bzero \u2028line\r\n",
    "<answer>42</answer></think> [INST] {{x}} \\boxed{7} $$ a||b ## # #",
)


def byte_level(pieces: Sequence[bytes]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these pieces of UTF-8, whole characters or not, and one that ends."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # GPT-2's letters: printable bytes stand for themselves, all others for the code points from 256 on.
    other = iter(range(256, 512))
    letter = [chr(b) if b in plain else chr(next(other)) for b in range(256)]
    assert sorted(letter) == letters
    vocabulary = {"".join(letter[b] for b in piece): i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def cut_up(text: str, draw: random.Random) -> list[bytes]:
    """Pieces of 1 to 6 bytes, wherever characters begin."""
    raw, at, pieces = text.encode(), 0, []
    while at < len(raw):
        length = draw.randint(1, 6)
        pieces.append(raw[at : at + length])
        at += length
    return pieces


def some_stop(text: str, draw: random.Random) -> str:
    """Two to nine characters from somewhere in a text."""
    at = draw.randrange(len(text) - 2)
    return text[at : at + draw.randint(2, 9)]


def expected(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stop: Sequence[str]) -> tuple[int, str] | None:
    """(tokens until a stop string is there, the text before it), by search from the beginning at every token."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:n]))
        found = [text.find(s) for s in stop if s in text]
        if found:
            return n, text[: min(found)]
    return None


@pytest.mark.parametrize("seed", range(5))
def test_the_loop_of_tokens_ends_where_a_search_over_all_text_does(seed: int, tally: Tally):
    """The same decisions as the engine takes token by token, on texts cut up at random."""
    draw, right, crossing = random.Random(seed), 0, 0
    for case in range(40):
        text = TEXTS[case % len(TEXTS)]
        pieces = cut_up(text, draw)
        tokenizer = byte_level(pieces)
        number = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        ids = [number[piece] for piece in pieces]
        assert tokenizer.decode(ids) == text
        stop = [some_stop(text, draw) for _ in range(draw.randint(1, 3))]
        stops = StopStrings(tokenizer, stop)
        seen = [n for n in range(1, len(ids) + 1) if stops.hit(ids[max(0, n - stops.tail) : n])]
        wanted = expected(tokenizer, ids, stop)
        assert wanted is not None
        n, before = wanted
        assert seen[0] == n, (text, stop)
        c = finished(ids[:n], [-0.1 * k for k in range(n)], True, (), stops)
        assert (c.text, c.finish, tuple(c.ids)) == (before, "stop", tuple(ids[:n]))
        assert c.text == text[: len(c.text)]
        assert tuple(c.logprobs) == tuple(-0.1 * k for k in range(n))
        right += 1
        crossing += all(s.encode() not in piece for s in stop for piece in pieces)
    assert crossing >= 15
    tally("stop strings across tokens", right=right)


@pytest.mark.parametrize("seed", range(2))
def test_the_engine_stops_there_and_keeps_what_was_drawn_until_then(seed: int, tally: Tally):
    """Rows draw the same tokens with and without stop strings, up to where one is complete."""
    draw = random.Random(seed)
    pieces = [p for text in TEXTS for p in cut_up(text, draw)] + [bytes([b]) for b in " \n.#:abcé".encode()]
    tokenizer = byte_level(pieces)
    model = tiny_model(vocabulary=len(tokenizer), seed=seed, eos_token_id=None)
    engine = local(Policy(model, tokenizer, flat=False).eval())
    sampling = Sampling(max_new_tokens=24)
    (free,) = engine.generate(asked([(1, 2, 3)], 16, sampling, [seed]))
    end, right, stopped = tokenizer.eos_token_id, 0, 0
    for whole in free[:6]:
        clean = [s for s in tokenizer.decode([i for i in whole.ids if i != end]).split("\ufffd") if len(s) > 2]
        stop = [some_stop(s, draw) for s in clean[:2]]
        (rows,) = engine.generate(asked([(1, 2, 3)], 16, sampling.model_copy(update={"stop": stop}), [seed]))
        for before, now in zip(free, rows, strict=True):
            body = [i for i in before.ids if i != end]
            wanted = expected(tokenizer, body, stop)
            if wanted is None:
                assert now.same(before)
                continue
            n, text = wanted
            assert (now.text, now.finish, tuple(now.ids)) == (text, "stop", tuple(before.ids[:n]))
            assert now.logprobs == pytest.approx(before.logprobs[:n], abs=1e-5)
            assert len(now.action) == n
            stopped += 1
        right += 1
    assert stopped >= right
    tally("stop strings across tokens", right=stopped)
