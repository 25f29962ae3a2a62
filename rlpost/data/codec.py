"""Text to token ids, with everything the model's tokenizer decides: begin, end and chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlpost.data.chat import Template, probe
from rlpost.errors import DataError, ModelError


@dataclass(frozen=True)
class Codec:
    """A tokenizer and what rows need of it."""

    tokenizer: Any
    """A tokenizer of transformers."""
    begin: tuple[int, ...]
    """What the tokenizer itself puts before a text: the begin token, or nothing."""
    end: int
    """The end token, appended to every plain completion."""
    template: Template | None
    """The chat template's stop token; None without a chat template."""
    strict: bool = True
    """Whether a row is refused that says what its chat template leaves out."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a completion: the end token, and the chat template's stop token if another."""
        chat = () if self.template is None else (self.template.stop_id,)
        return tuple(dict.fromkeys((self.end, *chat)))

    def ids(self, text: str, place: str) -> tuple[int, ...]:
        """Token ids of `text`, nothing added.

        Raises:
            DataError: the tokenizer has no token for one of its characters.
        """
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        unknown = self.tokenizer.unk_token_id
        # A text may name the unknown token: rows of samples do where a model wrote it.
        if unknown is not None and ids.count(unknown) > text.count(self.tokenizer.unk_token):
            raise DataError(
                f"{place}: the tokenizer has no token for {self._first_unknown(text)!r}: "
                "add it to model.tokenizer.alphabet, or change the rows"
            )
        return ids

    def _first_unknown(self, text: str) -> str:
        unknown = self.tokenizer.unk_token_id
        found = (c for c in text if unknown in self.tokenizer.encode(c, add_special_tokens=False))
        return next(found, text[:20])


def make_codec(tokenizer: Any) -> Codec:
    """The codec of a transformers tokenizer, its chat template (if any) probed for the stop token.

    Raises:
        ModelError: no end token, or a chat template whose assistant turns cannot be told apart.
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
    )
