"""What an environment of verifiers asks the model: one conversation, a request at a time."""

from __future__ import annotations

import asyncio

import pytest

from rlpost.data.verifiers_policy import Conversation

USER = {"role": "user", "content": "1+1?"}
SAID = {"role": "assistant", "content": "2"}
MORE = {"role": "user", "content": "sure?"}


def play(*requests: dict, turns: int = 1) -> list:
    """What the requests add to a conversation whose turns are all "2"; the last is the error, if there is one."""

    async def main() -> list:
        conversation, found = Conversation(), []
        for number, body in enumerate(requests):
            asking = asyncio.ensure_future(conversation.ask(body))
            try:
                found.append(await conversation.asked())
            except ValueError as error:
                asking.cancel()
                return [*found, str(error)]
            if number < turns:
                conversation.answer("2")
                assert await asking == "2"
        conversation.close()
        return found

    return asyncio.run(main())


def test_a_request_adds_what_follows_the_last_turn():
    first, second = {"messages": [USER]}, {"messages": [USER, SAID, MORE]}
    assert play(first, second, turns=2) == [[USER], [MORE]]


def test_parts_of_text_are_one_text_and_no_content_is_none():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = [{"role": "system", "content": None}, {"role": "user", "content": parts}]
    assert play({"messages": asked}) == [[{"role": "system", "content": ""}, {"role": "user", "content": "a\nb"}]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([USER, {"role": "assistant", "content": "3"}, MORE], "does not go on"),
        ([USER], "does not go on"),
        ([USER, SAID], "does not go on"),
        ([MORE, SAID, MORE], "does not go on"),
        ([USER, SAID, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "an image"),
    ],
)
def test_another_conversation_is_refused(second, message):
    *_, error = play({"messages": [USER]}, {"messages": second})
    assert message in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, r"tools (look)"),
        ({"stream": True}, "streams"),
    ],
)
def test_what_is_not_played_is_refused(more, message):
    assert message in play({"messages": [USER], **more})[0]


def test_two_requests_at_a_time_are_refused():
    *_, error = play({"messages": [USER]}, {"messages": [USER, SAID, MORE]}, turns=0)
    assert "two turns at a time" in error


def test_a_closed_conversation_answers_no_more():
    async def main() -> list[bool]:
        conversation = Conversation()
        asked = [asyncio.ensure_future(conversation.ask({"messages": [USER]})) for _ in range(2)]
        await conversation.asked()
        conversation.close()
        asked.append(asyncio.ensure_future(conversation.ask({"messages": [USER]})))
        await asyncio.wait(asked, timeout=5)
        return [one.cancelled() for one in asked]

    assert asyncio.run(main()) == [True] * 3
