"""Makes tokenizers from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlpost.data.params import Tokenizer as Spec
from rlpost.data.params import TokenizerKind
from rlpost.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
"""Ids 0, 1, 2 and (characters only) 3."""

_BYTES = 256


def make_tokenizer(spec: Spec, texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer as `spec` says; `texts` are what a bpe tokenizer is trained on.

    It adds no tokens itself, decodes to exactly the text that it encoded, and its padding token is not its end token.

    Raises:
        RecipeError: an empty alphabet or too small a vocabulary. DataError: nothing to train on.
    """
    from transformers import PreTrainedTokenizerFast

    characters = spec.kind is TokenizerKind.characters
    made = _characters(spec.alphabet) if characters else _bpe(spec.vocab_size, texts)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN if characters else None,
        clean_up_tokenization_spaces=False,
    )


def _characters(alphabet: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if not alphabet:
        raise RecipeError("model.tokenizer.alphabet is empty: give every character of the data")
    specials = [PAD, BEGIN, END, UNKNOWN]
    vocabulary = {token: i for i, token in enumerate([*specials, *dict.fromkeys(alphabet)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without one, decode would put spaces between the characters
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return tokenizer


def _bpe(vocab_size: int, texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = [PAD, BEGIN, END]
    smallest = _BYTES + len(specials)
    if vocab_size < smallest:
        raise RecipeError(
            f"model.tokenizer.vocab_size is {vocab_size}: give at least {smallest}, "
            f"{_BYTES} bytes and {len(specials)} special tokens"
        )
    if not any(texts):
        raise DataError("model.tokenizer.data has no text to train a bpe tokenizer on: name the sources there")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
