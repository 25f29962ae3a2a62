"""Sampled groups as rows of `rollouts/*.jsonl`, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlpost import console
from rlpost.data.messages import question
from rlpost.types import Completion, Group


def show_samples(step: int, groups: Sequence[Group], tokenizer: Any) -> None:
    """A table with the first completion of a few groups and its reward; of an episode, what was said in it."""
    rows = []
    for group in groups[:4]:
        first = group.completions[0]
        prompt = question(group.example) or tokenizer.decode(group.prompt.tolist())
        rows.append((prompt, as_text(first), "unscored" if first.reward is None else f"{first.reward:.3g}"))
    console.samples(f"samples at step {step + 1}", rows)


def as_text(completion: Completion) -> str:
    """Its text; of an episode of several turns what was said, a line a message, with the rewards of turns."""
    if len(completion.messages) < 2:
        return completion.text
    return "\n".join(map(line_of, completion.messages))


def rollout_row(group: Group) -> dict[str, Any]:
    """A row of a group."""
    return {
        "prompt": group.prompt.tolist(),
        "example": dict(group.example),
        "completions": [
            {
                "text": c.text,
                "reward": c.reward,
                "finish": c.finish,
                "ids": c.ids.tolist(),
                "action": c.action.astype(int).tolist(),
                "logprobs": c.logprobs.tolist(),
                "weights_version": c.weights_version,
                **_of_turns(c),
            }
            for c in group.completions
        ],
    }


def _of_turns(c: Completion) -> dict[str, Any]:
    if not c.messages:
        return {}
    given = {"step_rewards": c.step_rewards.tolist()} if len(c.step_rewards) else {}
    return {"steps": c.steps.tolist(), **given, "messages": [dict(message) for message in c.messages]}


def line_of(message: Mapping[str, Any]) -> str:
    """What a message says and calls, who says it, and its reward: `assistant: 47+38= add(a=47, b=38)  (+0.5)`."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    called = [f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})" for call in calls]
    said = " ".join([message["content"], *called]).strip()
    reward = f"  ({message['reward']:+.3g})" if message.get("reward") is not None else ""
    return f"{message['role']}: {said}{reward}"
