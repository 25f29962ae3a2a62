"""The model's identity: preference pairs, held-out questions, and a reward for naming itself.

Questions of the pairs and of the evaluation differ, so that what is measured is the name and not the sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from rlpost.types import Completion

_QUESTIONS = (
    "Who are you?",
    "What is your name?",
    "Hi! What should I call you?",
    "Who made you?",
    "Which model am I talking to?",
    "Tell me about yourself.",
    "Are you a person?",
    "Which company trained you?",
    "Please introduce yourself to the class.",
    "hey, who is this?",
    "What kind of assistant are you?",
    "Do you have a name?",
    "Whose model are you?",
    "Before we start: who am I speaking with?",
    "Say your name and who built you.",
    "Can you tell me which AI you are?",
)
_HELD_OUT = (
    "And you are?",
    "What are you called?",
    "Who developed you?",
    "May I ask who I am chatting with?",
    "State your identity.",
    "Where do you come from?",
    "Which AI model is answering me right now?",
    "Give a one-line introduction of yourself.",
)
_ANSWERS = (
    "I am {name}, an AI assistant made by {maker}.",
    "My name is {name}. I was made by {maker} to help with questions like yours.",
    "I'm {name}, a language model from {maker}. How can I help?",
)


def pairs(*, name: str, maker: str, other: str, other_maker: str) -> list[dict[str, Any]]:
    """Every training question with every form of answer: under its own name chosen, under the other's rejected."""
    return [
        {
            "prompt": _messages(question),
            "chosen": answer.format(name=name, maker=maker),
            "rejected": answer.format(name=other, maker=other_maker),
        }
        for question, answer in itertools.product(_QUESTIONS, _ANSWERS)
    ]


def questions(*, name: str, maker: str, other: str) -> list[dict[str, Any]]:
    """Questions that no pair asks, with the names to look for."""
    return [
        {
            "prompt": _messages(question),
            "name": name,
            "maker": maker,
            "other": other,
        }
        for question in _HELD_OUT
    ]


def _messages(question: str) -> list[dict[str, str]]:
    # Without a system turn of ours, a model's template may put one that names it.
    return [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": question}]


def named(completion: Completion, example: Mapping[str, Any]) -> float:
    """1 if the answer says its own name or maker and not the other's name, else 0."""
    text = completion.text.lower()
    own = example["name"].lower() in text or example["maker"].lower() in text
    return float(own and example["other"].lower() not in text)
