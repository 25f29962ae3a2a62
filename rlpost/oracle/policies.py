"""Two kinds of policy on a tree: a table of logits, and a tiny real model behind `Policy.forward`.

Axes: X states, V tokens, N actions of all leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlpost.oracle.tree import END, Tree
from rlpost.types import Completion, Group

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2},
    "llama": {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
"""Configurations of the tiny models, by family."""
SCALE = 2.0
"""Factor on random weight matrices: at their usual size, a model hardly depends on earlier tokens."""


class TreePolicy(Protocol):
    """A policy for the oracle; both methods return tensors with gradient."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters that gradients are taken by."""
        ...

    def logp_XV(self) -> Tensor:
        """Log-probabilities in every state, from which the truth is computed."""
        ...

    def logp_N(self) -> Tensor:
        """Log-probability of every action of every leaf, by the code that stages train with."""
        ...


class Table:
    """One logit for each state and token."""

    def __init__(self, tree: Tree, logits_XV: Tensor) -> None:
        self.tree = tree
        self.logits_XV = logits_XV.detach().clone().requires_grad_()

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The logits."""
        return [self.logits_XV]

    def logp_XV(self) -> Tensor:
        """[X, V]."""
        return self.logits_XV.log_softmax(1)

    def logp_N(self) -> Tensor:
        """[N]."""
        return self.logp_XV()[self.tree.state_N, self.tree.token_N]


class TinyModel:
    """A randomly initialised transformers model in float64 inside the real `Policy`.

    Estimators use `Policy.forward` on one group with every leaf as a completion: flat rows, a shared prompt, a tiled
    head. The truth is computed from the model's own plain forward pass, by prefix and without padding.
    """

    def __init__(self, tree: Tree, family: str, seed: int, tool: tuple[int, ...] = ()) -> None:
        """Make a model.

        Args:
            tree: its leaves are the completions.
            family: a key of CONFIGS.
            seed: of its weights.
            tool: tokens of an environment after every completion's first token, if that is not the end.
        """
        # Here, because transformers takes seconds to import and tables do without it.
        from rlpost.policy.check import check_exactness
        from rlpost.policy.policy import Policy

        self.tree = tree
        self.tool = tool
        self.prompt = (1, tree.vocabulary - 1)
        model = _made(family, tree, seed, len(self.prompt) + len(tool))
        exact = check_exactness(model, _EndToken)
        assert exact.flat, exact.reason
        assert exact.tiled
        self.policy = Policy(model, _EndToken, flat=True)
        self.group = Group(self.prompt, tuple(self._completions()))

    @property
    def parameters(self) -> Sequence[Tensor]:
        """All weights."""
        return list(self.policy.parameters())

    def logp_N(self) -> Tensor:
        """[N], as a stage's update computes it."""
        found: Tensor = self.policy(self.policy.batch([self.group])).logp_N
        self.policy.backward_done()
        return found

    def logp_XV(self) -> Tensor:
        """[X, V], from the states of each length in one plain batch."""
        return self._plain(lambda ids: self.policy.model(input_ids=ids, use_cache=False).logits).log_softmax(-1)

    def hidden_XD(self) -> Tensor:
        """[X, D] the last hidden state, from the states of each length in one plain batch."""
        trunk = self.policy.causal_lm.base_model
        return self._plain(lambda ids: trunk(input_ids=ids, use_cache=False).last_hidden_state)

    def _plain(self, run: Callable[[Tensor], Tensor]) -> Tensor:
        """[X, …] what comes out after the last token of every state."""
        from rlpost.policy.attention import FLAT, PLAIN, use_attention

        use_attention(self.policy.model, PLAIN)
        found = []
        for length in range(self.tree.depth):
            ids = torch.tensor([[*self.prompt, *self._with_tool(p)] for p in self.tree.prefixes(length).tolist()])
            found.append(run(ids)[:, -1])
        use_attention(self.policy.model, FLAT)
        return torch.cat(found)

    def _completions(self) -> list[Completion]:
        pieces = torch.split(self.tree.token_N, self.tree.length_L.tolist())
        made = []
        for tokens in (piece.tolist() for piece in pieces):
            ids = self._with_tool(tokens)
            acted = [True] + [False] * (len(ids) - len(tokens)) + [True] * (len(tokens) - 1)
            made.append(Completion(tuple(ids), tuple(acted)))
        return made

    def _with_tool(self, tokens: list[int]) -> list[int]:
        return tokens if not tokens or tokens[0] == END else [tokens[0], *self.tool, *tokens[1:]]


class _EndToken:
    """A tokenizer for a `Policy` that decodes no text."""

    eos_token_id = END

    @staticmethod
    def decode(ids: Sequence[int], **_: Any) -> str:
        """The ids as text."""
        return " ".join(map(str, ids))


def _made(family: str, tree: Tree, seed: int, extra: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlpost.policy.load import remove_dropout

    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    longest = max(24, tree.depth + extra)
    sizes = {"vocab_size": tree.vocabulary, "max_position_embeddings": longest}
    config = AutoConfig.for_model(family, **CONFIGS[family], **sizes, **special)
    # Restores the global generator afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(SCALE)
    remove_dropout(model)
    return model.eval()
