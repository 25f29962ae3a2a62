"""Encodes text with the model's tokenizer: ids, begin and end tokens, chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

from rlpost.data.batch import Batched, Pieces
from rlpost.data.chat import Template, probe
from rlpost.errors import DataError, ModelError


@dataclass(frozen=True)
class Codec:
    """A tokenizer with what rows need from it."""

    tokenizer: Any
    """A tokenizer of transformers."""
    begin: tuple[int, ...]
    """What the tokenizer itself adds before a text: the begin token, or nothing."""
    end: int
    """The end token, appended to every plain completion."""
    template: Template | None
    """The chat template's stop token; None without a chat template."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of tools that the recipe names: conversations are rendered with them."""
    strict: bool = True
    """Whether rows are refused if their chat template leaves out a part of them."""
    batched: Batched | None = field(default=None, compare=False)
    """The tokenizer for many texts at once; None to ask it for one text at a time."""
    known: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    """Ids of texts that were tokenised already."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a completion: the end token, and the chat template's stop token if it is another."""
        chat = () if self.template is None else (self.template.stop_id,)
        return tuple(dict.fromkeys((self.end, *chat)))

    @cached_property
    def _unknown(self) -> tuple[int | None, str]:
        """The unknown token: its id and its name, which a tokenizer takes long to look up."""
        return self.tokenizer.unk_token_id, self.tokenizer.unk_token

    @cached_property
    def end_name(self) -> str:
        """The end token's name."""
        return str(self.tokenizer.eos_token)

    def ids(self, text: str, location: str) -> tuple[int, ...]:
        """Token ids of `text`, nothing added.

        Raises:
            DataError: the tokenizer has no token for one of its characters.
        """
        ids = self.known.get(text)
        if ids is None:
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        unknown, name = self._unknown
        # A text may contain the unknown token by name: a model may have written it.
        if unknown is not None and ids.count(unknown) > text.count(name):
            raise DataError(
                f"{location}: the tokenizer has no token for {self._first_unknown(text)!r}: "
                "add it to model.tokenizer.alphabet, or change the rows"
            )
        return ids

    def all_ids(self, texts: Sequence[str]) -> Pieces:
        """Token ids of many texts, nothing added and nothing checked."""
        return (self.batched or Batched(self.tokenizer))(texts)

    def knowing(self, texts: Sequence[str]) -> Codec:
        """The same codec with the ids of these texts cached."""
        texts = list(dict.fromkeys(texts))
        return replace(self, known=dict(zip(texts, self.all_ids(texts).split(), strict=True)))

    def identity(self) -> str:
        """sha256 of all that a row's ids depend on: tokenizer, chat template, tools, and versions of libraries."""
        tokenizer = self.tokenizer
        tokenizer.encode("", add_special_tokens=False)  # resets padding and truncation of an earlier call
        fast = getattr(tokenizer, "is_fast", False)
        rules = tokenizer.backend_tokenizer.to_str() if fast else [tokenizer.get_vocab(), tokenizer.init_kwargs]
        special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
        libraries = _libraries()
        about = [type(tokenizer).__name__, rules, special, tokenizer.chat_template, libraries]
        about += [self.tools] if self.tools else []
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

    def _first_unknown(self, text: str) -> str:
        unknown = self.tokenizer.unk_token_id
        found = (c for c in text if unknown in self.tokenizer.encode(c, add_special_tokens=False))
        return next(found, text[:20])


@cache
def _libraries() -> dict[str, str]:
    """Versions of those whose code makes ids of text."""
    return {name: version(name) for name in ("tokenizers", "transformers", "jinja2")}


def make_codec(tokenizer: Any, tools: Sequence[Mapping[str, Any]] = ()) -> Codec:
    """The codec of a transformers tokenizer; its chat template, if any, is probed for the stop token.

    Args:
        tokenizer: with an end token.
        tools: schemas of tools that the recipe names.

    Raises:
        ModelError: there is no end token, or assistant turns cannot be found in its chat template's text.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end token, so no completion could end: name one as eos_token in tokenizer_config.json"
        )
    begin = tokenizer.bos_token_id
    adds_begin = begin is not None and tokenizer.encode("")[:1] == [begin]
    return Codec(
        tokenizer=tokenizer,
        begin=(begin,) if adds_begin else (),
        end=tokenizer.eos_token_id,
        template=probe(tokenizer) if tokenizer.chat_template else None,
        tools=tuple(tools),
        batched=Batched(tokenizer),
    )
