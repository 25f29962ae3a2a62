"""Saved value networks for guided decoding, and the form in which they read their goal.

Axes: B rows, K candidates a row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from rlpost.data.codec import Codec, make_codec
from rlpost.errors import EngineError, ModelError
from rlpost.goals.goal_set import Goal
from rlpost.goals.guide import Guide, Mode, Position
from rlpost.goals.network_rows import NetworkRows, full_precision
from rlpost.goals.params import ValueTarget
from rlpost.policy.attention import flat_attention
from rlpost.policy.branches import branches_well
from rlpost.policy.judge import same_tokens
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.value_head import ValueHeadModel, load_value_head_model
from rlpost.types import Completion, Group

SETTINGS_FILE = "value.json"
GOAL = "{goal}"


@dataclass(frozen=True)
class ValueSettings:
    """How a value network was trained; saved with it."""

    condition: str | None
    """The text before the prompt that names the goal, as in the recipe."""
    avoid: bool
    target: str
    truncated_counts: bool
    """A truncated completion could reach the goal."""

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint's folder."""
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(self)), "utf-8")


def read_settings(folder: Path) -> ValueSettings:
    """The settings of the value network in `folder`.

    Raises:
        ModelError: it is not a value network.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise ModelError(f"{folder}: no value network, since it has no {SETTINGS_FILE}; name a stage of kind value")
    return ValueSettings(**json.loads(file.read_text("utf-8")))


def conditioned(condition: str | None, goal: Sequence[int], prompt: Sequence[int], codec: Codec) -> tuple[int, ...]:
    """The prompt as a value network reads it: begin token, the `condition` text with the goal, the rest."""
    if condition is None:
        return tuple(prompt)
    before, after = (codec.ids(text, "condition") for text in condition.split(GOAL, 1))
    begins = len(codec.begin) if tuple(prompt[: len(codec.begin)]) == codec.begin else 0
    return (*prompt[:begins], *before, *goal, *after, *prompt[begins:])


class ValueNetwork:
    """A saved value network, for one goal."""

    def __init__(self, network: ValueHeadModel, settings: ValueSettings, goal: Sequence[int]) -> None:
        """Use `network` for `goal`, which it reads if it was trained with a `condition`."""
        self._model = network
        self.settings = settings
        self._goal = tuple(goal)
        self._codec = make_codec(network.trunk.tokenizer)

    def about(self, goal: Sequence[int]) -> ValueNetwork:
        """The same network for another goal."""
        return ValueNetwork(self._model, self.settings, goal)

    def logits(self, states: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
        """[X] logits of states, each a prompt and the tokens after it, in float64."""
        # The action does not matter: only the state before it is read.
        rows = [
            Group(
                self._read(prompt),
                (Completion((*written, 0), (False,) * len(written) + (True,)),),
            )
            for prompt, written in states
        ]
        return self._model.score(rows).before_N.double()

    def ahead(self, positions: Sequence[Position], candidate_BK: Tensor) -> Tensor:
        """[B, K] log of the value, in float64: the `LogWeights` of a `Guide`, by one pass over whole texts."""
        groups = [
            Group(
                self._read(row.prompt) + row.ids,
                tuple(Completion((token,), (True,)) for token in candidates),
            )
            for row, candidates in zip(positions, candidate_BK.tolist(), strict=True)
        ]
        trunk = self._model.trunk
        # The network may share the base of a policy that is decoding with another attention.
        attention = flat_attention(trunk.causal_lm) if trunk.flat else nullcontext()
        with full_precision(trunk.device), attention:
            logit_BK = self._model.score(groups).after_N.view(candidate_BK.shape)
        return self._log_value(logit_BK)

    def follow(self, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int], limit: int) -> NetworkRows | None:
        """The rows' values token by token, with a cache; see `guide.Follow`.

        Raises:
            EngineError: they may become longer than the network reads.
        """
        whole = [self._read(prompt) for prompt in prompts]
        trunk, longest = self._model.trunk, max(map(len, whole)) + limit
        if longest > trunk.max_positions:
            raise EngineError(
                f"a text of {longest} tokens, its goal among them, is beyond the {trunk.max_positions} that the value "
                "network reads; lower sampling.max_new_tokens, or leave out longer prompts"
            )
        if not branches_well(trunk, longest, min(map(len, whole))):
            return None
        return NetworkRows(self._model, self._log_value, whole, prompt_of_row, limit)

    def guide(self, goal: Goal, end_ids: Collection[int], candidates: int) -> Guide:
        """The guide toward or away from the goal, as the network was trained, with so many candidates (0: all)."""
        settings = self.settings
        return Guide(
            self.ahead,
            goal,
            end_ids,
            Mode.away if settings.avoid else Mode.toward,
            candidates=candidates,
            truncated_counts=settings.truncated_counts,
            follow=self.follow,
        )

    def _read(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return conditioned(self.settings.condition, self._goal, prompt, self._codec)

    def _log_value(self, logit: Tensor) -> Tensor:
        """In float64, on the CPU."""
        # A contrastive logit is a log-value up to a constant, which does not change guiding.
        logit = logit.cpu().double()
        return logit if self.settings.target == ValueTarget.contrastive else F.logsigmoid(logit)


def load_value(folder: Path, policy: Policy, goal: Sequence[int], *, avoid: bool) -> ValueNetwork:
    """The value network saved in `folder`, to guide `policy`; it shares the policy's base if it can.

    Args:
        folder: its checkpoint.
        policy: to guide.
        goal: tokens of the goal, for a network that reads it.
        avoid: the network must give the probability of not reaching the goal.

    Raises:
        ModelError: it cannot be loaded, is not a value network, or was trained for the other direction.
    """
    settings = read_settings(folder)
    if settings.avoid != avoid:
        trained, wanted = ("avoid", "--goal") if settings.avoid else ("reach", "--avoid")
        raise ModelError(f"{folder}: trained to {trained} its goals, and {wanted} asks for the other; train one for it")
    network = load_value_head_model(
        folder,
        Model(fast=policy.blocks),
        share_with=policy,
        name="value",
        bfloat16=policy.in_bfloat16,
        device=policy.device,
    )
    if not same_tokens(network.trunk.tokenizer, policy.tokenizer):
        raise ModelError(f"{folder}: its tokenizer is not that of the model it should guide; train it on that model")
    return ValueNetwork(network, settings, goal)
