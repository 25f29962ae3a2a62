"""Groups with numbers per action or per group: what one optimiser update learns from.

Axes: N action tokens, S completions, P groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlpost import ranks
from rlpost.devices import moved
from rlpost.objectives.ragged import Ragged
from rlpost.types import Group, completions


@dataclass(frozen=True)
class Experience:
    """Groups and what is known of their actions.

    Example: two groups of four completions with 3 actions each have P = 2, S = 8, N = 24;
    ``experience["advantage"]`` is then [24], in the order of the groups' completions.
    """

    groups: tuple[Group, ...]
    per_action: Mapping[str, Tensor] = field(default_factory=dict)
    """Each [N]: advantage, old_logp, reference, weight, …"""
    per_group: Mapping[str, Tensor] = field(default_factory=dict)
    """Each [P]: a pair's weight, …"""
    needed_S: tuple[bool, ...] | None = None
    """[S] False where a completion adds exactly nothing to the gradient and need not be computed."""

    @property
    def rows(self) -> Ragged:
        """Which action belongs to which completion."""
        return Ragged([c.actions for c in completions(self.groups)])

    def __getitem__(self, name: str) -> Tensor:
        """[N] or [P] the values of that name."""
        return self.per_action[name] if name in self.per_action else self.per_group[name]

    def with_actions(self, **values_N: Tensor) -> Experience:
        """The same with more values per action."""
        return replace(self, per_action={**self.per_action, **values_N})

    def with_groups(self, **values_P: Tensor) -> Experience:
        """The same with more values per group."""
        return replace(self, per_group={**self.per_group, **values_P})

    def split(self, parts: int, seed: int) -> list[Experience]:
        """Whole groups, shuffled, in `parts` experiences of about equal size (fewer when there are fewer groups)."""
        if parts == 1:
            return [self]
        order = torch.randperm(len(self.groups), generator=torch.Generator().manual_seed(seed)).tolist()
        shares = [sorted(order[i::parts]) for i in range(parts)]
        return [self._take([(g, None) for g in share]) for share in shares if share]

    def share(self, number: int, of: int, *, whole_groups: bool = False) -> Experience:
        """Share `number` of `of`, cut between completions (`whole_groups`: between groups), of about equal tokens."""
        if of == 1:
            return self
        units = list(self._units(whole_groups))
        costs = [self._tokens(g, members) for g, members in units]
        return self._take(_by_group(units[ranks.shares(costs, of)[number]]))

    def cut(self, budget: int, *, whole_groups: bool = False, shared_prompts: bool = True) -> list[Experience]:
        """Parts of at most `budget` tokens (or one completion), one pass each, of about equal size.

        A group at the end of a part is cut between completions, its prompt then repeats; `whole_groups` forbids that.
        """
        parts: list[list[tuple[int, list[int]]]] = []
        units = list(self._units(whole_groups))
        budget = self._even(budget, units, shared_prompts)
        used = budget + 1
        for g, wanted in units:
            prompt, own = len(self.groups[g].prompt), self._tokens(g, wanted)
            repeats = 1 if shared_prompts else len(wanted)
            open_group = bool(parts) and parts[-1][-1][0] == g and shared_prompts
            cost = own + (0 if open_group else prompt * repeats)
            if used + cost > budget:
                parts.append([(g, list(wanted))])
                used = own + prompt * repeats
                continue
            used += cost
            if parts[-1][-1][0] == g:
                parts[-1][-1][1].extend(wanted)
            else:
                parts[-1].append((g, list(wanted)))
        return [self._take(part) for part in parts]

    def _even(self, budget: int, units: Sequence[tuple[int, Sequence[int]]], shared_prompts: bool) -> int:
        """The budget, or less where equal parts need less: the largest part decides how much memory is taken."""
        every = [self._tokens(g, wanted) for g, wanted in units]
        prompts = {g for g, _ in units} if shared_prompts else [g for g, wanted in units for _ in wanted]
        total = sum(every) + sum(len(self.groups[g].prompt) for g in prompts)
        longest = max((len(self.groups[g].prompt) + own for (g, _), own in zip(units, every, strict=True)), default=0)
        return min(budget, -(-total // max(1, -(-total // budget))) + longest)

    def _tokens(self, group: int, members: Sequence[int]) -> int:
        return sum(len(self.groups[group].completions[c].ids) for c in members)

    def to(self, device: torch.device | str) -> Experience:
        """The same with its tensors on `device`."""
        return replace(
            self,
            per_action={k: moved(v, device) for k, v in self.per_action.items()},
            per_group={k: moved(v, device) for k, v in self.per_group.items()},
        )

    def _units(self, whole_groups: bool) -> Iterator[tuple[int, list[int]]]:
        """(group, completions) that must stay together and add to the gradient."""
        at = 0
        for g, group in enumerate(self.groups):
            members = range(len(group.completions))
            needed = [c for c in members if self.needed_S is None or self.needed_S[at + c]]
            at += len(members)
            if whole_groups and needed:
                yield g, list(members)
            elif not whole_groups:
                for c in needed:
                    yield g, [c]

    def _take(self, chosen: Sequence[tuple[int, Sequence[int] | None]]) -> Experience:
        """The given completions of the given groups (None: all of them), with their values."""
        first = [0]
        for group in self.groups:
            first.append(first[-1] + len(group.completions))
        groups: list[Group] = []
        wanted: list[int] = []
        for g, members in chosen:
            group = self.groups[g]
            indices = range(len(group.completions)) if members is None else members
            groups.append(replace(group, completions=tuple(group.completions[c] for c in indices)))
            wanted.extend(first[g] + c for c in indices)
        lengths = self.rows.lengths_S.tolist()
        index_P = torch.tensor([g for g, _ in chosen], dtype=torch.long)

        def actions(x_N: Tensor) -> Tensor:
            pieces = torch.split(x_N, lengths)
            return torch.cat([pieces[s] for s in wanted]) if wanted else x_N[:0]

        return Experience(
            tuple(groups),
            {k: actions(v) for k, v in self.per_action.items()},
            {k: v[index_P.to(v.device)] for k, v in self.per_group.items()},
            None if self.needed_S is None else tuple(self.needed_S[s] for s in wanted),
        )


def _by_group(units: Sequence[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """Neighbours of one group as one."""
    found: list[tuple[int, list[int]]] = []
    for g, members in units:
        if found and found[-1][0] == g:
            found[-1] = g, found[-1][1] + members
        else:
            found.append((g, members))
    return found
