from engines import local
from stubs import tiny_policy

from rlpost.engine.collect import best_of, collect
from rlpost.engine.params import Sampling
from rlpost.types import Completion, Group

PROMPTS = [Group((1 + i, 2, 3), (), {"number": i}) for i in range(5)]
SAMPLING = Sampling(max_new_tokens=6)


def test_groups_keep_prompt_and_example_and_gain_completions():
    groups = collect(local(tiny_policy()), PROMPTS, 3, SAMPLING, seed=1)
    assert [tuple(g.prompt) for g in groups] == [tuple(g.prompt) for g in PROMPTS]
    assert [g.example["number"] for g in groups] == [0, 1, 2, 3, 4]
    assert [len(g.completions) for g in groups] == [3] * 5
    assert len({tuple(c.ids) for g in groups for c in g.completions}) > 10


def test_parts_give_what_the_whole_gives_and_another_seed_something_else():
    engine = local(tiny_policy())
    whole = ids(collect(engine, PROMPTS, 2, SAMPLING, seed=1))
    parts = collect(engine, PROMPTS[:2], 2, SAMPLING, seed=1) + collect(
        engine, PROMPTS[2:], 2, SAMPLING, seed=1, first=2
    )
    assert ids(parts) == whole
    assert ids(collect(engine, PROMPTS, 2, SAMPLING, seed=2)) != whole


def test_equal_prompts_at_different_places_are_sampled_independently():
    a, b = collect(local(tiny_policy()), [PROMPTS[0], PROMPTS[0]], 1, SAMPLING, seed=1)
    assert tuple(a.completions[0].ids) != tuple(b.completions[0].ids)


def test_best_of_takes_the_highest_reward_and_never_an_unscored_one():
    c = [Completion((i,), (True,)) for i in range(4)]
    groups = [Group((9,), tuple(c)), Group((8,), tuple(c)), Group((7,), tuple(c))]
    best = best_of(groups, [[0.0, 2.0, None, 2.0], [None, -3.0, None, -5.0], [None, None, None, None]])
    assert [g.completions for g in best] == [(c[1],), (c[1],), (c[0],)]
    assert [tuple(g.prompt) for g in best] == [(9,), (8,), (7,)]


def ids(groups):
    return [[tuple(c.ids) for c in g.completions] for g in groups]
