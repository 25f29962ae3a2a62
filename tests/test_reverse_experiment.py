"""The experiment of docs/reverse.md: its worlds against enumeration, its searches by hand, its judge of legality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from reverse import PROBLEMS, Result, Sample, cases, perfect, reaches_end, search, success
from reverse_worlds import LETTERS, OPERATIONS, SHAPES, Arithmetic, Maze, Problem, World, distances, make_maze, results

KITE = Maze(4, ((1, 2), (0, 2), (0, 1, 3), (2, 4), (3,)), ((0, 4),))
"""A triangle 0 1 2, and a corridor 2 3 4."""
FROM_0_TO_4 = Problem(0, 4, 4, 4)


def walks(maze: Maze, path: tuple[int, ...], steps: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every walk of the teacher that begins with `path`, whose first two cells are given, and its probability."""
    if not steps:
        yield path, 1.0
        return
    onward = [c for c in maze.ways[path[-1]] if c != path[-2]] or list(maze.ways[path[-1]])
    for c in onward:
        for walk, p in walks(maze, (*path, c), steps - 1):
            yield walk, p / len(onward)


def stationary(maze: Maze) -> list[tuple[tuple[int, ...], float]]:
    """Every text of the teacher with its probability; in a maze of two-way ways it begins anywhere on any way."""
    edges = [(a, b) for a, beside in enumerate(maze.ways) for b in beside]
    return [(w[1:], p / len(edges)) for edge in edges for w, p in walks(maze, edge, maze.steps)]


def chance(world: World, problem: Problem, backward: bool) -> float:
    return sum(world.arrivals(problem, backward))


def arithmetic_problem(x: int, y: int, gaps: int) -> Problem:
    return Problem((x, 0), (y, gaps), gaps, 5 * gaps)


def result(solved: list[bool]) -> Result:
    return Result({}, {"forward": solved}, {}, {}, {}, {})


def test_the_chances_of_a_maze_are_those_of_enumeration():
    texts = stationary(KITE)
    assert sum(p for _, p in texts) == pytest.approx(1)
    forward = [(w, p) for w, p in texts if w[0] == 0]
    backward = [(w, p) for w, p in texts if w[-1] == 4]
    for found, given, other, turned in ((forward, 0, 4, False), (backward, 4, 0, True)):
        reached = sum(p for w, p in found if other in w) / sum(p for _, p in found)
        assert chance(KITE, FROM_0_TO_4, turned) == pytest.approx(reached), given


def test_the_chances_of_a_maze_by_hand():
    # From 0 to 1 or 2; from 1 to 2 and then on or back around; from 2 half of the walks turn into the corridor.
    assert KITE.arrivals(FROM_0_TO_4, backward=False) == pytest.approx([0, 0, 1 / 4, 1 / 4])
    # Out of the corridor there is no choice, and either way around the triangle comes to 0.
    assert KITE.arrivals(FROM_0_TO_4, backward=True) == pytest.approx([0, 0, 1 / 2, 1 / 2])


@pytest.mark.parametrize("shape", ["open", "funnel"])
def test_where_ways_lead_both_ways_a_walk_looks_the_same_from_either_end(shape):
    maze = make_maze(shape, 6, seed=0)
    problem = maze.problems[0]
    turned = Problem(problem.goal, problem.start, problem.steps, problem.tokens)
    assert chance(maze, problem, backward=True) == pytest.approx(chance(maze, turned, backward=False))
    assert maze.chain.share_S == pytest.approx(1 / len(maze.chain.share_S))


def test_the_directions_differ_by_the_shares_of_their_ends():
    """Bayes: P(start, t before | goal) = P(goal, t after | start)·P(start)/P(goal), whatever lies between."""
    chain = make_maze("funnel", 6, seed=1).chain
    start, goal = make_maze("funnel", 6, seed=1).ends[0]
    at = {cell: chain.place_S == cell for cell in (start, goal)}
    forward, reverse = (chain.share_S * at[c] / chain.share_S[at[c]].sum() for c in (start, goal))
    for _ in range(8):
        forward, reverse = forward @ chain.move_SS, reverse @ chain.backward.move_SS
        share = chain.share_S[at[start]].sum() / chain.share_S[at[goal]].sum()
        assert reverse[at[start]].sum() == pytest.approx(forward[at[goal]].sum() * share)
    assert reverse[at[start]].sum() > 0
    assert share == pytest.approx(len(make_maze("funnel", 6, seed=1).ways[start]))  # the goal has one way


def test_one_way_mazes_have_one_way_back():
    maze = make_maze("one-way", 6, seed=0)
    depth = distances(maze.ways, 0)
    for problem in maze.problems:
        path = [problem.goal]
        while path[-1]:
            (before,) = [c for c in range(36) if path[-1] in maze.ways[c]]
            path.append(before)
        assert len(path) - 1 == depth[problem.goal] == 6
        straight = 1.0
        for cell in path[1:]:
            straight /= len(maze.ways[cell])
        assert maze.chain.arrivals(0, problem.goal, steps=6)[-1] == pytest.approx(straight)
        # A walk that is dropped at the entrance in time tries again.
        assert straight < chance(maze, problem, backward=False) < 1
        assert chance(maze, problem, backward=True) == pytest.approx(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [4, 6])
def test_mazes_are_what_they_are_said_to_be(shape, side):
    maze = make_maze(shape, side, seed=2)
    assert maze == make_maze(shape, side, seed=2) != make_maze(shape, side, seed=3)
    for start, goal in maze.ends:
        assert distances(maze.ways, start)[goal] == side
        ways = (len(maze.ways[start]), len(maze.ways[goal]))
        if shape == "open":
            assert min(ways) >= 3
        elif shape == "funnel":
            corridor = [goal]
            while len(near := [c for c in maze.ways[corridor[-1]] if c not in corridor]) == 1:
                corridor += near
            assert ways[0] >= 3
            assert ways[1] == 1
            assert len(corridor) > side // 2
    if shape != "one-way":
        assert all(a in maze.ways[b] for a, beside in enumerate(maze.ways) for b in beside)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="one of open, funnel, one-way"):
        make_maze("round", 6, seed=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_teachers_walks_are_legal_from_both_ends(shape):
    maze = make_maze(shape, 4, seed=0)
    turns = 0
    for text in maze.texts(200, seed=0):
        assert len(text) == maze.steps + 1
        cells = [LETTERS.index(c) for c in text]
        problem = Problem(cells[0], cells[-1], maze.steps, maze.steps)
        assert maze.opening(problem, backward=False) == text[0]
        assert maze.opening(problem, backward=True) == text[-1]
        there = maze.visits(problem, text[1:], backward=False)
        back = maze.visits(problem, text[-2::-1], backward=True)
        assert [n for n, _ in there] == cells[1:]
        assert [n for n, _ in back] == cells[-2::-1]
        assert maze.legal(problem, cells)
        turns += sum(a == c and len(maze.ways[b]) > 1 for a, b, c in zip(cells, cells[1:], cells[2:], strict=False))
    assert turns == 0


def test_the_teachers_walks_have_the_teachers_probabilities():
    count = 20_000
    seen = Counter(KITE.texts(count, seed=0))
    exact = {"".join(LETTERS[c] for c in walk): 0.0 for walk, _ in stationary(KITE)}
    for walk, p in stationary(KITE):
        exact["".join(LETTERS[c] for c in walk)] += p
    assert set(seen) == set(exact)
    for text, p in exact.items():
        assert abs(seen[text] / count - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_a_sample_counts_up_to_its_first_illegal_step():
    # A B C D E are the cells 0 to 4; from 2 there is no way to 4, and Z is no cell.
    assert KITE.visits(FROM_0_TO_4, "BCED", backward=False) == ((1, 1), (2, 2))
    assert KITE.visits(FROM_0_TO_4, "BZCD", backward=False) == ((1, 1),)
    assert KITE.visits(FROM_0_TO_4, "DC<eos>", backward=True) == ((3, 1), (2, 2))
    one_way = Maze(2, ((1,), (2,), (0,)), ((0, 2),))
    problem = one_way.problems[0]
    assert one_way.visits(problem, "BC", backward=False) == ((1, 1), (2, 2))
    assert one_way.visits(problem, "BA", backward=True) == ((1, 1), (0, 2))
    assert one_way.visits(problem, "AC", backward=True) == ()


def test_what_solves_a_maze():
    assert KITE.legal(FROM_0_TO_4, (0, 2, 3, 4))
    assert KITE.legal(FROM_0_TO_4, (0, 1, 2, 3, 4))
    assert not KITE.legal(FROM_0_TO_4, (0, 1, 0, 2, 3, 4))  # five steps
    assert not KITE.legal(FROM_0_TO_4, (0, 3, 4))  # through a wall
    assert not KITE.legal(FROM_0_TO_4, (0, 2, 3))
    assert not KITE.legal(FROM_0_TO_4, (1, 2, 3, 4))


def test_arithmetic_is_read_from_both_ends():
    """12+7=19*2=38, whose characters from its end are 83=2*91=7+21."""
    world, problem = Arithmetic(2), arithmetic_problem(12, 38, 2)
    assert (world.opening(problem, False), world.opening(problem, True)) == ("12", "83")
    assert world.visits(problem, "+7=19*2=38", backward=False) == (((19, 1), 5), ((38, 2), 10))
    assert world.visits(problem, "=2*91=7+21", backward=True) == (((19, 1), 5), ((12, 0), 10))
    assert world.visits(arithmetic_problem(95, 4, 2), "+9=04", backward=False) == (((4, 1), 5),)
    assert world.visits(arithmetic_problem(95, 4, 2), "=9+59", backward=True) == (((95, 1), 5),)


@pytest.mark.parametrize("text", ["+7=18*2=36", "+0=12*2=24", "*3=36*2=72", "+7=1", "7+=19", "+7=1x", "<eos>", "+=719"])
def test_wrong_arithmetic_ends_a_sample(text):
    assert Arithmetic(2).visits(arithmetic_problem(12, 38, 2), text, backward=False) == ()


def test_what_fills_the_gaps():
    world, problem = Arithmetic(2), arithmetic_problem(12, 38, 2)
    assert world.legal(problem, ((12, 0), (19, 1), (38, 2)))
    assert not world.legal(problem, ((12, 0), (18, 1), (38, 2)))
    assert not world.legal(problem, ((12, 0), (38, 2)))
    assert not world.legal(arithmetic_problem(12, 24, 2), ((12, 0), (24, 1)))


def test_the_chances_of_arithmetic_are_those_of_counting():
    world = Arithmetic(2)
    ends = Counter(y for middle in results(12) for y in results(middle))
    assert len(ends) == sum(p.start == (12, 0) for p in world.problems)
    for y, ways in ends.items():
        assert chance(world, arithmetic_problem(12, y, 2), backward=False) == pytest.approx(ways / 100)
    for y in (7, 38):
        assert sum(chance(world, arithmetic_problem(x, y, 2), True) for x in range(100)) == pytest.approx(1)


def test_the_teachers_chains_are_right_from_both_ends():
    world = Arithmetic(OPERATIONS)
    for text in world.texts(50, seed=1):
        problem = arithmetic_problem(int(text[:2]), int(text[-2:]), OPERATIONS)
        there = world.visits(problem, text[2:], backward=False)
        back = world.visits(problem, text[-3::-1], backward=True)
        path = (problem.start, *(n for n, _ in there))
        assert world.legal(problem, path)
        assert (problem.goal, *(n for n, _ in back)) == path[::-1]


def sample(*cells: int, tokens: int = 4) -> Sample:
    return Sample(tuple((c, i) for i, c in enumerate(cells, 1)), tokens)


def test_forward_search_pays_for_samples_whole_and_for_the_last_up_to_the_goal():
    found = search(FROM_0_TO_4, [sample(1, 2, 0, 1), sample(2), sample(2, 3, 4, 3)], [], budget=100)
    assert (found.tokens, found.path) == (4 + 4 + 3, (0, 2, 3, 4))


def test_reverse_search_gives_the_path_in_the_order_of_the_text():
    found = search(FROM_0_TO_4, [], [sample(3, 4, 3, 2), sample(3, 2, 1, 0)], budget=100)
    assert (found.tokens, found.path) == (4 + 4, (0, 1, 2, 3, 4))


def test_both_ends_meet_at_any_place_of_an_earlier_sample():
    forward = [sample(1, 0, tokens=2), sample(2, 1, tokens=2)]
    reverse = [sample(3, 4, tokens=2), sample(3, 2, tokens=2)]
    found = search(FROM_0_TO_4, forward, reverse, budget=100)
    # 0 1 0, 4 3 4, 0 2 1, and then 4 3 2 meets the third at its second token.
    assert (found.tokens, found.path) == (2 + 2 + 2 + 2, (0, 2, 3, 4))
    assert KITE.legal(FROM_0_TO_4, found.path)
    # With the reverse sample first to come to 2, the forward one meets it at its first token.
    found = search(FROM_0_TO_4, forward, [sample(3, 2, tokens=2)], budget=100)
    assert (found.tokens, found.path) == (2 + 2 + 1, (0, 2, 3, 4))


def test_a_search_ends_at_its_budget():
    tries = [sample(1, 2, 0, 1), sample(2, 3, 4, 3)]
    assert search(FROM_0_TO_4, tries, [], budget=7).path == (0, 2, 3, 4)
    found = search(FROM_0_TO_4, tries, [], budget=6)
    assert (found.tokens, found.path) == (6, None)
    assert search(FROM_0_TO_4, tries[:1], [], budget=6).tokens == 4


def test_half_a_sample_is_its_beginning():
    whole = sample(1, 2, 3, 4)
    assert whole.half(2) == sample(1, 2, tokens=2)
    assert sample(1, tokens=4).half(2) == sample(1, tokens=2)
    assert reaches_end(whole)
    assert not reaches_end(sample(1, tokens=4))
    assert not reaches_end(sample(tokens=0))


def test_the_cases_are_all_worlds_with_the_same_models_for_all_gaps():
    found = cases([4], [2, 4], [0, 1])
    assert len(found) == len(SHAPES) * 2 + 2 * 2
    assert all(len(c.problems) == PROBLEMS for c in found)
    assert len({c.run for c in found if c.kind == "maze"}) == len(SHAPES) * 2
    assert {c.run for c in found if c.kind == "arithmetic"} == {"arithmetic-seed0", "arithmetic-seed1"}


def test_the_perfect_teachers_search_by_hand():
    # Two samples of four tokens fit into nine. The first succeeds with 1/2 at token 2, the second with 1/4 at 4 + 2.
    assert perfect([0, 0.5, 0, 0], budget=9) == (0.75, 0.5 * 2 + 0.25 * 6 + 0.25 * 9)
    assert perfect([0.25, 0, 0, 0.75], budget=9) == (1, 0.25 * 1 + 0.75 * 4)


def test_success_counts_the_problems_of_all_seeds():
    pooled = success([result([True] * 5), result([True, True, True, False, False])], "forward")
    assert (pooled.value, pooled.low, pooled.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_every_operation_of_arithmetic():
    assert results(95) == [90, 96, 97, 98, 99, 0, 1, 2, 3, 4]
    assert all(b in results(a) for a, b in pairwise([1, 2, 4, 8, 16, 32, 64, 28]))
