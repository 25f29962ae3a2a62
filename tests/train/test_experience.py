"""Cutting and splitting: which completions go together, and that their numbers go with them."""

import pytest
import torch

from rlpost.train.experience import Experience
from rlpost.types import Completion, Group, completions


def completion(*ids: int, action=None) -> Completion:
    return Completion(ids, action or (True,) * len(ids))


# Prompts of 3, 2 and 1 tokens. S = 5, P = 3, N = 2 + 1 + 3 + 2 + 1 = 9 (token 13 is a tool's).
GROUPS = (
    Group((1, 2, 3), (completion(10, 11), completion(12, 13, action=(True, False)), completion(14, 15, 16))),
    Group((4, 5), (completion(20, 21),)),
    Group((6,), (completion(30),)),
)
ACTIONS = [10, 11, 12, 14, 15, 16, 20, 21, 30]


def make(needed=None) -> Experience:
    experience = Experience(GROUPS, needed_S=needed)
    return experience.with_actions(token=torch.tensor(ACTIONS)).with_groups(first=torch.tensor([1, 4, 6]))


def ids(part: Experience) -> list[list[tuple[int, ...]]]:
    return [[tuple(c.ids) for c in g.completions] for g in part.groups]


def same(groups: tuple[Group, ...], others: tuple[Group, ...]) -> bool:
    return len(groups) == len(others) and all(g.same(o) for g, o in zip(groups, others, strict=True))


def acted(part: Experience) -> list[int]:
    """Tokens of the part's actions, read off its groups."""
    return [t for c in completions(part.groups) for t, a in zip(c.ids, c.action, strict=True) if a]


def tokens(part: Experience, shared: bool) -> int:
    return sum(len(g.prompt) * (1 if shared else len(g.completions)) for g in part.groups) + sum(
        len(c.ids) for c in completions(part.groups)
    )


def test_rows_count_actions_and_not_tokens():
    assert make().rows.lengths_S.tolist() == [2, 1, 3, 2, 1]


def test_values_are_found_by_name():
    experience = make()
    assert experience["token"].tolist() == ACTIONS
    assert experience["first"].tolist() == [1, 4, 6]
    with pytest.raises(KeyError):
        experience["advantage"]


def test_a_budget_for_everything_gives_one_part():
    (part,) = make().cut(100)
    assert same(part.groups, GROUPS)
    assert acted(part) == ACTIONS


def test_a_group_over_the_budget_is_cut_between_completions_and_its_prompt_repeats():
    # Prompt 3 + 2 + 2 = 7 fits; 3 more do not: they open a part with the prompt again (6), to which 2 + 2 (10)
    # do not fit at 9; the last group adds 1 + 1 to 4.
    parts = make().cut(9)
    assert [ids(p) for p in parts] == [[[(10, 11), (12, 13)]], [[(14, 15, 16)]], [[(20, 21)], [(30,)]]]
    assert [tuple(p.groups[0].prompt) for p in parts] == [(1, 2, 3), (1, 2, 3), (4, 5)]


def test_the_budget_is_used_to_its_last_token():
    assert len(make().cut(16)) == 1  # 3 + 7, 2 + 2, 1 + 1
    assert len(make().cut(15)) == 2


def test_whole_groups_are_never_cut_whatever_the_budget():
    parts = make().cut(1, whole_groups=True)
    assert all(same(p.groups, (g,)) for p, g in zip(parts, GROUPS, strict=True))


def test_parts_are_of_about_equal_size():
    """The largest one decides how much memory an update takes: 30 tokens in two parts, and not 24 and 6."""
    groups = tuple(Group((1,), (Completion((5, 6), (True, True)),)) for _ in range(10))
    assert [tokens(part, True) for part in Experience(groups).cut(24)] == [18, 12]
    assert [tokens(part, True) for part in Experience(groups).cut(100)] == [30]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("budget", [1, 5, 6, 9, 11, 14, 100])
def test_parts_stay_within_the_budget_or_hold_one_completion(budget, shared):
    parts = make().cut(budget, shared_prompts=shared)
    for part in parts:
        assert tokens(part, shared) <= budget or len(completions(part.groups)) == 1
    assert [t for p in parts for t in acted(p)] == ACTIONS


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("budget", [1, 6, 9, 14, 100])
def test_values_follow_their_actions_and_groups(budget, whole):
    for part in make().cut(budget, whole_groups=whole):
        assert part["token"].tolist() == acted(part)
        assert part["first"].tolist() == [g.prompt[0] for g in part.groups]
        assert part.rows.actions == len(part["token"])


def test_prompts_that_are_not_shared_cost_their_tokens_each_time():
    assert ids(make().cut(10, shared_prompts=True)[0]) == [[(10, 11), (12, 13), (14, 15, 16)]]
    assert ids(make().cut(10, shared_prompts=False)[0]) == [[(10, 11), (12, 13)]]  # 3 + 2 + 3 + 2

    # As whole groups they cost 3 * 3 + 7 = 16, 2 + 2 = 4 and 1 + 1 = 2, and 16 in all when shared.
    assert [len(p.groups) for p in make().cut(18, whole_groups=True, shared_prompts=False)] == [1, 2]
    assert [len(p.groups) for p in make().cut(18, whole_groups=True, shared_prompts=True)] == [3]


def test_completions_that_are_not_needed_are_left_out():
    parts = make((True, False, True, False, True)).cut(100)
    assert [ids(p) for p in parts] == [[[(10, 11), (14, 15, 16)], [(30,)]]]
    assert parts[0]["token"].tolist() == [10, 11, 14, 15, 16, 30]
    assert parts[0]["first"].tolist() == [1, 6]
    assert parts[0].needed_S == (True, True, True)


def test_a_whole_group_stays_whole_if_one_of_its_completions_is_needed():
    (part,) = make((False, True, False, False, False)).cut(100, whole_groups=True)
    assert same(part.groups, GROUPS[:1])
    assert part.needed_S == (False, True, False)


def test_nothing_needed_gives_no_part():
    assert make((False,) * 5).cut(100) == []
    assert make((False,) * 5).cut(100, whole_groups=True) == []


def test_split_deals_out_whole_groups_once_each_with_their_values():
    many = Experience(tuple(Group((i, i), (completion(100 + i), completion(200 + i))) for i in range(7)))
    many = many.with_actions(token=torch.tensor([t for i in range(7) for t in (100 + i, 200 + i)]))
    shares = many.split(3, seed=5)
    assert sorted(len(s.groups) for s in shares) == [2, 2, 3]
    assert sorted(g.prompt[0] for s in shares for g in s.groups) == list(range(7))
    for share in shares:
        assert share["token"].tolist() == acted(share)
    again = many.split(3, seed=5)
    assert all(same(a.groups, s.groups) for a, s in zip(again, shares, strict=True))
    assert not all(same(a.groups, s.groups) for a, s in zip(many.split(3, seed=6), shares, strict=True))


def test_split_in_one_is_the_same_and_in_too_many_leaves_none_empty():
    experience = make()
    assert experience.split(1, seed=0) == [experience]
    assert [len(s.groups) for s in experience.split(5, seed=0)] == [1, 1, 1]
