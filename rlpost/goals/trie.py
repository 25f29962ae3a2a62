"""A trie of token sequences in three flat arrays: nine bytes a node, whatever the number of sequences.

Axes: M members, X nodes, E = X − 1 edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

ROOT = 0


class Trie:
    """A set of sequences, searched from their first token.

    Nodes are numbered level by level and, within a level, in the order of their sequences; so edge e leads to node
    e + 1, the edges of a node lie side by side sorted by token, and no pointers are kept.
    Example: of (3, 5), (3, 6) and (4,) the edges are 3, 4, 5, 6, the first edges of the nodes 0, 2, 4, 4, 4, and
    members end in the nodes 2, 3 and 4.
    """

    def __init__(self, members: Sequence[Sequence[int]]) -> None:
        """Sort and number; duplicates count once. No member is empty."""
        self.token_E: NDArray[np.int32]
        self.first_X: NDArray[np.int32]
        self.ends_X: NDArray[np.bool_]
        self._build(*_padded(members))

    def _build(self, token_ML: NDArray[np.int32], length_M: NDArray[np.int32]) -> None:
        """Number the nodes of sorted members, a level at a time."""
        node_M = np.zeros(len(length_M), np.int32)  # where each member stands, ROOT at first
        tokens, counts, ends = [], [], [np.zeros(1, np.bool_)]
        before, first = 0, 0  # nodes in earlier levels, and in this one
        width = 1
        for level in range(token_ML.shape[1]):
            going = length_M > level
            token_G, node_G = token_ML[going, level], node_M[going]
            new_G = np.ones(len(token_G), np.bool_)
            new_G[1:] = (token_G[1:] != token_G[:-1]) | (node_G[1:] != node_G[:-1])
            tokens.append(token_G[new_G])
            counts.append(np.bincount(node_G[new_G] - first, minlength=width))
            before = first + width
            node_M[going] = before + np.cumsum(new_G) - 1
            first, width = before, int(new_G.sum())
            ended = np.zeros(width, np.bool_)
            ended[node_M[length_M == level + 1] - first] = True
            ends.append(ended)
        self.token_E = np.concatenate([*tokens, np.zeros(0, np.int32)])
        # The last level's nodes have no edges.
        count_X = np.concatenate([*counts, np.zeros(width, np.int64)])
        self.first_X = np.concatenate([[0], np.cumsum(count_X)]).astype(np.int32)
        self.ends_X = np.concatenate(ends)

    @property
    def depth(self) -> int:
        """Tokens of the longest member."""
        depth, node = 0, ROOT
        while self.first_X[node] < len(self.token_E):
            # The first node of the next level is the one that the level's first edge leads to.
            node = int(self.first_X[node]) + 1
            depth += 1
        return depth

    @property
    def bytes(self) -> int:
        """Memory of the arrays."""
        return self.token_E.nbytes + self.first_X.nbytes + self.ends_X.nbytes

    def step(self, node: int, token: int) -> int | None:
        """The node that `token` leads to, by binary search among the node's edges; None if no member continues so."""
        low, high = int(self.first_X[node]), int(self.first_X[node + 1])
        at = low + int(np.searchsorted(self.token_E[low:high], token))
        return at + 1 if at < high and self.token_E[at] == token else None

    def matches(self, ids: Iterable[int]) -> bool:
        """True if some first part of `ids` is a member."""
        node = ROOT
        for token in ids:
            child = self.step(node, token)
            if child is None:
                return False
            if self.ends_X[child]:
                return True
            node = child
        return False

    def walks(self, ids: Iterable[int]) -> bool:
        """True if `ids` is the beginning of a member, or all of it."""
        node: int | None = ROOT
        for token in ids:
            node = self.step(node, token) if node is not None else None
        return node is not None


def _padded(members: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """[M, L] the members in lexicographic order, −1 after their ends, and their lengths [M]; each member once."""
    length_M = np.fromiter(map(len, members), np.int32, len(members))
    longest = int(length_M.max(initial=0))
    token_ML = np.full((len(members), longest), -1, np.int32)
    flat = np.fromiter(chain.from_iterable(members), np.int32, int(length_M.sum()))
    token_ML[np.arange(longest) < length_M[:, None]] = flat
    order = np.lexsort(token_ML.T[::-1]) if longest else np.arange(len(members))
    token_ML, length_M = token_ML[order], length_M[order]
    kept = np.ones(len(members), np.bool_)
    kept[1:] = (token_ML[1:] != token_ML[:-1]).any(1)
    return token_ML[kept], length_M[kept]
