"""Judges: saved reward models, process reward models and models of reversed text, for rewards and best-of-n.

Axes: N action tokens, S completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpost.data.codec import Codec, make_codec
from rlpost.data.direction import backwards
from rlpost.data.formats import Format, encode
from rlpost.data.step_split import split_steps
from rlpost.errors import ModelError
from rlpost.objectives.ragged import Ragged
from rlpost.policy import adapters
from rlpost.policy.load import is_backwards, load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference, same_base
from rlpost.policy.value_head import ValueHeadModel, Values, load_value_head_model
from rlpost.types import Completion, Group, Ids, completions


class RewardModelJudge:
    """A reward model that scores completions of a policy.

    With the policy's tokenizer it reads the same tokens; with another one it reads the row's prompt and the
    completion's text.
    """

    backwards = False

    def __init__(self, model: ValueHeadModel, tokenizer: Any, step_end: str | None = None) -> None:
        """Judge by `model`.

        Args:
            model: the reward model.
            tokenizer: the policy's.
            step_end: what a step ends with; None leaves it to the reward.
        """
        self._model = model
        self._writer = tokenizer
        self._step_end = step_end
        self._codec = None if same_tokens(model.trunk.tokenizer, tokenizer) else make_codec(model.trunk.tokenizer)

    def scores(self, groups: Sequence[Group]) -> list[float]:
        """[S] the score of the state after each completion."""
        scores: list[float] = self._read(self._own(groups)).final_S.tolist()
        return scores

    def by_group(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """[P][G] the scores by group."""
        return _nested(self.scores(groups), groups)

    def step_scores(self, groups: Sequence[Group], step_end: str) -> list[list[float]]:
        """[S] the probability that each step of a completion is right, at the step's last action.

        The token that ends a completion is not read: rows of labelled steps have none.
        """
        end = step_end if self._step_end is None else self._step_end
        own = [self._divided(group, end) for group in self._own(groups)]
        right_N = torch.sigmoid(self._read(own).after_N)
        pieces = torch.split(right_N, [c.actions for c in completions(own)])
        every = zip(completions(own), pieces, strict=True)
        return [x[self._step_ends(c)].tolist() for c, x in every]

    def _step_ends(self, completion: Completion) -> Tensor:
        """[K] the action at which each step is read."""
        at = torch.tensor(completion.steps, dtype=torch.long).cumsum(0) - 1
        chosen = completion.ids[completion.action]
        if len(at) and completion.steps[-1] > 1 and chosen[-1] in self._model.trunk.end_ids:
            at[-1] -= 1
        return at

    def _divided(self, group: Group, step_end: str) -> Group:
        if all(len(c.steps) or not c.actions for c in group.completions):
            return group
        return split_steps(group, self._model.trunk.tokenizer, step_end, self._model.trunk.end_ids)

    def _own(self, groups: Sequence[Group]) -> list[Group]:
        """The groups in the reward model's tokens."""
        if self._codec is None:
            return list(groups)
        return [part for group in groups for part in reread(group, self._writer, self._codec)]

    def _read(self, groups: Sequence[Group]) -> Values:
        _must_fit(groups, self._model.trunk)
        return self._model.score(groups)


class ReverseJudge:
    """Scores completions by how well they predict their prompt: log p_reverse(prompt, end | completion).

    By Bayes' rule that is log p(completion | prompt) − log p(completion) + a constant of the prompt: an answer that
    suits any prompt gains nothing. A truncated completion is read as if the text ended there.
    """

    backwards = True

    def __init__(self, reverse: Policy, adapter: str | None, tokenizer: Any) -> None:
        """Judge by `reverse`, a model of reversed text.

        Args:
            reverse: the model, or one with the same base.
            adapter: its adapter that reads backwards, if it has one.
            tokenizer: the policy's; if it is not the model's own, texts are read instead of tokens.
        """
        self._reverse = reverse
        self._adapter = adapter
        self._writer = tokenizer
        self._codec = make_codec(reverse.tokenizer)
        self._reads_ids = same_tokens(reverse.tokenizer, tokenizer)

    def scores(self, groups: Sequence[Group]) -> list[float]:
        """[S] the log-likelihood of each completion's prompt, summed in float64."""
        own = groups if self._reads_ids else [g for group in groups for g in reread(group, self._writer, self._codec)]
        turned = [self._prompt(Group(g.prompt, (c,))) for g in own for c in g.completions]
        _must_fit(turned, self._reverse)
        logp_N = Reference(self._reverse, self._adapter).logprobs(turned)
        scores: list[float] = Ragged([c.actions for c in completions(turned)]).sum(logp_N.double()).tolist()
        return scores

    def by_group(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """[P][G] the scores by group."""
        return _nested(self.scores(groups), groups)

    def step_scores(self, groups: Sequence[Group], step_end: str) -> list[list[float]]:  # noqa: ARG002
        """Not supported.

        Raises:
            ModelError: always.
        """
        raise ModelError("a model of reversed text scores whole completions; name a process reward model for steps")

    def _prompt(self, group: Group) -> Group:
        """The reversed text as a group: the completion is its prompt, the prompt its completion."""
        turned = backwards(group, self._codec)
        ids = np.concatenate([turned.prompt, turned.completions[0].ids])
        # Without a begin token, an empty completion leaves only the prompt's last token to start from.
        cut = max(1, len(ids) - 1 - len(_without(group.prompt, self._codec.tokenizer.bos_token_id)))
        return Group(ids[:cut], (Completion(ids[cut:], (True,) * (len(ids) - cut)),))


AnyJudge = RewardModelJudge | ReverseJudge


def load_judge(
    folder: Path,
    settings: Model,
    policy: Policy,
    *,
    name: str = "reward",
    step_end: str | None = None,
    device: torch.device | None = None,
    shares: bool = True,
) -> AnyJudge:
    """The judge saved in `folder`, for completions of `policy`; it shares the policy's base if it can.

    Args:
        folder: its checkpoint.
        settings: the recipe's `model` section.
        policy: writes the completions.
        name: of its adapter on the shared base.
        step_end: see `RewardModelJudge`.
        device: where to put a model of its own; by default the policy's.
        shares: False gives it a model of its own in any case, which another thread than the policy's may use.

    Raises:
        ModelError: it cannot be loaded, or is neither a reward model nor a model of reversed text.
    """
    # It keeps its own chat template, and its float32 weights if it was fully trained.
    settings = settings.model_copy(update={"chat_template": None, "lora": None})
    device = device or policy.device
    if is_backwards(folder):
        if shares and policy.has_adapter and same_base(folder, policy):
            adapters.add_saved_adapter(policy.model, name, folder)
            return ReverseJudge(policy, name, policy.tokenizer)
        half = policy.in_bfloat16
        reverse = load_policy(folder, settings, bfloat16=half, device=device, trainable=False, backwards=True)
        return ReverseJudge(reverse, adapters.POLICY if reverse.has_adapter else None, policy.tokenizer)
    model = load_value_head_model(
        folder, settings, share_with=policy if shares else None, name=name, bfloat16=policy.in_bfloat16, device=device
    )
    return RewardModelJudge(model, policy.tokenizer, step_end)


def _nested(scores: Sequence[float], groups: Sequence[Group]) -> list[list[float | None]]:
    every = iter(scores)
    return [[next(every) for _ in group.completions] for group in groups]


def _without(prompt: Ids, begin: int | None) -> Ids:
    return prompt[1:] if begin is not None and prompt[0] == begin else prompt


def _must_fit(groups: Sequence[Group], model: Policy) -> None:
    longest = max((len(g.prompt) + len(c.ids) for g in groups for c in g.completions), default=0)
    if longest > model.max_positions:
        raise ModelError(
            f"a prompt with its completion has {longest} tokens and the reward model reads {model.max_positions}; "
            "lower max_new_tokens, or take another reward model"
        )


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same ids and render conversations alike."""
    return one is other or (
        one.get_vocab() == other.get_vocab()
        and one.eos_token_id == other.eos_token_id
        and getattr(one, "chat_template", None) == getattr(other, "chat_template", None)
    )


def reread(group: Group, writer: Any, codec: Codec) -> list[Group]:
    """A group re-encoded from text with another tokenizer; one group, if all completions get the same prompt.

    A completion that was truncated gets no end token.
    """
    prompt = _prompt(group, writer)
    alone = [_reread(prompt, c, group.example, codec) for c in group.completions]
    if len({g.prompt.tobytes() for g in alone}) == 1:
        return [replace(alone[0], completions=tuple(completions(alone)))]
    return alone


def _reread(prompt: Any, completion: Completion, example: Mapping[str, Any], codec: Codec) -> Group:
    location = "what the reward model reads"
    text = completion.text
    for stop in codec.tokenizer.convert_ids_to_tokens(list(codec.stops)):
        text = text.replace(stop, "")  # for this tokenizer it would end the answer
    row = {**example, "prompt": prompt, "completion": text}
    if not text.strip():
        # Formats have no empty turn: an empty answer is its end token alone.
        end = codec.stops[-1]
        read = replace(encode(row, Format.prompt, codec, location), completions=(Completion((end,), (True,)),))
    else:
        read = encode(row, Format.completion, codec, location)
    if completion.finish != "length":
        return read
    return replace(read, completions=(_left_open(read.completions[0], codec.stops),))


def _left_open(completion: Completion, stops: Sequence[int]) -> Completion:
    """The completion up to the token that ends it."""
    at = max(i for i, token in enumerate(completion.ids) if token in stops)
    return replace(completion, ids=completion.ids[:at], action=completion.action[:at])


def _prompt(group: Group, writer: Any) -> Any:
    """The prompt as its row has it; of a group without a row, its text."""
    messages = group.example.get("messages")
    if "prompt" in group.example:
        return group.example["prompt"]
    if messages:
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return writer.decode(group.prompt.tolist())
