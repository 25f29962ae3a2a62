"""A tokenizer that needs no files, and a policy around a tiny model."""

from __future__ import annotations

from typing import Any

from families import tiny

from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.load import remove_dropout
from rlpost.policy.policy import Policy

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """Token 0 is a, 1 is b, ...; from 26 on they are digits in brackets; `eos` is shown as "</s>"."""

    def __init__(self, eos: int | None = None) -> None:
        self.eos_token_id = eos

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self._piece(i, skip_special_tokens) for i in ids)

    def _piece(self, i: int, skip: bool) -> str:
        if i == self.eos_token_id:
            return "" if skip else "</s>"
        return LETTERS[i] if i < 26 else f"[{i}]"


def policy_of(model: Any, eos: int | None = None, flat: bool = True) -> Policy:
    remove_dropout(model)
    use_attention(model, FLAT if flat else "eager")
    return Policy(model, Letters(eos), flat=flat).eval()


def tiny_policy(family: str = "llama", eos: int | None = None, **more: Any) -> Policy:
    return policy_of(tiny(family, **more), eos)
