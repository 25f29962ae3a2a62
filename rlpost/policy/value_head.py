"""A value head: one number for every state, as critics, reward models and process reward models give.

The trunk is a policy's model; with LoRA it may share the base with that policy, under an adapter of its own. The
head is one linear layer on the last hidden state.

Axes: N action tokens, S completions, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlpost.errors import ModelError
from rlpost.policy import adapters, pissa
from rlpost.policy.adapter_files import first_line
from rlpost.policy.batch import Batch
from rlpost.policy.load import HEAD_FILE, load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.recognise import layer_matrices
from rlpost.policy.reference import same_base
from rlpost.policy.score import over_passes
from rlpost.types import Group


class Values(NamedTuple):
    """Values of a batch's states."""

    before_N: Tensor
    """[N] the value of the state in which each action was taken."""
    after_N: Tensor
    """[N] the value of the state after each action."""
    final_S: Tensor
    """[S] the value of the state after each completion's last token, an action or not."""


class ValueHeadModel(nn.Module):
    """A trunk with a linear value head."""

    def __init__(self, trunk: Policy, adapter: str | None = adapters.POLICY, *, trains_trunk: bool = True) -> None:
        """Put a new head on `trunk`.

        Args:
            trunk: gives the hidden states; it may be a policy that is trained at the same time, if `adapter` is
                not the policy's.
            adapter: the active adapter (with LoRA).
            trains_trunk: False trains the head alone.
        """
        super().__init__()
        # In a tuple, so that a trunk shared with a policy is not part of this module.
        self._trunk = (trunk,)
        self.adapter = adapter
        self.trains_trunk = trains_trunk
        embedding = trunk.causal_lm.get_input_embeddings().weight
        width = trunk.causal_lm.config.get_text_config().hidden_size
        dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        self.head = nn.Linear(width, 1, dtype=dtype)
        # Small first values: 1/(D + 1) as in Stiennon et al. 2020, arXiv:2009.01325, appendix.
        nn.init.normal_(self.head.weight, std=1 / (width + 1))
        nn.init.zeros_(self.head.bias)
        self.head.to(embedding.device)

    @property
    def trunk(self) -> Policy:
        """The policy that gives the hidden states."""
        return self._trunk[0]

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.trunk.device

    @property
    def shares_prompts(self) -> bool:
        """Whether the trunk computes a prompt once for its completions."""
        return self.trunk.shares_prompts

    def batch(self, groups: Sequence[Group]) -> Batch:
        """The batch that the forward pass takes."""
        return self.trunk.batch(groups)

    def trained(self) -> dict[str, nn.Parameter]:
        """The head, and the trunk's adapter or weights without the layer that makes logits."""
        head = {f"head.{n}": p for n, p in self.head.named_parameters()}
        if not self.trains_trunk:
            return head
        named = {n: p for n, p in self.trunk.named_parameters() if p.requires_grad}
        if self.trunk.has_adapter:
            return {n: p for n, p in named.items() if adapters.belongs(n, str(self.adapter))} | head
        model = self.trunk.causal_lm
        unused = {id(model.get_output_embeddings().weight)} - {id(model.get_input_embeddings().weight)}
        return {n: p for n, p in named.items() if id(p) not in unused} | head

    def layer_matrices(self) -> frozenset[str]:
        """Which of `trained()` are matrices of the trunk's linear layers; the head is none."""
        return layer_matrices(self.trunk.causal_lm, self.trained())

    def forward(self, batch: Batch) -> Values:
        """The values of the states before and after every action, and at every end."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_trunk):
            hidden_TD = self.trunk.states(batch, self.adapter)
        value_T = self.head(hidden_TD)[:, 0]
        return Values(value_T[batch.before_N], value_T[batch.after_N], value_T[batch.after_S])

    @property
    def in_shards(self) -> bool:
        """Every pass gathers the trunk's weights from all ranks."""
        return self.trunk.in_shards

    def in_turn(self, *, gradient: bool = False) -> AbstractContextManager[None]:
        """Inside, ranks may make different numbers of passes."""
        return self.trunk.in_turn(gradient=gradient and self.trains_trunk)

    def backward_done(self) -> None:
        """The backward pass of the last forward pass is over: the policy's adapter is active again."""
        self.trunk.backward_done()

    def train(self, mode: bool = True) -> ValueHeadModel:
        """Dropout of the trunk on or off."""
        self.trunk.train(mode)
        return super().train(mode)

    @torch.no_grad()
    def score(self, groups: Sequence[Group], budget: int = 16384) -> Values:
        """`forward` over any number of groups, without gradient, on the CPU."""
        pieces = over_passes(self.trunk, groups, budget, lambda some: [x.cpu() for x in self(self.batch(some))])
        return Values(*(torch.cat(column) for column in zip(*pieces, strict=True)))

    def save(self, folder: Path) -> None:
        """Write the head into a checkpoint's folder."""
        state = {name: x.detach().cpu().contiguous() for name, x in self.head.state_dict().items()}
        save_file(state, folder / HEAD_FILE)

    def load_head(self, folder: Path) -> None:
        """Read the head from a checkpoint's folder.

        Raises:
            ModelError: it holds none, or one of another width.
        """
        self.head.load_state_dict(read_head(folder, self.head.in_features))


def initial_of(model: object) -> pissa.Initial | None:
    """What acts beside a trained model's adapter and no update changes, if that began as a part of the weights."""
    trunk = model.trunk if isinstance(model, ValueHeadModel) else model
    return pissa.Initial(trunk.model) if isinstance(trunk, Policy) and pissa.is_in(trunk.model) else None


def read_head(folder: Path, width: int) -> dict[str, Any]:
    """A saved value head.

    Raises:
        ModelError: the folder holds none, or one of another width.
    """
    file = folder / HEAD_FILE
    if not file.is_file():
        raise ModelError(f"{folder}: no reward model or critic, since it has no {HEAD_FILE}; name a reward model")
    try:
        state: dict[str, Any] = load_file(file)
        found = state["weight"].shape[1]
        sound = {name: tuple(x.shape) for name, x in state.items()} == {"weight": (1, found), "bias": (1,)}
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(f"{file}: cannot be read: {first_line(error)}; restore it from where it came") from error
    if not sound or not all(x.is_floating_point() and bool(x.isfinite().all()) for x in state.values()):
        raise ModelError(f"{file}: does not hold the finite weight and bias of a value head; restore it")
    if found != width:
        raise ModelError(f"{folder}: its head reads {found} numbers a state but the model gives {width}")
    return state


def load_value_head_model(
    folder: Path,
    settings: Model,
    *,
    share_with: Policy | None = None,
    name: str = "reward",
    bfloat16: bool,
    device: Any,
) -> ValueHeadModel:
    """A saved model with a value head, frozen.

    Args:
        folder: its checkpoint.
        settings: the recipe's `model` section.
        share_with: a policy whose base it may share, if both are adapters of one model.
        name: of its adapter on that base.
        bfloat16: run under autocast.
        device: where to put it.

    Raises:
        ModelError: it cannot be loaded, or has no value head.
    """
    if share_with is not None and same_base(folder, share_with):
        adapters.add_saved_adapter(share_with.model, name, folder)
        model = ValueHeadModel(share_with, name, trains_trunk=False)
    else:
        trunk = load_policy(folder, settings, bfloat16=bfloat16, device=device, trainable=False, value_head=True)
        model = ValueHeadModel(trunk, adapters.POLICY, trains_trunk=False)
    model.load_head(folder)
    return model.requires_grad_(False).eval()


def make_critic(
    policy: Policy, start: Path, reward_model: Path | None, settings: Model, *, trains_trunk: bool
) -> ValueHeadModel:
    """A critic for a policy that was just loaded from `start`.

    With LoRA it is a second adapter on the policy's base, at first a copy of the policy's; with full fine-tuning, a
    second model. The two are never one trunk: the value's gradient would move the policy (docs/adr/0008).

    Args:
        policy: as loaded.
        start: the checkpoint it came from.
        reward_model: to start from instead, its head included.
        settings: the recipe's `model` section.
        trains_trunk: False trains the head alone, on frozen features.

    Raises:
        ModelError: it cannot be loaded.
    """
    if policy.has_adapter and reward_model is None:
        state = adapters.adapter_state(policy.model, adapters.POLICY)
        adapters.add_adapter(policy.model, adapters.CRITIC, state, trainable=trains_trunk)
    elif policy.has_adapter and reward_model is not None and same_base(reward_model, policy):
        adapters.add_saved_adapter(policy.model, adapters.CRITIC, reward_model, trainable=trains_trunk)
    else:
        trunk = load_policy(
            reward_model or start,
            settings,
            bfloat16=policy.in_bfloat16,
            device=policy.device,
            trainable=trains_trunk,
            value_head=reward_model is not None,
        )
        critic = ValueHeadModel(trunk, adapters.POLICY, trains_trunk=trains_trunk)
        return _with_head(critic, reward_model)
    return _with_head(ValueHeadModel(policy, adapters.CRITIC, trains_trunk=trains_trunk), reward_model)


def _with_head(critic: ValueHeadModel, reward_model: Path | None) -> ValueHeadModel:
    if reward_model is not None:
        critic.load_head(reward_model)
    return critic.eval()
